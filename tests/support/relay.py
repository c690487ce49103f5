"""Peers that misbehave below the protocol: silent ones, ones that swallow connections, and a relay that can freeze."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def silent_peer() -> Iterator[int]:
    """Give a port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@contextlib.contextmanager
def blackhole() -> Iterator[int]:
    """Give a port where connecting neither succeeds nor fails: its queue of unaccepted connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield int(listener.getsockname()[1])


class Relay:
    """Pass bytes between whoever connects and ``127.0.0.1:port``, until told to freeze."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.accepted = 0
        self._frozen = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="relay")
        self._thread.start()

    def freeze(self) -> None:
        """Stop passing bytes; the connections stay open, as if a cable had been pulled."""
        self._frozen.set()

    def thaw(self) -> None:
        """Pass bytes again."""
        self._frozen.clear()

    def close(self) -> None:
        """End all connections and the thread."""
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        twins: dict[socket.socket, socket.socket] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in selector.select(0.02):
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._listener:
                        near, _address = sock.accept()
                        self.accepted += 1
                        far = socket.create_connection(("127.0.0.1", self._target))
                        twins.update({near: far, far: near})
                        for each in (near, far):
                            selector.register(each, selectors.EVENT_READ)
                    elif not self._frozen.is_set():
                        self._pass(sock, twins, selector)
                if self._frozen.is_set():
                    self._over.wait(0.02)
        for sock in (*twins, self._listener):
            sock.close()

    def _pass(
        self, sock: socket.socket, twins: dict[socket.socket, socket.socket], selector: selectors.BaseSelector
    ) -> None:
        twin = twins.get(sock)
        if twin is None:
            return
        with contextlib.suppress(OSError):
            content = sock.recv(65536)
            if content:
                twin.sendall(content)
                return
        for each in (sock, twin):
            del twins[each]
            selector.unregister(each)
            each.close()


@contextlib.contextmanager
def relay(port: int) -> Iterator[Relay]:
    """Run a relay for the block."""
    made = Relay(port)
    try:
        yield made
    finally:
        made.close()
