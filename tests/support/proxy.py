"""A forward proxy on loopback: absolute-form HTTP, CONNECT, optionally Basic authentication. It notes what passes."""

from __future__ import annotations

import base64
import contextlib
import selectors
import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

_TIMEOUT_S = 10.0
_LONGEST_HEAD_BYTES = 64 * 1024
_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Passage:
    """One request to the proxy; for CONNECT ``target`` is host:port, else the absolute URL without its query."""

    method: str
    target: str
    admitted: bool


class ForwardProxy:
    """Proxy HTTP for as long as the ``with`` block lasts.

    Args:
        user, password: demanded of everybody when ``user`` is not empty; a request without them gets 407.
    """

    def __init__(self, user: str = "", password: str = "") -> None:
        self._wanted = ""
        if user:
            self._wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._lock = threading.Lock()
        self._passages: list[Passage] = []
        self._live: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.netloc = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> ForwardProxy:
        self._start(self._accept_for_ever)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closing = True
            for sock in [*self._live, self._listener]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(_TIMEOUT_S)

    @property
    def url(self) -> str:
        """Where it is, without user and password."""
        return f"http://{self.netloc}"

    @property
    def passages(self) -> list[Passage]:
        """What came so far, refused requests included."""
        with self._lock:
            return list(self._passages)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="test-proxy", daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept_for_ever(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        # Whatever one side does to the connection, the other learns it by the end of its own.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            self._keep(client, stack)
            client.settimeout(_TIMEOUT_S)
            head, rest = _read_head(client)
            lines = head.decode("latin-1").split("\r\n")
            method, target, version = lines[0].split(" ")
            fields = [line for line in lines[1:] if line]
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)
            }
            admitted = not self._wanted or headers.get("proxy-authorization") == self._wanted
            with self._lock:
                self._passages.append(Passage(method, target.split("?")[0], admitted))
            if not admitted:
                client.sendall(
                    b'HTTP/1.1 407 Login needed\r\nProxy-Authenticate: Basic realm="test"\r\n'
                    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
                )
                return
            parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
            address = (str(parts.hostname), parts.port or 80)
            upstream = self._keep(socket.create_connection(address, _TIMEOUT_S), stack)
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            else:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                kept = [field for field in fields if not field.lower().startswith(("proxy-", "connection:"))]
                # One request a connection: the next one may be for another host.
                ours = "\r\n".join([f"{method} {path} {version}", *kept, "Connection: close", "", ""])
                rest = ours.encode("latin-1") + rest
            upstream.sendall(rest)
            _join(client, upstream)

    def _keep(self, sock: socket.socket, stack: contextlib.ExitStack) -> socket.socket:
        stack.callback(self._forget, sock)
        with self._lock:
            self._live.add(sock)
            if self._closing:
                raise ConnectionAbortedError("the proxy closes")
        return sock

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._live.discard(sock)
            sock.close()


def _read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        piece = sock.recv(_PIECE_BYTES)
        if not piece or len(content) > _LONGEST_HEAD_BYTES:
            raise ConnectionError("no request")
        content += piece
    head, _, rest = content.partition(b"\r\n\r\n")
    return head, rest


def _join(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until one side has ended."""
    one.settimeout(None)
    other.settimeout(None)
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, other)
        selector.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in selector.select():
                source, target = key.fileobj, key.data
                assert isinstance(source, socket.socket)
                piece = source.recv(_PIECE_BYTES)
                if not piece:
                    return
                target.sendall(piece)
