"""Decide whether packing an update harder is worth the processor's time on the link that it goes over."""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

from branchkey_integrations.errors import ConfigurationError

DEFLATE, STORE, AUTO = "deflate", "store", "auto"
#: Below this an upload's time is that of the question and the answer, and says nothing about the link.
MEASURABLE_BYTES = 1024 * 1024
#: Uploads whose median speed is taken for the link's.
_REMEMBERED = 5
#: Storing has to save this much more than it costs: speeds swing by as much, and deflate is what the platform documents.
_MARGIN = 1.2


class Choice(NamedTuple):
    """How an update is packed, and why, as a clause for the user."""

    compression: str
    why: str

    def __str__(self) -> str:
        return f"{self.compression}: {self.why}" if self.why else self.compression


class Sample(NamedTuple):
    """What deflating a piece of the update came to.

    ``ratio`` is its packed size by its raw one, ``seconds_per_byte`` the time for a raw byte.
    """

    ratio: float
    seconds_per_byte: float


def check_compression(value: str) -> str:
    """Check the option.

    Raises:
        ConfigurationError: it is none of the three.
    """
    if value not in (DEFLATE, STORE, AUTO):
        raise ConfigurationError(
            what="compression", expected='"deflate", "store" or "auto"', found=repr(value), fix='Leave it at "deflate"'
        )
    return value


class Link:
    """Remember how fast the last uploads went."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, size_bytes: int, seconds: float) -> None:
        """Take down an upload that was answered; small ones do not count."""
        if size_bytes >= MEASURABLE_BYTES and seconds > 0:
            self._rates.append(size_bytes / seconds)

    @property
    def bytes_per_s(self) -> float | None:
        """Median speed of the last uploads; None before the first."""
        return statistics.median(self._rates) if self._rates else None

    def choose(self, raw_bytes: int, sample: Sample) -> Choice:
        """Choose for an update of ``raw_bytes``: deflate, unless the bytes it saves take less time than saving them does."""
        if raw_bytes < MEASURABLE_BYTES:
            return Choice(DEFLATE, "too small for it to matter")
        rate = self.bytes_per_s
        if rate is None:
            return Choice(DEFLATE, "no upload has shown yet how fast the link is")
        cost_s = raw_bytes * sample.seconds_per_byte
        saved_s = raw_bytes * max(0.0, 1 - sample.ratio) / rate
        about = f"at {rate * 8 / 1e6:.0f} Mbit/s deflating takes {cost_s:.2g} s and saves {saved_s:.2g} s"
        return Choice(STORE if cost_s > saved_s * _MARGIN else DEFLATE, about)
