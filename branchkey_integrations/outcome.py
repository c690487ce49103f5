"""What a round needs of a client, and what it says when it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from branchkey_integrations.archive import Archive
from branchkey_integrations.parameters import Layout

LONGEST_HISTORY = 10_000


@dataclass(frozen=True)
class UploadReceipt:
    """What was sent last: the platform's id for it, its length in bytes, and its ``sha256=…`` digest."""

    file_id: str
    size_bytes: int
    digest: str
    #: How the update was packed, and why: ``deflate``, ``store: as you asked``…; empty for a file that was there already.
    compression: str = ""


#: Called with a step of an upload (``"ready"``, ``"sending"``, ``"posted"``), the archive's digest and its length in bytes.
Note = Callable[[str, str, int], None]


def telling(note: Note | None, digest: str, size_bytes: int) -> Callable[[str], None]:
    """Give what tells of the steps of one archive's upload; to nobody where ``note`` is None."""
    return lambda step: None if note is None else note(step, digest, size_bytes)


class LeafClient(Protocol):
    """What a round needs of :class:`~branchkey_integrations.client.Client`."""

    last_upload: UploadReceipt | None

    @property
    def leaf_id(self) -> str:
        """Id of the leaf."""
        ...

    @property
    def branch_id(self) -> str:
        """Id of the branch."""
        ...

    @property
    def run_status(self) -> str:
        """Last known status of the run."""
        ...

    def mark(self) -> int:
        """Give the present moment among arriving aggregates."""
        ...

    def upload(
        self,
        arrays: Sequence[Any],
        weighting: float,
        *,
        metadata: Mapping[str, Any] | None = None,
        note: Note | None = None,
    ) -> str:
        """Send layers; return the file id."""
        ...

    def file_upload(
        self, file_path: str, *, metadata: Mapping[str, Any] | None = None, note: Note | None = None
    ) -> str:
        """Send an archive; return the file id."""
        ...

    def wait_for_aggregation(
        self,
        timeout_s: float | None,
        *,
        newer_than: int | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> str:
        """Wait for an aggregate; return its id."""
        ...

    def open_aggregation(
        self, aggregation_id: str, *, quarantine: bool = False, layout: Layout | None = None
    ) -> AbstractContextManager[Archive]:
        """Download an aggregate for a model of this layout and open it; keep it aside if it turns out to be bad."""
        ...

    def send_performance_metrics(self, aggregation_id: str, data: Mapping[str, Any], mode: str) -> None:
        """Send metrics."""
        ...


@dataclass(frozen=True)
class RoundOutcome:
    """Say what became of a round.

    ``status`` is ``"applied"`` (the aggregate is in the model), ``"pending"`` (sent, not answered yet), ``"skipped"``
    (nothing was done, or not this time), ``"timeout"`` (no aggregate came), ``"rejected"`` (the gate refused it) or
    ``"stopped"`` (the run has ended). Whatever it is but ``"applied"``, the model holds its local weights.
    """

    status: str
    round: int
    upload_id: str | None = None
    aggregation_id: str | None = None
    waited_s: float = 0.0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    reason: str = ""
    #: How the update was packed, and why.
    compression: str = ""


class History(list[RoundOutcome]):
    """Outcomes, oldest first: of most rounds two, ``pending`` for the first half and what the second half came to.

    Holds the newest 10,000 at most, however long a training goes on: beyond that the older half is dropped.
    """

    #: How many were ever added.
    total = 0

    def append(self, outcome: RoundOutcome) -> None:
        """Add an outcome."""
        super().append(outcome)
        self.total += 1
        if len(self) > LONGEST_HISTORY:
            del self[: LONGEST_HISTORY // 2]

    def extend(self, outcomes: Iterable[RoundOutcome]) -> None:
        """Add outcomes."""
        for outcome in outcomes:
            self.append(outcome)

    def since(self, total: int) -> list[RoundOutcome]:
        """Give what was added since ``total`` had the given value."""
        added = self.total - total
        return self[-added:] if added else []


@dataclass(frozen=True)
class PendingRound:
    """An update that was sent and not answered yet."""

    round: int
    mark: int
    upload_id: str | None
    digest: str
    uploaded_bytes: int
    aggregation_id: str | None = None
    #: The aggregate was announced to a process before this one: that very one is loaded, not a newer one.
    repeated: bool = False
    #: False: every byte went out, but no answer is known.
    certain: bool = True
    #: It could not be sent yet and waits on the disk.
    waits: bool = False
    #: Its aggregate was refused by a process before this one.
    refused: bool = False
    #: So many rounds were made after it that the journal does not say what became of it.
    forgotten: bool = False

    @property
    def reason(self) -> str:
        """Say why a round that was taken up from a process before this one is not sent."""
        if self.refused:
            return f"aggregate {self.aggregation_id} was refused before the restart; local weights are kept"
        if self.forgotten:
            return "made before the restart, and so many after it that its aggregate is not known; not sent again"
        if self.certain:
            return "sent before the restart; not sent again"
        return "may have been received before the restart; not sent again, so that it cannot be counted twice"

    #: See :class:`UploadReceipt`.
    compression: str = ""
    #: Number of the run that it was sent in; None: not known.
    run: int | None = None
