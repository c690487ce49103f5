"""One round of a federation: read, check, upload, wait, download, gate, load. Knows no framework."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from branchkey_integrations.errors import (
    AggregateRejectedError,
    ArchiveError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    LayoutError,
    MixedModelError,
    RoundTimeoutError,
    RunBlockedError,
    UploadUncertainError,
)
from branchkey_integrations.gate import squared_norm
from branchkey_integrations.loading import fetch, name_layer
from branchkey_integrations.options import RoundOptions, finite_metrics
from branchkey_integrations.outcome import History, LeafClient, PendingRound, RoundOutcome
from branchkey_integrations.parameters import Layout, ParameterStore, view_of
from branchkey_integrations.quarantine import rejected
from branchkey_integrations.round_notes import RoundNotes
from branchkey_integrations.round_state import RoundState
from branchkey_integrations.run_state import IN_A_RUN, STOPPED
from branchkey_integrations.spool import Spool
from branchkey_integrations.uploading import Update, Uploader

logger = logging.getLogger("branchkey_integrations.rounds")

_TOO_LONG = "Other leaves may be missing; raise timeout_s, or train on with wait=False or on_error='keep_local'"
_WAITS = "it waits on the disk until the platform can be reached; local weights are kept"


class RoundEngine:
    """Make rounds for one model through one client.

    Adapters hold an engine and hand it a store for each half: :meth:`submit` sends the model's parameters,
    :meth:`collect` loads what came back. With ``on_error="keep_local"`` errors become outcomes with a reason and one
    warning; wrong arguments and a closed client raise all the same.

    Args:
        client: an open client.
        options: how rounds are made.
    """

    def __init__(self, client: LeafClient, options: RoundOptions | None = None) -> None:
        self.client = client
        self.options = options or RoundOptions()
        #: Number of the last round that was begun here. A leaf counts its own rounds, skipped ones too: after an outage the
        #: same aggregate may belong to round 7 of one leaf and round 9 of another. Nothing but names and logs depends on it.
        self.round = 0
        #: Two entries for most rounds: ``pending`` when it was sent, and how it ended.
        self.history = History()
        self.last_applied: str | None = None
        self._pending: PendingRound | None = None
        self._layout: Layout | None = None
        self._fingerprint: str | None = None
        self._norm: float | None = None
        # Names the updates of this training; it goes along through checkpoints, so that a repeat has the same name.
        self._lineage = uuid.uuid4().hex
        folder = self.options.journal
        self._note_in(os.fspath(folder) if folder and folder is not True else None)

    def note_in(self, folder: str) -> None:
        """Keep the journal in ``folder``, unless the options say where, or that there shall be none, or rounds were made."""
        if self.options.journal is None and self.round == 0:
            self._note_in(folder)

    def _note_in(self, folder: str | None) -> None:
        # A script may change its working directory; the journal stays where it is.
        folder = folder and os.path.abspath(folder)
        self._notes = RoundNotes(self.client, folder)
        limit = self.options.spool_bytes
        waits = folder and limit and self.options.on_error == "keep_local"
        spool = Spool(os.path.join(str(folder), "spool"), self.client.leaf_id, limit) if waits else None
        self._uploader = Uploader(self.client, self._notes, spool)

    def close(self) -> None:
        """End what is sent beside training, and let go of the journal; the client stays open. May be repeated."""
        try:
            self._uploader.close()
        finally:
            self._notes.close()

    @property
    def pending(self) -> bool:
        """Whether an update was sent whose aggregate has not been dealt with."""
        return self._pending is not None

    @property
    def last_outcome(self) -> RoundOutcome | None:
        """Outcome of the last half round."""
        return self.history[-1] if self.history else None

    # --- the first half ----------------------------------------------------------------------------------------------

    def submit(
        self, store: ParameterStore, *, samples: float | None = None, metrics: Mapping[str, Any] | None = None
    ) -> RoundOutcome:
        """Read the model and send it.

        Args:
            store: the live model's parameters.
            samples: how many samples were trained on since the last round.
            metrics: of the weights that are sent, by name; those that are finite numbers go to the platform.

        Returns:
            An outcome with status ``pending``; ``skipped`` or ``stopped`` when nothing was sent.

        Raises:
            ConfigurationError: samples are missing where they are needed.
            LayoutError: the model's layers changed since the first round; nothing was sent.
            BranchKeyError: with ``on_error="raise"``, whatever went wrong; nothing was sent unless it is an
                :class:`UploadUncertainError`.
        """
        numbers = finite_metrics(metrics)
        self.options.require_samples(samples)
        self._hear_of_sent()
        self.round += 1
        if self._uploader.sends and not self.options.wait:
            return self._note(RoundOutcome("skipped", self.round, reason="the update before is still being sent"))
        update: Update | None = None
        arrays: Sequence[Any] = ()
        try:
            weight = self.options.weight(samples, numbers)
            layout = self._same_layout(store)
            before = self._notes.already_sent(self.round, layout.fingerprint)
            if before is not None:
                self._uploader.supersede()
                self._pending = None if before.refused or before.forgotten else before
                status = "rejected" if before.refused else "skipped" if before.forgotten else "pending"
                return self._note(self._outcome(status, reason=before.reason))
            if self.client.run_status == STOPPED and not getattr(self.client, "wait_for_run", False):
                return self._note(RoundOutcome("stopped", self.round, reason="the run is stopped"))
            # Not sooner: what waits on the disk may be another process's, and goes when a newer one is there to be sent.
            self._uploader.supersede()
            unloaded = None if self._pending is None or self.options.wait else self._pending.aggregation_id
            self._pending = None
            # Not copied where nothing changes the model before this returns.
            arrays = view_of(store) if self.options.wait else store.read()
            if self._norm is None and self.options.gate.max_norm_ratio is not None:
                self._norm = float(np.sqrt(sum(squared_norm(array) for array in arrays)))
            # The mark is taken before the upload: the aggregate may be announced before the upload is answered.
            update = Update(
                self.round,
                self.client.mark(),
                layout.fingerprint,
                weight,
                numbers if self.options.report_metrics else {},
                self.last_applied,
                f"{self._lineage}-{self.round}",
                None if self.client.run_status not in IN_A_RUN else getattr(self.client, "run_number", None),
            )
            self._pending = replace(update.pending, aggregation_id=unloaded)
            if self.options.wait:
                self._pending = self._uploader.send(update, arrays)
            else:
                self._uploader.start(update, arrays)
        except RunBlockedError as error:
            self._pending = None
            status = "stopped" if error.run_status == STOPPED else "skipped"
            return self._note(RoundOutcome(status, self.round, reason=str(error)))
        except UploadUncertainError as error:
            if self.options.on_error == "raise":
                return self._give_up("skipped", error)
            self._await_answer_to(error)
            return self._note(RoundOutcome("pending", self.round, reason=str(error)))
        except BranchKeyError as error:
            waits, self._pending = self._pending, None
            try:
                return self._keep_for_later(update, arrays, error) or self._give_up("skipped", error)
            finally:
                if update is None and waits is not None and waits.waits:
                    self._pending = waits
        except BaseException:
            # An interrupt before the platform can have all of it: nothing is to be waited for.
            if self.options.wait and update is not None and not self._uploader.may_have_left(update):
                self._pending = None
            raise
        return self._note(self._outcome("pending"))

    def _hear_of_sent(self) -> None:
        """Deal with what became of the update that was sent beside training, before another takes its place."""
        try:
            self._take_sent()
        except BranchKeyError as error:
            self._give_up("skipped", error)

    def _keep_for_later(
        self, update: Update | None, arrays: Sequence[Any], error: BranchKeyError
    ) -> RoundOutcome | None:
        """Let an update that could not be sent wait on the disk, where the policy and the journal's folder allow it."""
        if update is None or self.options.on_error == "raise" or not self._uploader.keep(update, arrays, error):
            return None
        self._pending = replace(update.pending, waits=True)
        return self._note(self._outcome("skipped", reason=f"{error} ({_WAITS})"))

    def _same_layout(self, store: ParameterStore) -> Layout:
        layout = store.layout()
        if self._layout is not None:
            self._layout.require_same(layout)
        elif self._fingerprint is not None and layout.fingerprint != self._fingerprint:
            raise LayoutError(
                what="layout of the model",
                expected="the layers of the rounds before",
                found=f"another list of {len(layout)} layers",
                fix="Resume with the model and the selection of parameters that the checkpoint was made with",
            )
        self._layout, self._fingerprint = layout, layout.fingerprint
        return layout

    # --- the second half ---------------------------------------------------------------------------------------------

    def collect(self, store: ParameterStore, *, wait: bool | None = None) -> RoundOutcome:
        """Wait for the aggregate, check it, load it.

        Args:
            store: the live model's parameters.
            wait: False: do not wait, take what has come; None: as the options say.

        Returns:
            ``applied``; ``pending`` when ``wait`` is False and nothing has come; ``skipped`` when nothing was sent;
            ``stopped`` when the run ended; with ``on_error="keep_local"`` also ``timeout``, ``rejected`` or ``skipped``.

        Raises:
            RoundTimeoutError, AggregateRejectedError, BranchKeyError: with ``on_error="raise"``; the model is as it was.
        """
        waiting = self.options.wait if wait is None else wait
        if self._pending is None and waiting:
            return self._note(RoundOutcome("skipped", self.round, reason="nothing was sent in this round"))
        started = time.monotonic()
        try:
            self._take_sent()
            if self._pending is not None and self._pending.waits:
                return self._note(self._outcome("skipped", reason=_WAITS))
            # Layers that changed places since the upload may all fit, and would take each other's values.
            self._same_layout(store)
            identifier = self._await_id(waiting)
        except RoundTimeoutError as error:
            waited = time.monotonic() - started
            if self.client.run_status == STOPPED:
                return self._finish("stopped", waited_s=waited, reason="the run was stopped")
            if self._pending is not None and self._is_over(self._pending):
                return self._finish("skipped", waited_s=waited, reason="the run that it was sent in is over")
            if not waiting:
                status = "skipped" if self._pending is None else "pending"
                return self._note(self._outcome(status, waited_s=waited, reason="no new aggregate has come yet"))
            error.what = f"{error.what} of round {self._pending.round if self._pending else self.round}"
            error.fix = _TOO_LONG
            return self._give_up("timeout", error, waited_s=waited)
        except BranchKeyError as error:
            return self._give_up("skipped", error, waited_s=time.monotonic() - started)
        waited = time.monotonic() - started
        if self._pending is not None:
            # Kept until it is dealt with: a broken download can be tried again with another collect().
            self._pending = replace(self._pending, aggregation_id=identifier)
        try:
            downloaded, self._norm = fetch(self.client, store, identifier, self.options.gate, self._norm)
        except AggregateRejectedError as error:
            return self._give_up("rejected", error, waited_s=waited, aggregation_id=identifier)
        except ArchiveError as error:
            return self._give_up("rejected", rejected(identifier, error), waited_s=waited, aggregation_id=identifier)
        except BranchKeyError as error:
            return self._give_up("skipped", error, waited_s=waited, aggregation_id=identifier, keep_pending=True)
        self.last_applied = identifier
        return self._finish("applied", waited_s=waited, aggregation_id=identifier, downloaded_bytes=downloaded)

    def _take_sent(self) -> None:
        """Take in what was sent beside training."""
        try:
            sent = self._uploader.take()
        except UploadUncertainError as error:
            if self.options.on_error == "raise":
                raise
            self._await_answer_to(error)
            return
        if sent is not None:
            known = None if self._pending is None else self._pending.aggregation_id
            self._pending = replace(sent, aggregation_id=known)

    def _await_answer_to(self, error: UploadUncertainError) -> None:
        """Keep a round open that may have been received: an aggregate may come, and sending again could count it twice."""
        if self._pending is not None:
            logger.warning("round %d: %s", self._pending.round, error)
            self._pending = replace(self._uploader.as_left(self._pending), digest=error.digest, waits=False)

    def _await_id(self, waiting: bool) -> str:
        pending = self._pending
        if pending is not None and pending.aggregation_id is not None:
            if pending.repeated:
                return pending.aggregation_id
            try:
                return self.client.wait_for_aggregation(0, newer_than=pending.mark)
            except RoundTimeoutError:
                return pending.aggregation_id
        if not waiting or pending is None:
            # Whatever is new and was not loaded yet will do, be it the answer to an earlier update.
            return self.client.wait_for_aggregation(0)
        return self.client.wait_for_aggregation(
            self.options.timeout_s,
            newer_than=pending.mark,
            give_up=lambda: self.client.run_status == STOPPED or self._is_over(pending),
        )

    def _is_over(self, pending: PendingRound) -> bool:
        """Tell whether another run has begun since a round was sent: no aggregate of it will come any more."""
        number = None if pending.run is None else getattr(self.client, "run_number", None)
        return number is not None and number != pending.run

    # --- outcomes ----------------------------------------------------------------------------------------------------

    def _outcome(self, status: str, **values: Any) -> RoundOutcome:
        pending = self._pending
        if pending is None:
            return RoundOutcome(status, self.round, **values)
        sent: dict[str, Any] = {"upload_id": pending.upload_id, "uploaded_bytes": pending.uploaded_bytes}
        return RoundOutcome(status, pending.round, **sent, compression=pending.compression, **values)

    def _note(self, outcome: RoundOutcome) -> RoundOutcome:
        self.history.append(outcome)
        log = logger.info if outcome.status in ("applied", "pending") else logger.warning
        log("round %d: %s%s", outcome.round, outcome.status, f" ({outcome.reason})" if outcome.reason else "")
        return outcome

    def _finish(self, status: str, **values: Any) -> RoundOutcome:
        outcome = self._outcome(status, **values)
        self._close_round(status, outcome.aggregation_id)
        return self._note(outcome)

    def _close_round(self, status: str, aggregation_id: str | None) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._notes.closed(pending.round, status, aggregation_id)

    def _give_up(
        self, status: str, error: BranchKeyError, *, keep_pending: bool = False, **values: Any
    ) -> RoundOutcome:
        """Follow ``on_error``: raise, or turn the error into an outcome and go on with local weights."""
        if isinstance(error, RunBlockedError):
            return self._finish("stopped" if error.run_status == STOPPED else "skipped", reason=str(error))
        name_layer(error, self._layout)
        mixed = isinstance(error, MixedModelError)
        outcome = self._outcome(status, reason=f"{error}{'' if mixed else ' (local weights are kept)'}", **values)
        if not keep_pending:
            self._close_round(status, outcome.aggregation_id)
        if self.options.on_error == "raise" or mixed or isinstance(error, (ConfigurationError, ClientClosedError)):
            self.history.append(outcome)
            raise error
        return self._note(outcome)

    # --- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold, as plain types without secrets."""
        state = RoundState(
            self.round, self.last_applied, self._fingerprint, self._layout, self._norm, self._lineage, self._pending
        )
        return state.to_plain(self.client.leaf_id, self.client.branch_id)

    def load_state_dict(self, state: Mapping[str, Any], *, mirror: bool = False) -> None:
        """Go on where a checkpoint left off.

        With ``mirror`` only show how the engine of another process stands, which alone has journal and waiting update.

        Raises:
            ConfigurationError: the state is of another leaf or branch (both are named), or is no state.
        """
        found = RoundState.of(state, self.client.leaf_id, self.client.branch_id)
        self.round, self.last_applied, self._norm = found.round, found.last_applied, found.norm
        self._fingerprint, self._layout = found.fingerprint, found.layers
        self._lineage = found.lineage or self._lineage
        if mirror:
            self._pending = found.pending
            return
        self._uploader.abandon()
        waits = found.pending
        if waits is not None and not waits.waits and self._is_over(waits):
            logger.warning("round %d was sent in a run that is over, and is not waited for", waits.round)
            waits = None
        pending = self._notes.resume(waits, found.fingerprint)
        if pending is not None and pending is found.pending and pending.upload_id is None:
            # Nobody noted that it was sent. Beside training it may have begun to wait without a word here.
            taken_up = self._uploader.resume(pending.round, self._fingerprint)
            pending = None if pending.waits and not taken_up else pending
        self._pending = pending
        queue = getattr(self.client, "queue", None)
        if queue is not None and self.last_applied:
            queue.forget_before(self.last_applied)
