"""Keep secrets and presigned URLs out of log records that other libraries write while they work for us."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

# Only records written inside our own requests are touched; the user's other traffic is none of our business.
_active: contextvars.ContextVar[str] = contextvars.ContextVar("branchkey_redacting", default="")
_QUERIES, _ALL = "?", "/?"
_QUERY = re.compile(r"""(https?://[^\s?"'<>]*)\?[^\s"'<>]*""", re.IGNORECASE)


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


def _shown(value: object, marks: str) -> object:
    if isinstance(value, BaseException):
        # Its text quotes what the server sent, and that may be an address.
        return type(value).__name__
    return "<hidden>" if isinstance(value, str) and any(mark in value for mark in marks) else value


class _HidePaths(logging.Filter):
    """Replace request targets in urllib3's debug lines by the word ``<hidden>``."""

    def filter(self, record: logging.LogRecord) -> bool:
        marks = _active.get()
        if marks and isinstance(record.args, tuple):
            record.args = tuple(_shown(value, marks) for value in record.args)
            if record.exc_info:
                record.exc_info = None
        return True


_filter = _HidePaths()


@contextlib.contextmanager
def hidden_targets(*, queries_only: bool = False) -> Iterator[None]:
    """Hide request targets in urllib3's log records while the block runs in this thread.

    Args:
        queries_only: only those with a query. Our API calls have none, but a redirect of theirs may lead to a signed link.
    """
    for name in ("urllib3.connectionpool", "urllib3.util.retry", "urllib3.connection"):
        # addFilter adds the same object only once, so this may run for every request.
        logging.getLogger(name).addFilter(_filter)
    token = _active.set(_QUERIES if queries_only else _ALL)
    try:
        yield
    finally:
        _active.reset(token)
