"""Pick the proxy of a WebSocket as ``requests`` picks that of an HTTP call, and pass through it."""

from __future__ import annotations

import base64
import socket
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

import requests.utils

from branchkey_integrations.config import Endpoint
from branchkey_integrations.errors import ConfigurationError, UnreachableError

_LONGEST_ANSWER_BYTES = 64 * 1024


def proxy_for(endpoint: Endpoint, proxies: Mapping[str, str] | None) -> str | None:
    """Give the URL of the proxy for ``endpoint``, or None for a direct way.

    The policy is that of ``requests``, so that ticket and socket take the same road: the given mapping first, the
    environment for what it leaves open, and ``NO_PROXY`` for the environment's part alone.
    """
    url = endpoint.url("/")
    merged = dict(proxies or {})
    for scheme, proxy in requests.utils.get_environ_proxies(url, no_proxy=merged.pop("no_proxy", None)).items():
        merged.setdefault(scheme, proxy)
    chosen: str | None = requests.utils.select_proxy(url, merged)
    if not chosen:
        return None
    # As in requests: a proxy without a scheme is an HTTP one.
    return chosen if "://" in chosen else f"http://{chosen}"


def tunnel(sock: socket.socket, proxy: SplitResult, endpoint: Endpoint) -> None:
    """Ask an HTTP proxy, over a socket that has a timeout, to connect through to ``endpoint``.

    Raises:
        UnreachableError: the proxy refused.
        OSError: the proxy hung up or stalled.
    """
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    target = f"{host}:{endpoint.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(pair.encode()).decode())
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        # Nothing of the tunnel's own can be swallowed here: behind it all is silent until we speak.
        piece = sock.recv(4096)
        if not piece or len(answer) > _LONGEST_ANSWER_BYTES:
            raise ConnectionError("the proxy hung up")
        answer += piece
    status = answer.split(b"\r\n", 1)[0].decode("ascii", "replace").split(" ")
    if len(status) < 2 or not status[1].startswith("2"):
        raise UnreachableError(
            what=f"proxy {proxy.hostname}:{proxy.port}",
            expected=f"a tunnel to {target}",
            found="status " + (status[1] if len(status) > 1 else "missing"),
            fix="Check the proxy's address and login",
        )


def split(proxy: str) -> SplitResult:
    """Split a proxy URL.

    Raises:
        ConfigurationError: it has no host, or a port that is none.
    """
    try:
        parts = urlsplit(proxy)
        if parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    # The URL is not shown: it may carry a password.
    raise ConfigurationError(
        what="proxies", expected="a URL such as http://proxy.example.com:8080", found="another form", fix="Correct it"
    )
