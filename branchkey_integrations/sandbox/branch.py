"""The state of one branch: who belongs to it, what the run is doing, whose update counts. No files, no network, no clock.

How the platform itself decides these things is not known; the choices made here are the ones that keep every official
client and a strict account of rounds content: one update a leaf and round, the newest one counts, a repeat counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from branchkey_integrations.errors import LayoutError, RunBlockedError, SandboxError

START, PAUSE, STOP = "start", "pause", "stop"

#: Shape and dtype name of each layer.
Layers = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Update:
    """What one leaf uploaded, without the values: enough to count it, to compare it, and to find its file."""

    file_id: str
    leaf_id: str
    digest: str
    weighting: float
    layers: Layers
    #: What the leaf calls it, in the metadata's ``custom.update_id``; empty from other clients.
    update_id: str = ""

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Update:
        """Make an update of what ``asdict`` and JSON turned it into."""
        layers = tuple((tuple(shape), str(dtype)) for shape, dtype in plain["layers"])
        name = str(plain.get("update_id", ""))
        return cls(plain["file_id"], plain["leaf_id"], plain["digest"], float(plain["weighting"]), layers, name)


@dataclass(frozen=True)
class ClosedRound:
    """A round whose quorum is complete: its number from 1, the id its aggregate will have, the updates in leaf order."""

    number: int
    aggregation_id: str
    updates: tuple[Update, ...]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ClosedRound:
        """Make a closed round of what ``asdict`` and JSON turned it into."""
        updates = tuple(Update.from_plain(update) for update in plain["updates"])
        return cls(plain["number"], plain["aggregation_id"], updates)


@dataclass(frozen=True)
class Receipt:
    """Answer to an update: the id it is known by, whether it had been counted before, the round it completed."""

    file_id: str
    repeated: bool = False
    closed: ClosedRound | None = None


class Branch:
    """Keep the leaves, the run and the round of one branch. Not thread-safe: its owner holds a lock.

    Args:
        quorum: number of leaves whose updates complete a round; None means all leaves there are.
        new_id: makes the id of the next aggregate; the ids must be URL-safe, since clients do not quote them.
    """

    def __init__(self, quorum: int | None, new_id: Callable[[], str]) -> None:
        self._quorum = quorum
        self._new_id = new_id
        self.leaf_ids: list[str] = []
        self.run_status = START
        self.run_number = 1
        self.rounds = 0
        self._pending: dict[str, Update] = {}
        self._closing: dict[str, ClosedRound] = {}
        # The update of the round that closed last, until its leaf asks for the aggregate or sends something else:
        # so long, the same bytes again are a repeat after a lost answer and no new round.
        self._counted: dict[str, tuple[Update, str]] = {}
        self._unfetched: dict[str, str] = {}
        self._told: dict[str, str] = {}

    @property
    def quorum(self) -> int:
        """Number of leaves whose updates complete a round."""
        return max(1, len(self.leaf_ids)) if self._quorum is None else self._quorum

    @property
    def pending(self) -> tuple[Update, ...]:
        """The updates of the open round, in leaf order."""
        return tuple(self._pending[leaf_id] for leaf_id in self.leaf_ids if leaf_id in self._pending)

    @property
    def closing(self) -> tuple[ClosedRound, ...]:
        """The complete rounds whose aggregate is not there yet, oldest first."""
        return tuple(self._closing.values())

    def add_leaf(self, leaf_id: str) -> None:
        """Take a leaf into the branch; the run status counts as known to it when it is ``start``."""
        self.leaf_ids.append(leaf_id)
        self._told[leaf_id] = START

    # --- the run -------------------------------------------------------------------------------------------------

    def set_status(self, status: str) -> None:
        """Start, pause or stop the run. A start after a stop is a new run: number raised, open round and news dropped."""
        if status == START and self.run_status == STOP:
            self.run_number += 1
            self._pending.clear()
            self._counted.clear()
            self._unfetched.clear()
        self.run_status = status

    def require_started(self) -> None:
        """Demand that the run accepts updates.

        Raises:
            RunBlockedError: it is paused or stopped.
        """
        if self.run_status != START:
            raise RunBlockedError(
                what="run",
                expected=f"status {START!r}",
                found=f"{self.run_status!r}",
                fix="Wait until the run is started",
                run_status=self.run_status,
            )

    # --- the round -----------------------------------------------------------------------------------------------

    def repeat_of(self, leaf_id: str, digest: str, update_id: str = "") -> Update | None:
        """Find the update that ``leaf_id`` has already been counted with, if its digest or its name is the same."""
        candidates = [self._pending.get(leaf_id)]
        if leaf_id not in self._pending and leaf_id in self._counted:
            candidates.append(self._counted[leaf_id][0])
        for update in candidates:
            if update is not None and (update.digest == digest or (update_id and update.update_id == update_id)):
                return update
        return None

    def submit(self, update: Update) -> Receipt:
        """Count an update, in place of an earlier one of this leaf in this round.

        Raises:
            RunBlockedError: the run is paused or stopped.
            LayoutError: it does not fit what another leaf uploaded in this round; nothing is changed by it.
        """
        self.require_started()
        known = self.repeat_of(update.leaf_id, update.digest, update.update_id)
        if known is not None:
            return Receipt(known.file_id, repeated=True)
        for other in self._pending.values():
            if other.leaf_id != update.leaf_id:
                require_same_layers(other, update)
        self._pending[update.leaf_id] = update
        return Receipt(update.file_id, closed=self.close_if_complete())

    def close_if_complete(self) -> ClosedRound | None:
        """Close the round if enough leaves have uploaded."""
        if not self._pending or len(self._pending) < self.quorum:
            return None
        self.rounds += 1
        closed = ClosedRound(self.rounds, self._new_id(), self.pending)
        self._closing[closed.aggregation_id] = closed
        for update in closed.updates:
            self._counted[update.leaf_id] = (update, closed.aggregation_id)
        self._pending.clear()
        return closed

    def finish(self, aggregation_id: str) -> None:
        """Note that the aggregate of a closed round is stored."""
        self._closing.pop(aggregation_id, None)

    # --- what each leaf knows --------------------------------------------------------------------------------------

    def announce(self, aggregation_id: str) -> None:
        """Note that an aggregate is news to every leaf; it replaces older news."""
        self._unfetched = dict.fromkeys(self.leaf_ids, aggregation_id)

    def fetched(self, leaf_id: str, aggregation_id: str) -> None:
        """Note that a leaf has asked for an aggregate: it is no news any more, and the round behind it is over for it."""
        if self._unfetched.get(leaf_id) == aggregation_id:
            del self._unfetched[leaf_id]
        if leaf_id in self._counted and self._counted[leaf_id][1] == aggregation_id:
            del self._counted[leaf_id]

    @property
    def newest_unfetched(self) -> str | None:
        """The aggregate announced last, if some leaf has not asked for it."""
        return next(iter(self._unfetched.values()), None)

    def told_status(self, leaf_id: str) -> None:
        """Note that a leaf has been told the present run status."""
        self._told[leaf_id] = self.run_status

    def news(self, leaf_id: str) -> tuple[str | None, str | None]:
        """Give what a leaf that connects now must hear: the run status if it knows another, the aggregate it lacks."""
        status = self.run_status if self._told.get(leaf_id, START) != self.run_status else None
        return status, self._unfetched.get(leaf_id)

    # --- to and from plain types -------------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """Give the whole state as what JSON can hold."""
        return {
            "run_status": self.run_status,
            "run_number": self.run_number,
            "rounds": self.rounds,
            "pending": [asdict(update) for update in self._pending.values()],
            "closing": [asdict(closed) for closed in self._closing.values()],
            "counted": [[asdict(update), aggregation_id] for update, aggregation_id in self._counted.values()],
            "unfetched": self._unfetched,
            "told": self._told,
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`to_plain` gave; the leaves must have been added before.

        Raises:
            SandboxError: it is not such a state.
        """
        try:
            self.run_status = str(plain["run_status"])
            self.run_number = int(plain["run_number"])
            self.rounds = int(plain["rounds"])
            updates = [Update.from_plain(update) for update in plain["pending"]]
            self._pending = {update.leaf_id: update for update in updates}
            rounds = [ClosedRound.from_plain(closed) for closed in plain["closing"]]
            self._closing = {closed.aggregation_id: closed for closed in rounds}
            counted = [(Update.from_plain(update), str(aggregation_id)) for update, aggregation_id in plain["counted"]]
            self._counted = {update.leaf_id: (update, aggregation_id) for update, aggregation_id in counted}
            self._unfetched = {str(leaf): str(aggregation_id) for leaf, aggregation_id in plain["unfetched"].items()}
            self._told = {str(leaf): str(status) for leaf, status in plain["told"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SandboxError(
                what="state of the sandbox",
                expected="the state of a branch",
                found=f"{type(error).__name__} at {error}",
                fix="Delete the state file, or take another directory",
            ) from error


def _kind(dtype: str) -> str:
    """Group dtypes that can be averaged together: floats of any width, integers of any width, booleans."""
    kind = np.dtype(dtype).kind
    return "i" if kind == "u" else kind


def require_same_layers(first: Update, second: Update) -> None:
    """Demand that two updates can be averaged: same number of layers, same shapes, same kind of numbers.

    Raises:
        LayoutError: names the first layer of ``second`` that does not fit ``first``.
    """
    fix = "All leaves of a branch need the same model and the same choice of parameters"
    if len(first.layers) != len(second.layers):
        raise LayoutError(
            what="update",
            expected=f"{len(first.layers)} layers, as leaf {first.leaf_id} uploaded them in this round",
            found=f"{len(second.layers)}",
            fix=fix,
        )
    for index, ((shape, dtype), (other_shape, other_dtype)) in enumerate(zip(first.layers, second.layers)):
        if shape != other_shape or _kind(dtype) != _kind(other_dtype):
            raise LayoutError(
                what=f"layer_{index}",
                expected=f"{dtype}{list(shape)}, as leaf {first.leaf_id} uploaded it in this round",
                found=f"{other_dtype}{list(other_shape)}",
                fix=fix,
            )
