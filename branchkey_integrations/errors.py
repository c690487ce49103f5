"""Every error this package raises on purpose, in one tree.

    BranchKeyError                       what, expected, found, fix
    ├── ConfigurationError   ValueError  an option or argument is wrong
    │   └── CredentialsError             credentials are missing, incomplete or malformed
    ├── MissingDependencyError ImportError  an extra is not installed
    ├── WeightingError       ValueError  a weighting that must not leave the site
    ├── ArchiveError         ValueError  a file that is not a sound NPZ of layers
    ├── LayoutError          ValueError  layers that do not fit the model
    ├── MixedModelError                  disk or memory failed in the middle of loading; the model is a mixture
    ├── TransportError                   the request got no usable answer
    │   ├── UnreachableError ConnectionError  nothing was sent: name, route, proxy or refused connection
    │   ├── TLSError                     the certificate or the handshake was refused
    │   ├── DeadlineError    TimeoutError  the other side stalled past the deadline
    │   └── UploadUncertainError         the answer was lost: the update may have been received
    ├── ApiError                         the platform answered with an error (``status``)
    │   ├── AuthenticationError          401 or 403
    │   ├── NotFoundError                404
    │   └── DownloadError                the presigned object could not be had whole
    ├── RunBlockedError                  the run is paused or stopped (``run_status``)
    ├── NotificationError                the notification channel is refused or dead
    ├── AggregateRejectedError           the gate refused an aggregate (``aggregation_id``)
    ├── RoundTimeoutError    TimeoutError  no aggregate came in time
    ├── JournalError                     the file in which rounds are noted cannot be used
    ├── ClientClosedError                the client was closed
    └── SandboxError                     the local branch or its broker could not start

Each carries values, not prose: the message is built from them, is one line long, and names the thing, what was
expected, what was found and what to do. All of them pickle, so that they cross process boundaries intact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LONGEST_FOUND = 300


def _rebuild(cls: type[BranchKeyError], state: dict[str, Any]) -> BranchKeyError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    return error


def _flat(text: str) -> str:
    flat = " ".join(text.split())
    if flat.isprintable():
        return flat
    # A server's words may hold what a terminal obeys, or what turns the direction in which a line is read.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in flat)


def shown(text: str) -> str:
    """Make one printable line of at most 300 characters of what somebody else wrote."""
    # What is far behind the cut need not be looked at; what is cut away may only be white space.
    flat = _flat(text[: 100 * _LONGEST_FOUND])
    return flat if len(flat) <= _LONGEST_FOUND else flat[: _LONGEST_FOUND - 1] + "…"


@dataclass(eq=False)
class BranchKeyError(Exception):
    """Base of all errors of this package.

    Args:
        what: the thing that is wrong, by the name the user knows it by.
        expected: what would have been right.
        found: what was there instead; cut to 300 characters. Never a secret.
        fix: what to do now, as a sentence without its full stop.
    """

    what: str = ""
    expected: str = ""
    found: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = _flat(self.what)
        details = []
        if self.expected:
            details.append(f"expected {shown(self.expected)}")
        if self.found:
            details.append(f"found {shown(self.found)}")
        if details:
            text += ": " + ", ".join(details)
        return f"{text}. {_flat(self.fix)}" if self.fix else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


class ConfigurationError(BranchKeyError, ValueError):
    """An option or argument has a value that cannot work."""


class CredentialsError(ConfigurationError):
    """The leaf's credentials are missing, incomplete or malformed."""


class MissingDependencyError(BranchKeyError, ImportError):
    """A feature needs a package that is not installed; ``fix`` names the extra."""


class WeightingError(BranchKeyError, ValueError):
    """A weighting that is not a finite number above zero; nothing was sent."""


@dataclass(eq=False)
class ArchiveError(BranchKeyError, ValueError):
    """A file is not a sound NPZ archive of layers, or an array cannot be put into one.

    ``quarantined`` is where it was kept, if it was an aggregate and was.
    """

    quarantined: str = ""


class LayoutError(BranchKeyError, ValueError):
    """Layers do not fit the model; nothing was written to it."""


class MixedModelError(BranchKeyError):
    """Disk or memory failed while a checked aggregate was put into the model, which now holds layers of both."""


class TransportError(BranchKeyError):
    """A request got no usable answer."""


class UnreachableError(TransportError, ConnectionError):
    """The host could not be reached; the server cannot have acted on the request."""


class TLSError(TransportError):
    """The certificate or the TLS handshake was refused."""


class DeadlineError(TransportError, TimeoutError):
    """The other side stalled for longer than the deadline."""


@dataclass(eq=False)
class UploadUncertainError(TransportError):
    """The answer to an upload was lost, so the update may have been received.

    It was not sent again: that could count this site twice. ``digest`` is the SHA-256 of the archive as it stood in the
    ``x-bk-file-digest`` header, by which the platform can tell a repeat.
    """

    digest: str = ""


@dataclass(eq=False)
class ApiError(BranchKeyError):
    """The platform answered with an error; ``status`` is its HTTP status (0 when the answer made no sense)."""

    status: int = 0


class AuthenticationError(ApiError):
    """401 or 403: the credentials were refused."""


class NotFoundError(ApiError):
    """404: the branch, file or aggregate is unknown."""


class DownloadError(ApiError):
    """The presigned object could not be had whole: expired, truncated, oversized or not an archive."""


@dataclass(eq=False)
class RunBlockedError(BranchKeyError):
    """The run does not accept updates now; ``run_status`` is what the platform said (``pause``, ``stop``…)."""

    run_status: str = ""


class NotificationError(BranchKeyError):
    """The notification channel (AMQP or WebSocket) was refused or has died for good."""


@dataclass(eq=False)
class AggregateRejectedError(BranchKeyError):
    """The gate refused an aggregate; the model is as it was. ``quarantined`` is where the file was kept, if it was."""

    aggregation_id: str = ""
    quarantined: str = ""


class RoundTimeoutError(BranchKeyError, TimeoutError):
    """No aggregate newer than the update came within the time allowed."""


class JournalError(BranchKeyError):
    """The file in which rounds are noted cannot be used; nothing was sent."""


class ClientClosedError(BranchKeyError):
    """The client was closed before or during the call."""


class SandboxError(BranchKeyError):
    """The local branch, or the broker it was asked to use, could not start or went away."""
