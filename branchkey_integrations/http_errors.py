"""The one place where errors of requests, urllib3 and the platform become ours.

Messages are built from types, system words and host names, never from the foreign error's text: that text may hold a
presigned URL or a proxy password.
"""

from __future__ import annotations

import email.utils
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import requests
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from branchkey_integrations.errors import (
    ApiError,
    AuthenticationError,
    BranchKeyError,
    ConfigurationError,
    DeadlineError,
    DownloadError,
    NotFoundError,
    TLSError,
    TransportError,
    UnreachableError,
    shown,
)
from branchkey_integrations.http_session import BadRedirectError
from branchkey_integrations.redaction import host_of, without_queries


def json_object(content: bytes) -> dict[str, Any] | None:
    """Decode a JSON object; ``{}`` for an empty body, None for anything else."""
    if not content.strip():
        return {}
    try:
        decoded = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def retry_after_s(value: str | None, date: str | None = None) -> float | None:
    """Read ``Retry-After`` as seconds from now: a number or an HTTP date (RFC 9110, section 10.2.3).

    Args:
        value: of the header.
        date: of the answer's ``Date`` header; a moment is counted from it, so that a clock that is wrong here does no harm.
    """
    if not value:
        return None
    seconds = whole_number(value.strip())
    if seconds is not None:
        return float(seconds)
    moment, now = _timestamp(value), _timestamp(date or "")
    if moment is None:
        return None
    return max(0.0, moment - (time.time() if now is None else now))


def _timestamp(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def whole_number(text: str) -> int | None:
    """Read the digits of a header; other signs that Unicode counts as digits (``²``) are none, and 18 are plenty."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def from_request(
    action: str,
    error: requests.RequestException | HTTPError,
    host: str,
    timeout_s: float,
    proxies: Mapping[str, str] | None,
) -> tuple[BranchKeyError, bool]:
    """Turn an error of requests or urllib3 into ours.

    Returns:
        Our error, and whether the request may have reached the server.
    """
    if isinstance(error, requests.exceptions.SSLError):
        found = _tls_reason(error)
        clock = "not yet valid" in found or "expired" in found
        return (
            TLSError(
                what=action,
                expected=f"a certificate of {host} that can be verified",
                found=found,
                fix="Nothing there speaks TLS: pass an address that begins with http://, or another port"
                if "WRONG_VERSION_NUMBER" in found
                else "Check this machine's clock; if it is right, the certificate is not"
                if clock
                else "Pass ssl=<path of your CA bundle>, or check the host name",
            ),
            False,
        )
    if isinstance(error, requests.exceptions.ProxyError):
        proxy = ", ".join(sorted({host_of(value) for value in (proxies or {}).values()})) or "that of the environment"
        return (
            UnreachableError(
                what=action,
                expected=f"the proxy ({proxy}) to reach {host}",
                found=_reason(error),
                fix="Check proxies= or HTTP_PROXY, HTTPS_PROXY and NO_PROXY",
            ),
            False,
        )
    if isinstance(error, (BadRedirectError, requests.exceptions.TooManyRedirects)):
        return (
            TransportError(
                what=action,
                expected=f"an answer from {host}",
                found=error.found if isinstance(error, BadRedirectError) else "redirects without end",
                fix="Something between here and the platform may answer in its place (proxy, login page)",
            ),
            True,
        )
    if _never_connected(error):
        return (
            UnreachableError(
                what=action,
                expected=f"a connection to {host}",
                found=_reason(error),
                fix="Check host=, the network and the proxy settings",
            ),
            False,
        )
    if isinstance(error, requests.exceptions.ReadTimeout) or _timed_out(error):
        return (
            DeadlineError(
                what=action,
                expected=f"{host} to move on within {timeout_s:g} s",
                found="a stall",
                fix="Try again, or pass a longer timeout_s",
            ),
            True,
        )
    if isinstance(
        error,
        (
            requests.exceptions.ConnectionError,
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
            HTTPError,
        ),
    ):
        return (
            TransportError(
                what=action,
                expected=f"a whole answer from {host}",
                found=_reason(error),
                fix="The connection broke; try again",
            ),
            True,
        )
    return (
        ConfigurationError(
            what=action,
            expected=f"a request that can be sent to {host}",
            found=type(error).__name__,
            fix="Check host= and proxies=",
        ),
        False,
    )


_MEDIA_TYPE = re.compile(r"[\w.+-]{1,60}/[\w.+-]{1,60}|no content type", re.ASCII)
_BY_STATUS: dict[int, tuple[type[ApiError], str]] = {
    401: (AuthenticationError, "Check the credentials: the session token may have been replaced"),
    403: (AuthenticationError, "Check that these credentials belong to this branch"),
    404: (NotFoundError, "Check the ids and host="),
    413: (ApiError, "The update is larger than the platform takes; federate fewer parameters"),
}


def from_answer(action: str, answer: requests.Response, content: bytes, host: str, secret: str) -> ApiError:
    """Turn an error answer of the platform into ours: its ``error`` text if it has one, its kind and size if not."""
    status = answer.status_code
    decoded = json_object(content) or {}
    message = decoded.get("error") or decoded.get("message") or decoded.get("detail")
    if 300 <= status < 400:
        message = f"a redirect to {host_of(answer.headers.get('Location', ''))}"
    elif not isinstance(message, str) or not message:
        message = f"{_described(answer, content)} that name no error"
    cls, fix = _BY_STATUS.get(status, (ApiError, "Check host= and the state of the platform"))
    # Made short only now: half a token would not be recognised.
    found = shown(without_queries(f"{status}: {message}".replace(secret, "***")))
    return cls(what=action, expected=f"success from {host}", found=found, fix=fix, status=status)


def not_json(action: str, answer: requests.Response, content: bytes, host: str, secret: str) -> ApiError:
    """Describe a success that is not the JSON object it should be (a proxy's page, say)."""
    return ApiError(
        what=action,
        expected=f"a JSON object from {host}",
        found=_described(answer, content).replace(secret, "***"),
        fix="Something between here and the platform may answer in its place (proxy, login page)",
        status=answer.status_code,
    )


def bad_object(action: str, answer: requests.Response, host: str) -> DownloadError:
    """Describe a presigned object that was not handed out."""
    status = answer.status_code
    expired = ", the link is expired or access is denied" if status in (400, 401, 403, 410) else ""
    return DownloadError(
        what=action,
        expected=f"status 200 from {host}",
        found=f"{status}{expired}",
        fix="Ask for the aggregate again; a new link is made for each request",
        status=status,
    )


def _described(answer: requests.Response, content: bytes) -> str:
    kind = answer.headers.get("Content-Type", "no content type").split(";")[0].strip()
    # Whatever else stands there is not for an error message.
    return f"{len(content)} bytes of {kind if _MEDIA_TYPE.fullmatch(kind) else 'an unreadable content type'}"


def _links(error: BaseException) -> Iterator[BaseException]:
    """Walk causes, contexts and the errors that urllib3 and requests keep in ``args`` and ``reason``."""
    queue: list[Any] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue += [getattr(current, "reason", None), current.__cause__, current.__context__, *current.args]


def _never_connected(error: BaseException) -> bool:
    return any(isinstance(link, (NewConnectionError, ConnectTimeoutError)) for link in _links(error))


def _timed_out(error: BaseException) -> bool:
    # Until Python 3.10 socket.timeout is no TimeoutError.
    return any(
        isinstance(link, (TimeoutError, socket.timeout)) or "Timeout" in type(link).__name__ for link in _links(error)
    )


def _reason(error: BaseException) -> str:
    links = list(_links(error))
    for link in links:
        if isinstance(link, OSError) and link.strerror and not isinstance(link, requests.RequestException):
            return link.strerror
    if _timed_out(error):
        return "no answer in time"
    return type(links[-1]).__name__


def _tls_reason(error: BaseException) -> str:
    for link in _links(error):
        message = getattr(link, "verify_message", "")
        if message:
            return str(message)
    return _reason(error)
