"""Faults on purpose: which kinds there are, how likely each is, and dice that fall the same way each time.

    with Sandbox(leaves=3, chaos=Chaos.mix(0.2, seed=7)) as sandbox:
        ...
    print(sandbox.chaos_report)        # {"lost": 4, "refused": 11, ...}

Each decision hangs on the seed, the kind, the leaf and how often this leaf has come to such a moment, and on nothing else: not on
the clock, and not on which thread came first.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from dataclasses import dataclass, fields

from branchkey_integrations.config import check_seconds
from branchkey_integrations.errors import ConfigurationError

#: What each kind does, in the words of the table that the command line prints.
KINDS = {
    "lost": "notification lost, and the WebSocket with it",
    "delayed": "notification sent late",
    "duplicated": "notification sent twice, the second time late",
    "reordered": "notification overtaken by the next one",
    "refused": "request refused with a 4xx or 5xx, nothing done",
    "unanswered": "upload taken, then an error or a reset instead of the answer",
    "cut_answers": "answer broken off",
    "cut_downloads": "aggregate broken off on the wire",
    "corrupt": "aggregate changed on the wire, the stored one is sound",
    "nan": "aggregate with a NaN in it, for all leaves",
    "broker_kills": "private broker killed and started again",
}

#: How many parts of the level of :meth:`Chaos.mix` each kind gets.
_SHARES = {
    "lost": 0.5,
    "delayed": 1.0,
    "duplicated": 1.0,
    "reordered": 0.5,
    "refused": 0.5,
    "unanswered": 0.5,
    "cut_answers": 0.25,
    "cut_downloads": 0.5,
    "corrupt": 0.25,
    "nan": 0.1,
    "broker_kills": 0.05,
}


@dataclass(frozen=True)
class Chaos:
    """Say how likely each kind of fault is, from 0 (never) to 1 (each time).

    All can be survived by a correct leaf: the newest aggregate is sent again to a leaf that connects anew, a refusal of an upload
    says that nothing was taken, and the stored aggregate is sound while its copies on the wire are not. A NaN aggregate is to be
    refused; the next one is good again.

    Args:
        seed: of all decisions.
        lost: a notification does not arrive and its WebSocket is reset. Over AMQP nothing is lost, since queues are durable;
            see ``broker_kills``.
        delayed: a notification comes late.
        duplicated: a notification comes twice, the second time late and perhaps behind a newer one.
        reordered: a notification is held back until the next one has gone out, or for ``delay_s``.
        refused: a request gets a 4xx or 5xx before anything is done. Uploads and metrics get those that say so: 408, 425, 429
            or 503; all others also get 500, 502 and 504, and the object store's 403.
        unanswered: an upload is taken and counted, and then the answer is a 500, 502 or 504, or a reset.
        cut_answers: the answer to an API call ends in the middle, after the work was done.
        cut_downloads: an aggregate's bytes end in the middle.
        corrupt: some bytes of an aggregate are changed on the wire. The whole aggregate is in memory meanwhile.
        nan: one value of an aggregate is NaN, in the stored file and so for all leaves.
        broker_kills: the private broker is killed (SIGKILL) behind a notification, and started again.
        delay_s: longest delay of a notification, in seconds.

    Raises:
        ConfigurationError: a probability is no number from 0 to 1, the seed no whole number, the delay no number of seconds.
    """

    seed: int = 0
    lost: float = 0.0
    delayed: float = 0.0
    duplicated: float = 0.0
    reordered: float = 0.0
    refused: float = 0.0
    unanswered: float = 0.0
    cut_answers: float = 0.0
    cut_downloads: float = 0.0
    corrupt: float = 0.0
    nan: float = 0.0
    broker_kills: float = 0.0
    delay_s: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigurationError(
                what="chaos seed", expected="a whole number", found=repr(self.seed), fix="Pass for example seed=0"
            )
        for name in KINDS:
            _check_probability(f"chaos {name}", getattr(self, name))
        check_seconds("chaos delay_s", self.delay_s, zero=True)

    @classmethod
    def mix(cls, level: float, seed: int = 0, *, delay_s: float = 0.2) -> Chaos:
        """Mix all kinds as bad networks do: ``level`` 0.05 is a poor one, 0.2 a hostile one, 1 the most.

        Args:
            level: from 0 to 1; each kind gets its share of it, from a twentieth (killed brokers) to all of it (late and double
                notifications).
        """
        _check_probability("chaos level", level)
        return cls(seed=seed, delay_s=delay_s, **{kind: level * share for kind, share in _SHARES.items()})

    def probability(self, kind: str) -> float:
        """Give the probability of a kind by its name."""
        return float(getattr(self, kind))


class Dice:
    """Decide, and keep count of what was decided. Safe to share among threads."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self._lock = threading.Lock()
        self._thrown: Counter[tuple[str, str]] = Counter()
        self._chances: Counter[str] = Counter()
        self._done: Counter[str] = Counter()

    def throw(self, kind: str, who: str = "") -> float | None:
        """Decide whether a fault happens now; None when it does not, else a number below 1 that says how it happens.

        Args:
            kind: one of :data:`KINDS`.
            who: whose moment this is; each has a sequence of its own, so that the pace of others changes nothing.
        """
        with self._lock:
            self._thrown[kind, who] += 1
            self._chances[kind] += 1
            hit, how = _fall(self.chaos.seed, kind, who, self._thrown[kind, who])
            if hit >= self.chaos.probability(kind):
                return None
            self._done[kind] += 1
            return how

    @property
    def done(self) -> dict[str, int]:
        """How many faults of each kind there were."""
        with self._lock:
            return {kind: self._done[kind] for kind in KINDS}

    @property
    def chances(self) -> dict[str, int]:
        """How many moments there were in which each kind could have happened."""
        with self._lock:
            return {kind: self._chances[kind] for kind in KINDS}


def _fall(seed: int, kind: str, who: str, number: int) -> tuple[float, float]:
    """Give two numbers from 0 (included) to 1 (not) for the ``number``-th throw; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{kind}/{who}/{number}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "big") >> 11 for half in (digest[:8], digest[8:]))
    return first / 2.0**53, second / 2.0**53


def _check_probability(name: str, value: object) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0.0 <= float(value) <= 1.0:  # type: ignore[arg-type]
        raise ConfigurationError(
            what=name, expected="a probability from 0 to 1", found=repr(value), fix="Pass for example 0.2"
        )


def table(dice: Dice) -> list[str]:
    """Word what was done, a line each kind, for people."""
    done, chances = dice.done, dice.chances
    return [f"{kind:<14}{done[kind]:>7} of {chances[kind]:>7}   {meaning}" for kind, meaning in KINDS.items()]


assert set(KINDS) == set(_SHARES) == {field.name for field in fields(Chaos)} - {"seed", "delay_s"}  # noqa: S101 - three lists of one thing
