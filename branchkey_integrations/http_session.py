"""What we ask of requests and urllib3 beyond their defaults: whose credentials go where, and how sockets behave."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection

from branchkey_integrations.credentials import Credentials

#: Most bytes of an upload that the kernel holds and has not sent yet.
_UNSENT_BYTES = 128 * 1024
_TRICKLE_BYTES = 16
_OUR_HEADERS = ("Authorization", "LEAF", "x-bk-file-size", "x-bk-file-digest", "Cookie")


class Bearer(AuthBase):
    """Set our own header. Being an auth object it keeps ``requests`` from taking one out of ``.netrc``."""

    def __init__(self, credentials: Credentials) -> None:
        self._value = f"Bearer {credentials.id}:{credentials.session_token}"

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


class Session(requests.Session):
    """Carry none of our headers to another host."""

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Take our headers off a request that was redirected to another scheme, host or port."""
        # The parent would look into .netrc for the new host; a redirect must carry no credentials anywhere.
        before, after = (urlsplit(request.url or "") for request in (response.request, prepared_request))
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            for header in _OUR_HEADERS:
                prepared_request.headers.pop(header, None)


class Adapter(HTTPAdapter):
    """Keep what the kernel holds of an upload small, and close idle connections when told to."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools of direct connections."""
        super().init_poolmanager(*args, socket_options=_socket_options(), **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Make the pools of connections through a proxy."""
        return super().proxy_manager_for(proxy, socket_options=_socket_options(), **options)

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


def as_it_comes(answer: requests.Response) -> Iterator[bytes]:
    """Give the body in pieces as they arrive: a plain read waits for a whole piece, however slowly it trickles in."""
    read_some = getattr(answer.raw, "read1", None)  # urllib3 2.1 has it first
    if read_some is None:
        yield from answer.iter_content(_TRICKLE_BYTES)
        return
    while piece := read_some(64 * 1024, decode_content=True):
        yield piece
