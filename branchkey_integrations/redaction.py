"""Keep secrets and presigned URLs out of log records that other libraries write while they work for us."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

# Only records written inside our own requests are touched; the user's other traffic is none of our business.
# The value is the one address that may be shown, empty for none; None where we are not at work.
_active: contextvars.ContextVar[str | None] = contextvars.ContextVar("branchkey_redacting", default=None)
_VERSION = re.compile(r"HTTP/[\d.?]+")
_QUERY = re.compile(r"""(https?://[^\s?"'<>]*)\?[^\s"'<>]*""", re.IGNORECASE)


class Secret(str):
    """Be a string that does not show: tracebacks with local variables, ``vars()`` and ``asdict()`` print ``'***'``.

    Whoever formats it (``str``, ``%s``, f-strings, JSON) or adds to it gets the plain text; a slice of it is a secret too.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __getitem__(self, key: Any) -> Secret:
        # Tools that print local variables cut long ones first, and print the repr of what they have cut.
        return Secret(super().__getitem__(key))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("A secret does not pickle. Give str() of it where it must go, and mind where that is.")


def hidden_values(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a mapping of proxies, whose URLs may hold a password, so that its repr shows none of them."""
    return {key: Secret(value) if isinstance(value, str) else value for key, value in mapping.items()}


def host_of(url: str) -> str:
    """Give host and port of a URL, without user, password, path and query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}" if parts.hostname else "an unnamed host"
    except ValueError:
        return "an unreadable URL"


def without_queries(text: str) -> str:
    """Hide the queries of all URLs in a text, since they may hold a signature."""
    return _QUERY.sub(r"\1?<hidden>", text)


def _shown(value: object, but: str) -> object:
    if isinstance(value, BaseException):
        # Its text quotes what the server sent, and that may be an address.
        return type(value).__name__
    if not isinstance(value, str) or not ("/" in value or "?" in value) or _VERSION.fullmatch(value):
        return value
    return value if but.endswith(value) else "<hidden>"


class _HidePaths(logging.Filter):
    """Replace request targets in urllib3's debug lines by the word ``<hidden>``."""

    def filter(self, record: logging.LogRecord) -> bool:
        but = _active.get()
        if but is not None and isinstance(record.args, tuple):
            record.args = tuple(_shown(value, but) for value in record.args)
            if record.exc_info:
                record.exc_info = None
        return True


_filter = _HidePaths()


@contextlib.contextmanager
def hidden_targets(*, but: str = "") -> Iterator[None]:
    """Hide request targets in urllib3's log records while the block runs in this thread.

    Args:
        but: the address that may be shown, whole or from its path on. A redirect of it may lead to a signed link, or to a
            path into which the server has put what we sent.
    """
    for name in ("urllib3.connectionpool", "urllib3.util.retry", "urllib3.connection"):
        # addFilter adds the same object only once, so this may run for every request.
        logging.getLogger(name).addFilter(_filter)
    token = _active.set(but)
    try:
        yield
    finally:
        _active.reset(token)
