"""Send an update: now, in a thread beside training, or from the disk when the link is back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from branchkey_integrations.background import Background
from branchkey_integrations.errors import (
    ApiError,
    BranchKeyError,
    ClientClosedError,
    DeadlineError,
    RunBlockedError,
    UnreachableError,
    UploadUncertainError,
)
from branchkey_integrations.outcome import LeafClient, Note, PendingRound
from branchkey_integrations.round_notes import RoundNotes
from branchkey_integrations.run_state import STARTED
from branchkey_integrations.spool import Spool

logger = logging.getLogger("branchkey_integrations.rounds")

#: How soon an update that waits is tried again; doubled each time, up to the longest.
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
_CLOSING_S = 30.0
#: For a thread that only waits; it looks up twice a second or when its request is over.
_FAREWELL_S = 0.5


@dataclass(frozen=True)
class Update:
    """An update before it is sent.

    Args:
        round: its number.
        mark: the moment among arriving aggregates before it is sent.
        layout: fingerprint of the layers.
        weighting: the leaf's influence.
        metrics: of the weights that are sent.
        about: the aggregate that they were trained from; None: none.
        update_id: by which the platform can tell a repeat, whatever its bytes are.
        run: number of the branch's run in which it was made; None: not known, or made before a run.
    """

    round: int
    mark: int
    layout: str
    weighting: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    about: str | None = None
    update_id: str = ""
    run: int | None = None

    @property
    def pending(self) -> PendingRound:
        """The round while nothing is known of the upload."""
        return PendingRound(self.round, self.mark, None, "", 0, run=self.run)


@dataclass
class _Departure:
    """Say how an update really left: at which moment among arriving aggregates, into which run, and how far it came."""

    update: Update
    mark: int
    run: int | None
    posted: bool = False


class Uploader:
    """Send updates of one leaf and note what becomes of them.

    Args:
        client: an open client.
        notes: the leaf's journal.
        spool: where an update waits while there is no link; None: nowhere.
    """

    def __init__(self, client: LeafClient, notes: RoundNotes, spool: Spool | None) -> None:
        self._client = client
        self._notes = notes
        self._spool = spool
        self._waiting = False
        self._departure: _Departure | None = None
        self._closing = threading.Event()
        self._under_way = False
        self._step = threading.Lock()
        self._thread: Background[PendingRound | None] = Background("branchkey-upload")

    @property
    def sends(self) -> bool:
        """Tell whether an update is being sent beside training now; one that waits for the next try is not."""
        return self._thread.busy and not self._waiting

    def send(self, update: Update, arrays: Sequence[Any]) -> PendingRound:
        """Send an update and wait until it was taken.

        Raises:
            UploadUncertainError: it may have been received.
            BranchKeyError: it was not sent.
        """
        return self._send(update, arrays, late=False)

    def _send(self, update: Update, arrays: Sequence[Any], *, late: bool) -> PendingRound:
        note = self._noting(update, update.mark, late=late)
        try:
            upload_id = self._client.upload(arrays, update.weighting, metadata=_metadata(update), note=note)
        except UploadUncertainError:
            raise
        except BranchKeyError:
            self._notes.not_sent(update.round)
            raise
        finally:
            self._under_way = False
        return self._sent(update, upload_id)

    def start(self, update: Update, arrays: Sequence[Any]) -> None:
        """Begin to send an update in a thread; ``arrays`` must not change. :meth:`take` gives what became of it."""
        held = [arrays]

        def work(stop: threading.Event) -> PendingRound | None:
            try:
                return self._send(update, held[0], late=True)
            except BranchKeyError as error:
                if not self._put(update, held[0], error):
                    raise
            finally:
                # From here on it is on the disk, or lost: hours without a link shall not hold a copy of the model.
                held.clear()
            return self._send_later(replace(update, metrics={}), stop)

        self._waiting = False
        self._thread.start(work)

    def take(self) -> PendingRound | None:
        """Give the round that was sent in the thread, once; None if there is none, or it is not over.

        Raises:
            BranchKeyError: as :meth:`send`.
        """
        return self._thread.take()

    def may_have_left(self, update: Update) -> bool:
        """Tell whether the platform may have all of an update, as far as is known here."""
        return self._departure is not None and self._departure.update is update and self._departure.posted

    def as_left(self, pending: PendingRound) -> PendingRound:
        """Give a round with the moment at which its update really left, and the run that it left into."""
        left = self._departure
        if left is None or left.update.round != pending.round:
            return pending
        return replace(pending, mark=left.mark, run=left.run)

    def close(self) -> None:
        """End the thread. What it is sending gets half a minute; what only waits to be sent does not go any more."""
        # Other ranks have no client to ask, and send nothing.
        started = not self._thread.busy or self._client.run_status == STARTED
        with self._step:
            # Packing is no waiting: what was given to be sent a moment ago still goes.
            idle = not self._under_way and not started
            if idle:
                self._closing.set()
        try:
            self._thread.stop(_FAREWELL_S if idle else _CLOSING_S)
        finally:
            self._closing.set()
            # Another training through this uploader may send again.
            self._closing = threading.Event()

    def abandon(self) -> None:
        """End the thread, and forget what became of what it sent: the engine goes back to another moment."""
        self.close()
        # Where it still waits for the run it ends by itself, without sending.
        self._thread = Background("branchkey-upload")

    # --- when there is no link -----------------------------------------------------------------------------------------

    def keep(self, update: Update, arrays: Sequence[Any], error: BranchKeyError) -> bool:
        """Keep an update that could not be sent, and send it when the link is back; say whether that can be done."""
        if not self._put(update, arrays, error):
            return False
        self._waiting = True
        self._thread.start(lambda stop: self._send_later(replace(update, metrics={}), stop))
        return True

    def _put(self, update: Update, arrays: Sequence[Any], error: BranchKeyError) -> bool:
        if self._spool is None or not _for_later(error):
            return False
        if update.metrics:
            self._spool.add_metrics(*_report_of(update))
        client = self._client
        kept = self._spool.put(
            arrays,
            update.weighting,
            round=update.round,
            layout=update.layout,
            update_id=update.update_id,
            leaf_id=client.leaf_id,
            branch_id=client.branch_id,
            run_number=update.run,
        )
        return kept is not None

    def resume(self, number: int, layout: str | None) -> bool:
        """Take up an update of round ``number`` that waited when a process ended; say whether there is one."""
        found = None if self._spool is None else self._spool.newest()
        client = self._client
        mine = (number, client.leaf_id, client.branch_id)
        if found is None or (found.round, found.leaf_id, found.branch_id) != mine:
            return False
        if layout is not None and found.layout != layout:
            return False
        update = Update(found.round, -1, found.layout, 1.0, update_id=found.update_id, run=found.run_number)
        try:
            _require_its_run(update, getattr(client, "run_number", None))
        except RunBlockedError as error:
            logger.warning("round %d: what waited on the disk is out of date: %s", number, error)
            return False
        self._waiting = True
        self._thread.start(lambda stop: self._send_later(update, stop))
        return True

    def supersede(self) -> None:
        """Forget an update that waits, because a newer one is about to be sent."""
        self._thread.stop()
        if self._spool is not None:
            self._spool.drop()

    def _send_later(self, update: Update, stop: threading.Event) -> PendingRound | None:
        spool, delay = self._spool, FIRST_DELAY_S
        self._waiting = True
        assert spool is not None  # noqa: S101  callers looked
        while not stop.wait(delay):
            delay = min(2 * delay, LONGEST_DELAY_S)
            if spool.replaced(update.update_id):
                return None
            note = self._noting(update, self._client.mark(), late=True)
            # Training that may not wait must not wait for this try either.
            self._waiting = False
            try:
                ask: Callable[[], int] | None = getattr(self._client, "ask_run_number", None)
                # Without a link nobody has heard of a new run, so the platform is asked.
                _require_its_run(update, None if ask is None or update.run is None else ask())
                upload_id = self._client.file_upload(spool.path, metadata=_metadata(update), note=note)
            except UploadUncertainError:
                spool.drop(update.update_id)
                raise
            except BranchKeyError as error:
                self._notes.not_sent(update.round)
                if not _for_later(error):
                    spool.drop(update.update_id)
                    raise
                logger.info("round %d: its update still waits for the link: %s", update.round, error)
                continue
            finally:
                self._waiting, self._under_way = True, False
            spool.drop(update.update_id)
            # A warning said that it waits; whoever read that wants to know.
            logger.warning("round %d: the link is back and its update was sent", update.round)
            return self._sent(update, upload_id)
        return None

    # --- what goes along with an upload, and follows it --------------------------------------------------------------

    def _noting(self, update: Update, mark: int, *, late: bool) -> Note:
        """Give what the client calls in each step of an upload; ``late``: training may have gone on since it was made."""
        noted, closing = self._notes.of_upload(update.round, update.layout), self._closing
        departure = self._departure = _Departure(update, mark, update.run)

        def note(step: str, digest: str, size_bytes: int) -> None:
            if step == "ready":
                # Not sooner: it may have waited for the run for hours, in which aggregates of others came.
                departure.mark = self._client.mark()
                with self._step:
                    if late and closing.is_set():
                        raise ClientClosedError(what=f"update of round {update.round}", fix="Its training was closed")
                    self._under_way = late
                return
            if step == "sending":
                number = getattr(self._client, "run_number", None)
                if late:
                    _require_its_run(update, number)
                # The upload may have waited until a new run was started; the round is that run's then.
                self._notes.follow(number)
                departure.run = number
            if noted is not None:
                noted(step, digest, size_bytes)
            # Sending again means that the try before was not taken.
            departure.posted = step == "posted"

        return note

    def _sent(self, update: Update, upload_id: str) -> PendingRound:
        self._notes.sent(update.round, upload_id)
        receipt = self._client.last_upload
        if update.metrics:
            self._report(*_report_of(update))
        self._report_kept()
        sent = replace(self.as_left(update.pending), upload_id=upload_id)
        if receipt is None:
            return sent
        return replace(sent, digest=receipt.digest, uploaded_bytes=receipt.size_bytes, compression=receipt.compression)

    def _report(self, about: str, numbers: Mapping[str, float], mode: str) -> None:
        """Send metrics; a platform that does not take them is no reason to lose a round."""
        try:
            self._client.send_performance_metrics(about, numbers, mode)
        except ClientClosedError:
            raise
        except BranchKeyError as error:
            logger.warning("metrics were not taken: %s", error)
            if self._spool is not None and _for_later(error):
                self._spool.add_metrics(about, numbers, mode)

    def _report_kept(self) -> None:
        waiting = [] if self._spool is None else self._spool.metrics()
        for about, numbers, mode in waiting:
            try:
                self._client.send_performance_metrics(about, numbers, mode)
            except ClientClosedError:
                raise
            except BranchKeyError as error:
                if _for_later(error):
                    return
                logger.warning("metrics were not taken: %s", error)
            if self._spool is not None:
                self._spool.drop_metrics(1)


def _metadata(update: Update) -> dict[str, Any]:
    return {"custom": {"round": update.round, "layout": update.layout, "update_id": update.update_id}}


def _report_of(update: Update) -> tuple[str, Mapping[str, float], str]:
    return (update.about or "", update.metrics, "train" if update.about else "non-federated")


def _require_its_run(update: Update, number: int | None) -> None:
    """Demand that the branch's run is still the one in which an update was made; None: nobody knows.

    Raises:
        RunBlockedError: it is another one, which must not count work of the one before.
    """
    if update.run is not None and number is not None and number != update.run:
        raise RunBlockedError(
            what=f"update of round {update.round}",
            expected=f"run {update.run} of the branch, in which it was made",
            found=f"run {number}",
            fix="It is dropped, local weights are kept, and the next round counts in the new run",
            run_status=STARTED,
        )


def _for_later(error: BranchKeyError) -> bool:
    """Tell whether the same update may be taken later, without anybody changing anything here."""
    if isinstance(error, ApiError):
        return error.status in (408, 429) or error.status >= 500
    if isinstance(error, RunBlockedError):
        # Of a run that takes updates, but not this one.
        return error.run_status != STARTED
    return isinstance(error, (UnreachableError, DeadlineError))
