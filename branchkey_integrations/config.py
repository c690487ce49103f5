"""Frozen settings that several modules share, checked when they are made."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from typing import Union
from urllib.parse import urlsplit

from branchkey_integrations.errors import ConfigurationError

DEFAULT_HOST = "https://app.branchkey.com"
AMQP_PORT = 5672
AMQPS_PORT = 5671

#: ``True`` (system trust), ``False`` (no verification) or the path of a CA bundle.
Verify = Union[bool, str]


def check_seconds(name: str, value: object, *, optional: bool = False, zero: bool = False) -> None:
    """Demand a finite number of seconds above zero (or None, or zero, where allowed)."""
    if value is None and optional:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        expected = "a number of seconds above zero" + (" or None" if optional else "")
        raise ConfigurationError(what=name, expected=expected, found=repr(value), fix=f"Pass for example {name}=30")


@dataclass(frozen=True)
class Endpoint:
    """Say where the platform is: scheme, host, port and an optional path in front of ``/api/v1``."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Parse a base URL such as ``https://app.branchkey.com`` or ``http://127.0.0.1:8000/``."""
        problem = ConfigurationError(
            what="host",
            expected="a URL such as https://app.branchkey.com",
            found=type(url).__name__,
            fix="Pass scheme and host, no credentials, query or fragment",
        )
        if not isinstance(url, str):
            raise problem
        url = url.strip()
        if any(character.isspace() or not character.isprintable() for character in url):
            # urlsplit would drop some of these without a word, and lead to another host than the one written.
            problem.found = "a URL with blanks or control characters in it"
            raise problem
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            problem.found = "a URL that does not parse"
            raise problem from None
        if parts.username is not None or parts.password is not None:
            problem.found = "a URL with user or password in it"
            raise problem
        if parts.query or parts.fragment:
            problem.found = "a URL with a query or fragment"  # which may hold a secret, so it is not shown
            raise problem
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            problem.found = repr(url)
            raise problem
        default = 443 if parts.scheme == "https" else 80
        return cls(parts.scheme, parts.hostname, default if port is None else port, parts.path.rstrip("/"))

    @property
    def netloc(self) -> str:
        """Host and port as they stand in a URL; the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def url(self, path: str = "") -> str:
        """Give the absolute HTTP URL of a path that starts with a slash."""
        return f"{self.scheme}://{self.netloc}{self.path}{path}"

    def websocket_url(self, path: str) -> str:
        """Give the same place in the ``ws``/``wss`` scheme; TLS follows the scheme, never a flag."""
        return f"{'wss' if self.scheme == 'https' else 'ws'}://{self.netloc}{self.path}{path}"


def check_verify(value: object) -> Verify:
    """Check the ``ssl`` option: True, False or the path of a readable CA bundle."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str) and os.path.exists(path):
            return path
        raise ConfigurationError(
            what="ssl",
            expected="the path of a CA bundle",
            found=f"no file {path!r}",
            fix="Check the path, or pass ssl=True",
        )
    raise ConfigurationError(
        what="ssl",
        expected="True, False or the path of a CA bundle",
        found=repr(value),
        fix="Pass ssl=True for system trust",
    )


@dataclass(frozen=True)
class RetryPolicy:
    """Say how often and how patiently a request is repeated.

    A request is repeated only when the server cannot have acted on it, or when repeating it is harmless (GET), or when the
    server itself said that it did not take it (429, 503). Delays double from ``backoff_s`` up to ``backoff_max_s``, with
    up to ``jitter`` of each taken off at random; ``Retry-After`` is obeyed while it fits into ``budget_s``.

    Args:
        attempts: tries in all, the first included; 1 means no repeat.
        backoff_s: delay before the second try, in seconds.
        backoff_max_s: longest single delay, in seconds, ``Retry-After`` aside.
        budget_s: longest time spent in delays of one call, in seconds.
        jitter: part of a delay that is random, 0 to 1.
    """

    attempts: int = 4
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    budget_s: float = 120.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise ConfigurationError(
                what="retry attempts",
                expected="a whole number from 1",
                found=repr(self.attempts),
                fix="Pass 1 for no repeat",
            )
        for name in ("backoff_s", "backoff_max_s", "budget_s"):
            check_seconds(f"retry {name}", getattr(self, name), zero=True)
        if not isinstance(self.jitter, (int, float)) or isinstance(self.jitter, bool) or not 0 <= self.jitter <= 1:
            raise ConfigurationError(
                what="retry jitter",
                expected="a number from 0 to 1",
                found=repr(self.jitter),
                fix="Pass for example 0.5",
            )

    def delay_s(self, failures: int, spent_s: float, retry_after_s: float | None = None) -> float | None:
        """Give the delay after the ``failures``-th failure, or None when it is time to give up.

        Args:
            failures: tries that have failed so far, from 1.
            spent_s: seconds already spent in delays of this call.
            retry_after_s: what the server asked for, if it did.
        """
        if failures >= self.attempts:
            return None
        if retry_after_s is not None:
            delay = max(0.0, retry_after_s)
        else:
            # The exponent is capped because 2**1024 overflows a float.
            delay = min(self.backoff_max_s, self.backoff_s * 2.0 ** min(failures - 1, 60))
            delay *= 1.0 - self.jitter * random.random()
        return delay if spent_s + delay <= self.budget_s else None


def check_port(name: str, value: object) -> None:
    """Demand a port number.

    Raises:
        ConfigurationError: names the option.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        raise ConfigurationError(
            what=name, expected="a port from 1 to 65535", found=repr(value), fix=f"Pass {name}={AMQP_PORT}"
        )


def check_retry(value: object) -> None:
    """Check the ``retry`` option: a policy or None."""
    if value is not None and not isinstance(value, RetryPolicy):
        raise ConfigurationError(
            what="retry",
            expected="a RetryPolicy or None",
            found=type(value).__name__,
            fix="Pass RetryPolicy(attempts=4)",
        )
