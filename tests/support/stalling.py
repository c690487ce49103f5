"""A line that goes dead in the middle of whatever is being said on it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator


class StallingRelay:
    """Pass bytes between whoever connects and ``127.0.0.1:port``, and of those that come back only the first few.

    From then on nothing passes in either direction, and the connections stay open.

    Args:
        port: where to.
        limit: how many bytes come back over each connection; None: all.
        lines: how many connections pass unhindered before the first one that stalls.
    """

    def __init__(self, port: int, limit: int | None, lines: int = 0) -> None:
        self._target = port
        self._limit = limit
        self._healthy = lines
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        #: Set when a line has gone dead.
        self.stalled = threading.Event()
        #: What came back over all lines.
        self.said = bytearray()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept, name="stalling relay")]
        self._threads[0].start()

    def close(self) -> None:
        """End all connections and threads."""
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                near, _ = self._listener.accept()
                limit = None if self._healthy > 0 else self._limit
                self._healthy -= 1
                thread = threading.Thread(target=self._pass, args=(near, limit), name="stalling line")
                self._threads.append(thread)
                thread.start()

    def _pass(self, near: socket.socket, limit: int | None) -> None:
        with near, socket.create_connection(("127.0.0.1", self._target)) as far, contextlib.suppress(OSError):
            left = limit
            while left is None or left > 0:
                if self._over.is_set():
                    return
                ready, _, _ = select.select([near, far], [], [], 0.02)
                for sock in ready:
                    content = sock.recv(65536 if left is None or sock is near else left)
                    if not content:
                        return
                    (far if sock is near else near).sendall(content)
                    if sock is far:
                        self.said += content
                        left = None if left is None else left - len(content)
            self.stalled.set()
            self._over.wait()


@contextlib.contextmanager
def stalling(port: int, limit: int | None, lines: int = 0) -> Iterator[StallingRelay]:
    """Run a relay for the block."""
    made = StallingRelay(port, limit, lines)
    try:
        yield made
    finally:
        made.close()
