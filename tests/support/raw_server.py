"""An HTTP server of bare sockets, for what no decent server does: trickle, stall, cut, reset, read slowly.

Each connection carries one request and is then closed; a script decides what happens on it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

Script = Callable[["Exchange"], None]
_PATIENCE_S = 10.0


def answer(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, length: int | None = None
) -> bytes:
    """Give a whole answer as bytes; ``length`` lies about the body's."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in {"Connection": "close", **(headers or {})}.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Exchange:
    """One connection: the head of its request, and what a script does with it."""

    def __init__(self, number: int, connection: socket.socket, closing: threading.Event) -> None:
        self.number = number
        self.connection = connection
        self.closing = closing
        self.head = b""
        self.body = b""
        self.headers: dict[str, str] = {}

    def read_head(self) -> bool:
        while b"\r\n\r\n" not in self.head:
            piece = self.connection.recv(65536)
            if not piece:
                return False
            self.head += piece
        self.head, _, self.body = self.head.partition(b"\r\n\r\n")
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        return True

    @property
    def target(self) -> str:
        return self.head.split(b" ")[1].decode()

    @property
    def missing(self) -> int:
        return int(self.headers.get("content-length", "0")) - len(self.body)

    def read_body(self, *, bytes_per_s: float | None = None) -> bytes:
        """Read the whole body, as slowly as wished."""
        began, taken = time.monotonic(), 0
        while self.missing > 0 and not self.closing.is_set():
            piece = self.connection.recv(65536)
            if not piece:
                break
            self.body += piece
            taken += len(piece)
            if bytes_per_s is not None:
                self.closing.wait(max(0.0, taken / bytes_per_s - (time.monotonic() - began)))
        return self.body

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def trickle(self, data: bytes, pause_s: float) -> None:
        """Send a byte at a time."""
        for index in range(len(data)):
            self.send(data[index : index + 1])
            if self.closing.wait(pause_s):
                return

    def stall(self) -> None:
        """Do nothing until the server closes."""
        self.closing.wait(_PATIENCE_S)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class RawServer:
    """Serve on a free port of 127.0.0.1; a context manager. ``exchanges`` holds every connection with a request."""

    def __init__(self, script: Script, *, port: int = 0, receive_buffer_bytes: int | None = None) -> None:
        self._script = script
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        self.exchanges: list[Exchange] = []
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if receive_buffer_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(16)
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RawServer:
        self._start(self._accept)
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(_PATIENCE_S)
        self._listener.close()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="raw-server", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except socket.timeout:
                continue
            connection.settimeout(_PATIENCE_S)
            with self._lock:
                self._open.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            exchange = Exchange(0, connection, self._closing)
            if exchange.read_head():
                with self._lock:
                    self.exchanges.append(exchange)
                    exchange.number = len(self.exchanges)
                self._script(exchange)
        with self._lock:
            self._open.discard(connection)


def free_port() -> int:
    """Give a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
