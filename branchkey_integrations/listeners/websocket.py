"""Notifications over a WebSocket: a fresh ticket for every connection, and pings of our own to notice a dead one."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from branchkey_integrations.config import Endpoint, RetryPolicy, Verify, check_seconds
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    BranchKeyError,
    MissingDependencyError,
    NotificationError,
    UnreachableError,
)
from branchkey_integrations.listeners import Ticket
from branchkey_integrations.listeners.base import LostError, OnEvent, OnFailure, ThreadedListener
from branchkey_integrations.listeners.dial import connection_error, dial, emergency_exit, shut_down, tls_context
from branchkey_integrations.listeners.proxy import proxy_for, split, tunnel
from branchkey_integrations.listeners.tls_socket import SharedTLSSocket
from branchkey_integrations.redaction import Secret, hidden_values

_PATH = "/api/v1/ws"
_OPEN_S = 10.0
_FAREWELL_S = 0.8
#: A notification is two short strings. Larger ones are junk, but junk should not cost the connection either.
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_OLDEST_MAJOR = 15
_UNAUTHORIZED = 401
#: Round trips in a row in which nothing came, before the listener counts as ready, and the least time for each, in seconds.
#: One would not do: servers answer a ping while they still write what they keep for a leaf that comes late.
_QUIET_ROUNDS = 2
_ROUND_S = 0.025


def _load_websockets() -> Any:
    try:
        import websockets.exceptions
        import websockets.sync.client
        import websockets.version
    except ImportError:
        found = "none"
    else:
        found = websockets.version.version
        if int(found.split(".")[0]) >= _OLDEST_MAJOR:
            return websockets
    raise MissingDependencyError(
        what="notifications over WebSocket",
        expected=f"the package websockets, version {_OLDEST_MAJOR} or newer",
        found=found,
        fix="Run: pip install 'branchkey-integrations[websocket]'",
    )


class WebSocketListener(ThreadedListener):
    """Listen on the platform's WebSocket, as the official clients 2.8.1 to 3.0.1 do (measured).

    What the platform sends while the connection is down is lost unless it sends it again at the next one; whoever waits
    should therefore also ask now and then.

    Args:
        credentials: of the leaf; only for messages, since the ticket is the permission.
        endpoint: where the platform is; TLS is spoken if its scheme is https.
        ticket: asks the platform for a ticket; may block up to its own deadline, and raises our errors.
        verify: as for HTTP, see :data:`~branchkey_integrations.config.Verify`.
        proxies: as for HTTP; None means those of the environment.
        on_event: called in the listener's thread with each notification of a known type; must not block.
        on_failure: called in that thread with an error when reconnecting is refused, and with None when it is well again.
        retry: the pace of reconnecting; it never gives up.
        ping_interval_s: seconds between two pings; a connection that is silent for two of them is given up.

    Raises:
        MissingDependencyError: the package ``websockets`` is not installed or too old.
        TLSError: the CA bundle cannot be read.
        ConfigurationError: the proxy's URL cannot be read.
    """

    name = "websocket"

    def __init__(
        self,
        credentials: Credentials,
        endpoint: Endpoint,
        ticket: Callable[[], Ticket],
        *,
        verify: Verify,
        proxies: Mapping[str, str] | None,
        on_event: OnEvent,
        on_failure: OnFailure,
        retry: RetryPolicy | None = None,
        ping_interval_s: float = 30.0,
    ) -> None:
        self._credentials = credentials
        self._endpoint = endpoint
        super().__init__(on_event, on_failure, retry)
        check_seconds("ping_interval_s", ping_interval_s)
        self._websockets = _load_websockets()
        self._ticket = ticket
        self._tls = tls_context(verify) if endpoint.scheme == "https" else None
        if self._tls is not None:
            self._tls.sslsocket_class = SharedTLSSocket
        self._proxies = hidden_values(proxies) if proxies else None
        self._ping_interval_s = ping_interval_s
        #: Status of the upgrade that was refused last.
        self._refused_with: int | None = None
        proxy = proxy_for(endpoint, proxies)
        if proxy is not None:
            split(proxy)

    @property
    def _peer(self) -> str:
        return self._endpoint.netloc

    @property
    def _what(self) -> str:
        return f"notifications from {self._peer}"

    def __repr__(self) -> str:
        return f"WebSocketListener({self._credentials.id!r}, {self._peer!r})"

    def _listen(self) -> None:
        try:
            self._listen_once()
        except NotificationError:
            # A ticket that ran out on its way says nothing of the leaf. Later on it is tried again in any case.
            if self._ready_once or self._refused_with != _UNAUTHORIZED or self._stop.is_set():
                raise
            self._listen_once()

    def _listen_once(self) -> None:
        self._refused_with = None
        ticket = self._ticket()
        query = urlencode({"ticket": ticket.ticket_id, "request_id": ticket.request_id}, quote_via=quote, safe="")
        url = Secret(f"{self._endpoint.websocket_url(_PATH)}?{query}")
        del query  # a traceback through here may be printed with local variables
        try:
            with self._connection(url) as websocket:
                if websocket is not None:
                    self._converse(websocket)
        finally:
            self._interruptible(None)

    @contextlib.contextmanager
    def _connection(self, url: str) -> Iterator[Any]:
        """Open a WebSocket for the block; None where the listener was closed meanwhile."""
        with contextlib.ExitStack() as stack:
            try:
                websocket = self._open(url, stack)
            except (OSError, ValueError, self._websockets.exceptions.WebSocketException) as error:
                if isinstance(error, BranchKeyError):
                    raise
                # Foreign errors quote the URL, and the ticket in it: neither they nor their context may be shown.
                raise self._refused_upgrade(error) from None
            yield websocket

    def _open(self, url: str, stack: contextlib.ExitStack) -> Any:
        proxy = proxy_for(self._endpoint, self._proxies)
        options: dict[str, Any] = {}
        if proxy is None or proxy.startswith("http://"):
            sock = self._socket(proxy, stack)
            if sock is None:
                return None
            options["sock"] = sock
            proxy = None
        elif proxy.startswith("https://"):
            options["proxy_ssl"] = self._tls or tls_context(verify=True)
        websocket = stack.enter_context(
            self._websockets.sync.client.connect(
                url,
                ssl=self._tls,
                proxy=proxy,
                compression=None,
                user_agent_header="branchkey-integrations",
                open_timeout=_OPEN_S,
                close_timeout=_FAREWELL_S,
                ping_interval=None,
                max_size=_MAX_MESSAGE_BYTES,
                logger=_silent_logger(),
                **options,
            )
        )
        self._interruptible(websocket.close)
        return websocket

    def _socket(self, proxy: str | None, stack: contextlib.ExitStack) -> socket.socket | None:
        """Open the TCP connection here, not in ``websockets``, so that ``close`` can end it whatever it waits for."""
        parts = None if proxy is None else split(proxy)
        host, port = self._endpoint.host, self._endpoint.port
        if parts is not None:
            host, port = str(parts.hostname), parts.port or 80
        sock = dial(host, port, timeout_s=_OPEN_S, stop=self._stop)
        if sock is None:
            return None
        stack.callback(sock.close)
        twin = stack.enter_context(emergency_exit(sock))
        self._interruptible(lambda: shut_down(twin))
        if parts is not None:
            sock.settimeout(_OPEN_S)
            tunnel(sock, parts, self._endpoint)
            sock.settimeout(None)
        return sock

    def _refused_upgrade(self, error: Exception) -> BranchKeyError:
        exceptions = self._websockets.exceptions
        if isinstance(error, exceptions.InvalidStatus):
            status = self._refused_with = error.response.status_code
            if 400 <= status < 500 and status not in (408, 425, 429):
                return NotificationError(
                    what=self._what,
                    expected="an upgrade to WebSocket",
                    found=f"status {status}",
                    fix="Check the leaf's credentials" if status in (401, 403) else "Check that host is the platform",
                )
            return UnreachableError(
                what=self._what, expected="an upgrade to WebSocket", found=f"status {status}", fix="Try again later"
            )
        # A connection that ends in the middle of the handshake comes as an invalid message, caused by the end of the stream.
        if isinstance(error, exceptions.InvalidMessage) and isinstance(error.__cause__, (EOFError, OSError)):
            return UnreachableError(what=self._what, expected="an upgrade to WebSocket", found="a lost connection")
        if isinstance(error, (OSError, TimeoutError)):
            return connection_error(self._what, self._peer, error)
        return NotificationError(
            what=self._what,
            expected="an upgrade to WebSocket",
            found=f"an answer that is none ({type(error).__name__})",
            fix="Check host and proxy; redirects are not followed",
        )

    def _converse(self, websocket: Any) -> None:
        try:
            self._catch_up(websocket)
            self._ready()
            self._receive_for_ever(websocket)
        except self._websockets.exceptions.ConnectionClosed as closed:
            raise self._closed(closed) from None

    def _catch_up(self, websocket: Any) -> None:
        """Deliver what the server sends of its own accord at the beginning; a server that never falls silent gets 10 s."""
        deadline = time.monotonic() + _OPEN_S
        quiet = 0
        while quiet < _QUIET_ROUNDS and time.monotonic() < deadline:
            quiet = 0 if self._round_trip(websocket) else quiet + 1

    def _round_trip(self, websocket: Any) -> int:
        """Wait for the answer to a ping, deliver what comes before it, and count that."""
        began = time.monotonic()
        pong = websocket.ping()
        count = 0
        # Reading goes on meanwhile: the pong is behind the messages, and the buffer for them is small.
        while not pong.is_set() or time.monotonic() - began < _ROUND_S:
            count += self._drain(websocket)
            if time.monotonic() - began > _OPEN_S:
                raise LostError("the server does not answer pings")
            pong.wait(0.005)
        return count + self._drain(websocket)

    def _drain(self, websocket: Any) -> int:
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                self._deliver(websocket.recv(timeout=0, decode=False))
                count += 1
        return count

    def _receive_for_ever(self, websocket: Any) -> None:
        next_ping = time.monotonic() + self._ping_interval_s
        pong: Any = None
        heard = False
        while True:
            remaining = next_ping - time.monotonic()
            if remaining <= 0:
                if pong is not None and not heard and not pong.is_set():
                    # There is nobody to say good-bye to.
                    shut_down(websocket.socket)
                    raise LostError("the server fell silent")
                pong, heard = websocket.ping(), False
                next_ping = time.monotonic() + self._ping_interval_s
                continue
            with contextlib.suppress(TimeoutError):
                # decode=False: text that is not UTF-8 must cost a warning, not the connection.
                message = websocket.recv(timeout=remaining, decode=False)
                heard = True
                self._deliver(message)

    def _closed(self, closed: Any) -> BranchKeyError | LostError:
        code = closed.rcvd.code if closed.rcvd is not None else None
        found = "the connection was lost" if code is None else f"the server closed it with code {code}"
        # 1008 and the private codes before anything was delivered are how servers refuse after the upgrade.
        if not self.connected and code is not None and (code == 1008 or 4000 <= code < 5000):
            return NotificationError(
                what=self._what, expected="an open WebSocket", found=found, fix="Check the leaf's credentials"
            )
        return LostError(found)


def _silent_logger() -> logging.Logger:
    """Make a logger that drops everything: the debug log of ``websockets`` shows the URL with the ticket."""
    # Not registered under a name, so that no logging configuration can switch it on.
    silent = logging.Logger("branchkey_integrations.listeners.wire")  # noqa: LOG001
    silent.disabled = True
    return silent
