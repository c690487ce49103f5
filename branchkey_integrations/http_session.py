"""What we ask of requests and urllib3 beyond their defaults: whose credentials go where, and how sockets behave."""

from __future__ import annotations

import http.client
import io
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ProtocolError

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import DeadlineError
from branchkey_integrations.redaction import Secret, hidden_values

#: Most bytes of an upload that the kernel holds and has not sent yet.
_UNSENT_BYTES = 128 * 1024
_TRICKLE_BYTES = 16
#: What the body of an object has to bring in each window; the slowest links that anybody sends models over bring more.
_LEAST_BYTES, _WINDOW_S = 1024, 30.0
#: What the environment can say of proxies for http and https, and of trust.
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_ASKED_VARIABLES = (*_PROXY_VARIABLES, *map(str.upper, _PROXY_VARIABLES), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
#: There the system has settings of its own, which may change without a sign.
_ASK_ALWAYS = sys.platform in ("darwin", "win32")
#: Hosts whose settings are kept: the platform's, and those of its presigned links.
_MOST_SETTINGS = 16
_OUR_HEADERS = ("Authorization", "LEAF", "x-bk-file-size", "x-bk-file-digest")


class Bearer(AuthBase):
    """Set our own header. Being an auth object it keeps ``requests`` from taking one out of ``.netrc``."""

    def __init__(self, credentials: Credentials) -> None:
        self._value = Secret(f"Bearer {credentials.id}:{credentials.session_token}")

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Put the header on."""
        request.headers["Authorization"] = self._value
        return request


class NoAuth(AuthBase):
    """Send no credentials at all, not even those of ``.netrc``."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Take off what may be there."""
        request.headers.pop("Authorization", None)
        return request


class BadRedirectError(requests.RequestException):
    """Internal: an answer sends us to what is no address."""

    found = "a redirect to no address"


class DowngradeError(BadRedirectError):
    """Internal: an answer that came over TLS sends us to where nobody has to show who he is."""

    found = "a redirect from https to plain http"


class Session(requests.Session):
    """Carry none of our headers to another host, keep no cookies, and follow no redirect that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        self._settings: dict[Any, Any] = {}

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Give the place that an answer sends us to, if it sends us anywhere.

        Raises:
            BadRedirectError: it is no http or https URL; the parent would let errors of decoding and parsing through.
            DowngradeError: it leads from https to http.
        """
        try:
            target = super().get_redirect_target(resp)
            there = None if target is None else urljoin(resp.url, target)
            refused: type[BadRedirectError] | None = None
            if there is not None and not can_be_fetched(there):
                refused = BadRedirectError
            elif there is not None and resp.url.startswith("https:") and not there.startswith("https:"):
                refused = DowngradeError
        except ValueError:
            # Bytes that are no text, or a host in brackets that do not close.
            refused = BadRedirectError
        if refused is None:
            return target
        resp.close()
        raise refused(response=resp)

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """Add what the environment says of proxies and trust; looked up anew only where one of its variables has changed."""
        # The lookup reads every variable of the process twice, which is a fifth of what a round of a small model costs.
        parts = urlsplit(url)
        told = tuple(hidden_values({name: os.environ.get(name) for name in _ASKED_VARIABLES}).values())
        key = (parts.scheme, parts.netloc, tuple(sorted((proxies or {}).items())), stream, verify, cert, told)
        found = self._settings.get(key)
        if found is None or _ASK_ALWAYS:
            found = super().merge_environment_settings(url, proxies, stream, verify, cert)
            found["proxies"] = hidden_values(found["proxies"])
            self._settings = {**self._settings, key: found} if len(self._settings) < _MOST_SETTINGS else {key: found}
        return {**found, "proxies": dict(found["proxies"])}

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Take our headers off a request that was redirected to another scheme, host or port."""
        # The cookies of a chain of redirects are kept beside those of the session.
        prepared_request.headers.pop("Cookie", None)
        # The parent would look into .netrc for the new host; a redirect must carry no credentials anywhere.
        before, after = (urlsplit(request.url or "") for request in (response.request, prepared_request))
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            for header in _OUR_HEADERS:
                prepared_request.headers.pop(header, None)


def can_be_fetched(url: str) -> bool:
    """Tell whether a text is an http or https URL with a host and, if any, a port that can be one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


class _Bounded(io.RawIOBase):
    """Read from a socket, but not beyond a deadline: a timeout alone counts anew with each byte that trickles in."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.deadline: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise socket.timeout("timed out")
        return self._raw.readinto(buffer)

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Demand that status line and headers, interim answers among them, are there within the socket's timeout."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._timeout_s = sock.gettimeout()
        self._bounded = _Bounded(self.fp.detach())
        self.fp = io.BufferedReader(self._bounded)

    def begin(self) -> None:
        """Read up to the end of the headers."""
        self._bounded.deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        super().begin()
        # What a body may do is for those who read it to say.
        self._bounded.deadline = None


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}


class Adapter(HTTPAdapter):
    """Bound the time that headers take, keep what the kernel holds of an upload small, and close idle connections when told to."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*args, socket_options=_socket_options(), **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Make the pools of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, socket_options=_socket_options(), **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def forget(self) -> None:
        """Let go of all idle connections; a request of another thread that has one in its hands is not disturbed."""
        super().close()

    def close(self) -> None:
        """Close all idle connections now. urllib3 leaves that to the collector, and a kept traceback would keep them."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 - it forbids iteration, but gives a copy of its keys
                pool = manager.pools.get(key)
                if pool is not None:
                    pool.close()
        super().close()


def _socket_options() -> list[tuple[int, int, int]]:
    options = list(HTTPConnection.default_socket_options)
    lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if lowat is not None:
        # The kernel takes megabytes ahead of a slow link; the deadline of the answer would run while they still leave.
        # This limits what is not on its way yet, so a fast link with a long way stays fast.
        options.append((socket.IPPROTO_TCP, lowat, _UNSENT_BYTES))
    return options


def in_words_of_the_protocol(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pass on the pieces of a body; what urllib3 lets through where the length of a chunk makes no sense is its own error."""
    try:
        yield from pieces
    except (ValueError, OverflowError) as error:
        raise ProtocolError(type(error).__name__) from None


def as_it_comes(answer: requests.Response, most_bytes: int = 64 * 1024, *, decoded: bool = True) -> Iterator[bytes]:
    """Give the body in pieces as they arrive: a plain read waits for a whole piece, however slowly it trickles in.

    Args:
        most_bytes: size of the largest piece.
        decoded: undo the encoding of the content.
    """
    read_some = getattr(answer.raw, "read1", None)  # urllib3 2.1 has it first
    if read_some is None:
        yield from answer.raw.stream(_TRICKLE_BYTES if decoded else most_bytes, decode_content=decoded)
        return
    while piece := read_some(most_bytes, decode_content=decoded):
        yield piece


def not_too_slow(pieces: Iterator[bytes], action: str, timeout_s: float) -> Iterator[bytes]:
    """Pass the pieces of a body on, as long as they bring at least 1 KiB in each half minute (or ``timeout_s``, if longer).

    Raises:
        DeadlineError: they do not; a byte now and then would hold up whoever waits for the whole for days.
    """
    window_s = max(_WINDOW_S, timeout_s)
    until, moved = time.monotonic() + window_s, 0
    for piece in pieces:
        yield piece
        moved += len(piece)
        if time.monotonic() > until:
            if moved < _LEAST_BYTES:
                raise DeadlineError(
                    what=action,
                    expected=f"at least {_LEAST_BYTES} bytes in {window_s:g} s",
                    found=f"{moved}, of an object that trickles in",
                    fix="The link or the server hardly moves; try again later",
                )
            until, moved = time.monotonic() + window_s, 0
