"""A small platform that hands out tickets and speaks WebSocket, for tests of the listener alone."""

from __future__ import annotations

import contextlib
import http
import itertools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from branchkey_integrations.config import Endpoint
from branchkey_integrations.listeners import Ticket
from tests.support.credentials import register_secret

#: The server's own log shows tickets; what is tested is whether the listener's does.
_silent = logging.Logger("websocket_server")  # noqa: LOG001
_silent.disabled = True


class WebSocketServer:
    """Serve ``/api/v1/ws`` on loopback.

    What tests set: ``backlog`` (sent to each new connection before anything else), ``refuse`` (a status for upgrades),
    ``close_with`` (a close code for each new connection, after the backlog).
    """

    def __init__(self, certificate: ssl.SSLContext | None = None) -> None:
        self._tls = certificate
        self._numbers = itertools.count(1)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.backlog: list[bytes | str] = []
        self.refuse: int | None = None
        self.close_with: int | None = None
        self.tickets: list[Ticket] = []
        self.ticket_times: list[float] = []
        self.requests: list[Request] = []
        self.close_codes: list[int | None] = []
        self.port = 0
        self._lock = threading.Lock()
        self._connected: set[ServerConnection] = set()

    @property
    def endpoint(self) -> Endpoint:
        """Where it is."""
        return Endpoint("http" if self._tls is None else "https", "127.0.0.1", self.port)

    @property
    def connections(self) -> int:
        """Number of open WebSockets."""
        return len(self._open())

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        sock = socket.create_server(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        self._server = serve(
            self._talk, sock=sock, ssl=self._tls, process_request=self._look, ping_interval=None, close_timeout=0.5,
            logger=_silent,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._server.serve_forever, name="websocket-server")
        self._thread.start()

    def stop(self, code: int = 1012) -> None:
        """Close all connections with ``code`` and stop listening."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None:
            # Nobody new must come in while the others are sent away.
            self.refuse, refuse = 503, self.refuse
            self.close_all(code)
            server.shutdown()
            thread.join()
            self.refuse = refuse

    def ticket(self) -> Ticket:
        """Hand out a ticket, with characters that must be percent-encoded in a URL."""
        number = next(self._numbers)
        issued = Ticket(register_secret(f"ticket &/?%#+ü {number} {'x' * 8}"), f"request={number}")
        self.tickets.append(issued)
        self.ticket_times.append(time.monotonic())
        return issued

    def send(self, *messages: bytes | str) -> None:
        """Send messages over every open WebSocket: ``str`` as text, ``bytes`` as binary frames."""
        for connection in self._open():
            for message in messages:
                connection.send(message)

    def send_text_frame(self, content: bytes) -> None:
        """Send bytes as a text frame, UTF-8 or not."""
        for connection in self._open():
            connection.send(content, text=True)

    def close_all(self, code: int) -> None:
        """Close all connections, and go on listening."""
        for connection in self._open():
            with self._lock:
                self._connected.discard(connection)
            connection.close(code)

    def cut_all(self) -> None:
        """End all TCP connections without a word."""
        for connection in self._open():
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)

    def _look(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        query = parse_qs(urlsplit(request.path).query)
        if self.refuse is not None:
            return _answer(self.refuse)
        known = any(query == {"ticket": [t.ticket_id], "request_id": [t.request_id]} for t in self.tickets)
        if not known or urlsplit(request.path).path != "/api/v1/ws":
            return _answer(401)
        return None

    def _open(self) -> list[ServerConnection]:
        with self._lock:
            return list(self._connected)

    def _talk(self, connection: ServerConnection) -> None:
        with self._lock:
            self._connected.add(connection)
        with contextlib.suppress(ConnectionClosed):
            for message in self.backlog:
                connection.send(message)
            if self.close_with is not None:
                connection.close(self.close_with)
            for _ in connection:
                pass
        with self._lock:
            self._connected.discard(connection)
            self.close_codes.append(connection.protocol.close_rcvd.code if connection.protocol.close_rcvd else None)


def _answer(status: int) -> Response:
    phrase = http.HTTPStatus(status).phrase
    headers = Headers({"Content-Length": "0", "Connection": "close"})
    if status == 302:
        headers["Location"] = "/elsewhere"
    return Response(status, phrase, headers, b"")


@contextlib.contextmanager
def websocket_server(certificate: ssl.SSLContext | None = None) -> Iterator[WebSocketServer]:
    """Run a server for the block."""
    server = WebSocketServer(certificate)
    server.start()
    try:
        yield server
    finally:
        server.stop()
