"""The demo's table: what each leaf reported of each round, printed as soon as a round is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

POLICY = "policy keep_local: it trains on with its own weights and tries again next round"
_SHOWN_DIGITS = 8


@dataclass
class Round:
    """One round as far as it was reported; ``records`` by leaf index."""

    number: int
    records: dict[int, Record] = field(default_factory=dict)

    def _applied(self) -> list[Record]:
        return [record for record in self.records.values() if record.get("status") == "applied"]

    @property
    def federated(self) -> float | None:
        """Accuracy of the federated model; None when no leaf got it."""
        applied = self._applied()
        return float(applied[0]["accuracy"]) if applied else None

    def digests(self) -> set[tuple[str, str]]:
        """Give what the leaves hold that loaded an aggregate: pairs of aggregate and fingerprint of the parameters."""
        return {(str(record["aggregation_id"]), str(record["digest"])) for record in self._applied()}

    @property
    def applied(self) -> int:
        """How many leaves loaded an aggregate."""
        return len(self._applied())

    @property
    def contradicts(self) -> bool:
        """Whether two leaves that loaded the same aggregate hold different parameters."""
        pairs = self.digests()
        return len(pairs) > len({aggregate for aggregate, _ in pairs})

    def verdict(self, leaves: int) -> str:
        """Say whether all leaves hold the same bits."""
        pairs, applied = self.digests(), self.applied
        if self.contradicts:
            return "DIFFERENT BITS"
        if not pairs:
            return "no aggregate"
        if len(pairs) > 1:
            return "different aggregates"
        shown = next(iter(pairs))[1][:_SHOWN_DIGITS]
        return f"{shown} on all {leaves}" if applied == leaves else f"{shown} on {applied} of {leaves}"


class Table:
    """Collect records and print rows in order.

    Args:
        alone: accuracies after each round of the twins that trained alone, one list a leaf.
        timeout_s: longest wait of a leaf for an aggregate, in seconds.
        say: prints a line.
    """

    def __init__(self, alone: Sequence[Sequence[float]], timeout_s: float, say: Callable[[str], None]) -> None:
        self.rounds: dict[int, Round] = {}
        self._alone = alone
        self._leaves = len(alone)
        self._timeout_s = timeout_s
        self._say = say
        self._next = 1

    def header(self) -> None:
        """Print the heading."""
        numbers = "".join(f"{f'leaf {index + 1}':>8}" for index in range(self._leaves))
        width = 8 * self._leaves
        self._say(f"{'':5} |{'trained alone':^{width + 1}}|{'own, not yet averaged':^{width + 1}}|")
        self._say(f"{'round':5} |{numbers} |{numbers} | federated | parameters, bit for bit")

    def add(self, leaf: int, record: Record) -> None:
        """Take in what a leaf reported of a round."""
        number = int(record["round"])
        self.rounds.setdefault(number, Round(number)).records[leaf] = record

    @property
    def newest(self) -> int:
        """Number of the newest round that any leaf has ended."""
        return max(self.rounds, default=0)

    def missing(self, present: Sequence[bool]) -> list[int]:
        """Give the leaves whose word on the next row is still awaited; ``present``: which take part now."""
        row = self.rounds.get(self._next)
        known = row.records if row is not None else {}
        return [
            leaf
            for leaf in range(self._leaves)
            if present[leaf] and leaf not in known and not self._is_past(leaf, self._next)
        ]

    def _is_past(self, leaf: int, number: int) -> bool:
        # A leaf that was started again has left out the rounds between.
        return any(leaf in row.records for later, row in self.rounds.items() if later > number)

    @property
    def next_number(self) -> int:
        """Number of the next row."""
        return self._next

    def print_complete(self, present: Sequence[bool], *, last: bool = False) -> None:
        """Print the rows on which nobody's word is awaited any more; ``last``: all that are left."""
        while self._next <= self.newest and (last or not self.missing(present)):
            row = self.rounds.get(self._next)
            if row is not None:
                self._print(row)
            self._next += 1

    def _print(self, row: Round) -> None:
        alone = [series[row.number - 1] if row.number <= len(series) else None for series in self._alone]
        own = [row.records.get(leaf, {}).get("own_accuracy") for leaf in range(self._leaves)]
        cells = ["".join(f"{_number(value):>8}" for value in values) for values in (alone, own)]
        self._say(f"{row.number:5} |{cells[0]} |{cells[1]} | {_number(row.federated):>9} | {row.verdict(self._leaves)}")
        for leaf, record in sorted(row.records.items()):
            if record.get("status") != "applied":
                self._say(f"      leaf {leaf + 1}: {self._why(record)}; {POLICY}")

    def _why(self, record: Record) -> str:
        status, reason = str(record.get("status")), record.get("reason")
        if status == "timeout":
            # The only one that is ordinary here, and that two leaves tell at a time.
            return f"timeout, no aggregate within {self._timeout_s:g} s"
        return f"{status} ({reason})" if reason else status


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
