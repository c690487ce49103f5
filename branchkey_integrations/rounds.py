"""One round of a federation: read, check, upload, wait, download, gate, load. Knows no framework."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ArchiveError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    LayoutError,
    RoundTimeoutError,
    RunBlockedError,
    UploadUncertainError,
)
from branchkey_integrations.gate import squared_norm
from branchkey_integrations.options import RoundOptions, finite_metrics
from branchkey_integrations.outcome import LeafClient, PendingRound, RoundOutcome
from branchkey_integrations.parameters import Layout, ParameterStore
from branchkey_integrations.round_notes import RoundNotes
from branchkey_integrations.run_state import STOPPED

logger = logging.getLogger("branchkey_integrations.rounds")

_STATE_VERSION = 1
_SENT_BEFORE = "sent before the restart; not sent again"
_MAYBE_BEFORE = "may have been received before the restart; not sent again, so that it cannot be counted twice"
_FRESH = "Resume with the checkpoint of this leaf, or start without its federation state"


class RoundEngine:
    """Make rounds for one model through one client.

    Adapters hold an engine and hand it a store for each half: :meth:`submit` sends the model's parameters,
    :meth:`collect` loads what came back. With ``on_error="keep_local"`` errors become outcomes with a reason and one
    warning; wrong arguments and a closed client raise all the same.

    Args:
        client: an open client.
        options: how rounds are made.
        journal: folder of the journal where ``options.journal`` is None; None: there is none.
    """

    def __init__(
        self, client: LeafClient, options: RoundOptions | None = None, *, journal: str | None = None
    ) -> None:
        self.client = client
        self.options = options or RoundOptions()
        self.round = 0
        self.history: list[RoundOutcome] = []
        self.last_applied: str | None = None
        self._pending: PendingRound | None = None
        self._layout: Layout | None = None
        self._fingerprint: str | None = None
        self._norm: float | None = None
        chosen = journal if self.options.journal is None else self.options.journal
        self._notes = RoundNotes(client, os.fspath(chosen) if chosen and chosen is not True else None)

    def close(self) -> None:
        """Let go of the journal; the client stays open. May be repeated."""
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
        self.round += 1
        try:
            weight = self.options.weight(samples, numbers)
            layout = self._same_layout(store)
            before = self._notes.already_sent(self.round, layout.fingerprint)
            if before is not None:
                self._pending = before
                return self._note(self._outcome("pending", reason=_SENT_BEFORE if before.certain else _MAYBE_BEFORE))
            if self.client.run_status == STOPPED and not getattr(self.client, "wait_for_run", False):
                return self._note(RoundOutcome("stopped", self.round, reason="the run is stopped"))
            arrays = store.read()
            if self._norm is None:
                self._norm = float(np.sqrt(sum(squared_norm(array) for array in arrays)))
            # Taken before the upload: the aggregate may be announced before the upload is answered.
            self._pending = PendingRound(self.round, self.client.mark(), None, "", 0)
            upload_id = self.client.upload(
                arrays,
                weight,
                metadata={"custom": {"round": self.round, "layout": layout.fingerprint}},
                **self._notes.of_upload(self.round, layout.fingerprint),
            )
        except RunBlockedError as error:
            self._not_sent()
            status = "stopped" if error.run_status == STOPPED else "skipped"
            return self._note(RoundOutcome(status, self.round, reason=str(error)))
        except UploadUncertainError as error:
            if self.options.on_error == "raise":
                return self._give_up("skipped", error)
            # It may have been received, so an aggregate may come; sending again could count this site twice.
            logger.warning("round %d: %s", self.round, error)
            if self._pending is not None:
                self._pending = replace(self._pending, digest=error.digest)
            return self._note(RoundOutcome("pending", self.round, reason=str(error)))
        except BranchKeyError as error:
            self._not_sent()
            return self._give_up("skipped", error)
        self._notes.sent(self.round, upload_id)
        receipt = self.client.last_upload
        self._pending = replace(
            self._pending,
            upload_id=upload_id,
            digest=receipt.digest if receipt else "",
            uploaded_bytes=receipt.size_bytes if receipt else 0,
        )
        if numbers and self.options.report_metrics:
            self._report(numbers)
        return self._note(self._outcome("pending"))

    def _not_sent(self) -> None:
        self._pending = None
        self._notes.not_sent(self.round)

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

    def _report(self, numbers: Mapping[str, float]) -> None:
        """Send metrics; a platform that does not take them is no reason to lose a round."""
        about, mode = (self.last_applied, "train") if self.last_applied else ("", "non-federated")
        try:
            self.client.send_performance_metrics(about, numbers, mode)
        except ClientClosedError:
            raise
        except BranchKeyError as error:
            logger.warning("round %d: metrics were not taken: %s", self.round, error)

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
            identifier = self._await_id(waiting)
        except RoundTimeoutError as error:
            waited = time.monotonic() - started
            if self.client.run_status == STOPPED:
                return self._finish("stopped", waited_s=waited, reason="the run was stopped")
            if not waiting:
                status = "skipped" if self._pending is None else "pending"
                return self._note(self._outcome(status, waited_s=waited, reason="no new aggregate has come yet"))
            return self._give_up("timeout", error, waited_s=waited)
        except BranchKeyError as error:
            return self._give_up("skipped", error, waited_s=time.monotonic() - started)
        waited = time.monotonic() - started
        if self._pending is not None:
            # Kept until it is dealt with: a broken download can be tried again with another collect().
            self._pending = replace(self._pending, aggregation_id=identifier)
        try:
            with self.client.open_aggregation(identifier) as archive:
                downloaded = archive.size_bytes
                self._load(store, identifier, archive)
        except AggregateRejectedError as error:
            return self._give_up("rejected", error, waited_s=waited, aggregation_id=identifier)
        except ArchiveError as error:
            return self._give_up("rejected", _rejected(identifier, error), waited_s=waited, aggregation_id=identifier)
        except BranchKeyError as error:
            return self._give_up("skipped", error, waited_s=waited, aggregation_id=identifier, keep_pending=True)
        self.last_applied = identifier
        return self._finish("applied", waited_s=waited, aggregation_id=identifier, downloaded_bytes=downloaded)

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
            self.options.timeout_s, newer_than=pending.mark, give_up=lambda: self.client.run_status == STOPPED
        )

    def _load(self, store: ParameterStore, identifier: str, archive: Archive) -> None:
        """Gate and load; on any error the parameters are as they were."""
        gate = self.options.gate
        norm = gate.check(identifier, archive, store.layout(), self._norm)
        before = gate.score()
        kept = store.read() if before is not None else None
        try:
            store.write(archive)
        except LayoutError as error:
            raise _rejected(identifier, error) from error
        if kept is not None:
            try:
                gate.check_score(identifier, before, gate.score())
            except BaseException:
                # Also when the user's own metric raises: a model that could not be judged is not kept.
                store.write(kept)
                raise
        self._norm = norm

    # --- outcomes ----------------------------------------------------------------------------------------------------

    def _outcome(self, status: str, **values: Any) -> RoundOutcome:
        pending = self._pending
        if pending is None:
            return RoundOutcome(status, self.round, **values)
        return RoundOutcome(
            status, pending.round, upload_id=pending.upload_id, uploaded_bytes=pending.uploaded_bytes, **values
        )

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
        outcome = self._outcome(status, reason=f"{error} (local weights are kept)", **values)
        if not keep_pending:
            self._close_round(status, outcome.aggregation_id)
        if self.options.on_error == "raise" or isinstance(error, (ConfigurationError, ClientClosedError)):
            self.history.append(outcome)
            raise error
        return self._note(outcome)

    # --- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold, as plain types without secrets."""
        pending = self._pending
        return {
            "version": _STATE_VERSION,
            "leaf_id": self.client.leaf_id,
            "branch_id": self.client.branch_id,
            "round": self.round,
            "last_applied": self.last_applied,
            "layout": self._fingerprint,
            "norm": self._norm,
            "pending": None
            if pending is None
            else {
                "round": pending.round,
                "upload_id": pending.upload_id,
                "digest": pending.digest,
                "uploaded_bytes": pending.uploaded_bytes,
                "aggregation_id": pending.aggregation_id,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint left off.

        Raises:
            ConfigurationError: the state is of another leaf or branch (both are named), or is no state.
        """
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                what="state", expected="what state_dict() gave", found=type(state).__name__, fix=_FRESH
            )
        for key, mine in (("leaf_id", self.client.leaf_id), ("branch_id", self.client.branch_id)):
            if state.get(key) != mine:
                raise ConfigurationError(
                    what=f"checkpoint's {key}",
                    expected=mine,
                    found=str(state.get(key)),
                    fix=_FRESH,
                )
        try:
            pending = state["pending"]
            # Marks do not outlive a process: whatever the new client heard since it connected counts as newer.
            resumed = None if pending is None else PendingRound(mark=-1, **pending)
            self.round, self.last_applied = int(state["round"]), state["last_applied"]
            self._fingerprint, self._layout, self._norm = state["layout"], None, state["norm"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(
                what="state", expected="what state_dict() gave", found=f"a broken one ({error})", fix=_FRESH
            ) from error
        self._pending = self._notes.resume(resumed)
        queue = getattr(self.client, "queue", None)
        if queue is not None and self.last_applied:
            queue.forget_before(self.last_applied)


def _rejected(identifier: str, error: BranchKeyError) -> AggregateRejectedError:
    what = error.what if identifier in error.what else f"aggregate {identifier}, {error.what}"
    return AggregateRejectedError(
        what=what, expected=error.expected, found=error.found, fix=error.fix, aggregation_id=identifier
    )
