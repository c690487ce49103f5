"""Show rounds where a Keras user looks: the line of the progress bar, ``History``, TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras

from branchkey_integrations.outcome import RoundOutcome

_KEYS = ("branchkey_round", "branchkey_status", "branchkey_wait_s", "branchkey_uploaded_mb")


class RoundDisplay:
    """Enter rounds into what the callbacks of one ``fit`` show and keep; their ``logs`` are left alone.

    ``History`` gets a list a key, an entry an epoch: ``branchkey_round``, ``branchkey_status`` (see
    :class:`~branchkey_integrations.outcome.RoundOutcome`), ``branchkey_wait_s`` (seconds waited for the aggregate) and
    ``branchkey_uploaded_mb`` (10^6 bytes); None in an epoch without a round. Each entry is completed when its round is:
    at the start of the next epoch, or at the end of ``fit``.

    Args:
        company: the callbacks of the fit.
        progress: whether the progress bar and TensorBoard are served too.
    """

    def __init__(self, company: Sequence[Any] = (), *, progress: bool = True) -> None:
        self._histories = [each for each in company if isinstance(each, keras.callbacks.History)]
        self._bars = [each for each in company if progress and isinstance(each, keras.callbacks.ProgbarLogger)]
        self._boards = [each for each in company if progress and isinstance(each, keras.callbacks.TensorBoard)]
        self._writers: list[tuple[Any, Any]] = []
        self._rounds: dict[int, tuple[int, int, str]] = {}  # its epoch, its place in the lists of History, its status
        self._length = 0

    def epoch_starts(self, last: RoundOutcome | None) -> None:
        """Put the newest round, and how long the leaf waited for its aggregate, into an epoch's progress bar.

        To be called when the epoch's first batch starts: before, the bar does not exist.
        """
        if last is None or not last.round:
            return
        values = [("bk_round", _Figure(last.round, ".0f"))]
        if last.status != "pending":
            values.append(("bk_wait_s", _Figure(last.waited_s, ".1f")))
        for logger in self._bars:
            bar = logger.progbar
            if bar is None:
                continue
            if bar.stateful_metrics is not None:
                bar.stateful_metrics.update(name for name, _ in values)  # shown as they are, not averaged
            shown, bar.verbose = bar.verbose, 0  # takes the values in and prints nothing: the first batch will
            try:
                bar.update(0, values, finalize=False)
            finally:
                bar.verbose = shown

    def epoch_ends(self, epoch: int, outcome: RoundOutcome | None) -> None:
        """Enter an epoch, with the round that it made, if it made one."""
        place, self._length = self._length, self._length + 1
        for history in self._histories:
            for key in _KEYS:
                history.history.setdefault(key, []).append(None)
        if outcome is not None:
            self._rounds[outcome.round] = (epoch, place, "pending")
            self._enter(place, branchkey_round=outcome.round, branchkey_uploaded_mb=0.0)
            self.round_goes_on(outcome)

    def round_goes_on(self, outcome: RoundOutcome) -> None:
        """Bring a round's entry up to date, and TensorBoard too when the round is over."""
        if outcome.round not in self._rounds:
            return  # of a fit before this one
        epoch, place, status = self._rounds[outcome.round]
        if status != "pending" and outcome.status != "applied":
            return  # with wait=False the same round is asked after again and again
        self._rounds[outcome.round] = (epoch, place, outcome.status)
        self._enter(place, branchkey_status=outcome.status, branchkey_wait_s=outcome.waited_s)
        if outcome.uploaded_bytes:  # known at once or, where training does not wait for the upload, later
            self._enter(place, branchkey_uploaded_mb=outcome.uploaded_bytes / 1e6)
        if outcome.status != "pending":
            self._to_boards(epoch, outcome)

    def _enter(self, place: int, **values: object) -> None:
        for history in self._histories:
            for key, value in values.items():
                history.history[key][place - self._length] = value

    def fit_ends(self) -> None:
        """Close what was opened."""
        for _, writer in self._writers:
            writer.close()
        self._writers = []

    def _to_boards(self, epoch: int, outcome: RoundOutcome) -> None:
        if not self._writers:
            # A run of its own beside "train" and "validation": their writers are not for others.
            self._writers = [
                (board.summary, board.summary.create_file_writer(os.path.join(board.log_dir, "branchkey")))
                for board in self._boards
            ]
        scalars = {
            "branchkey/round": outcome.round,
            "branchkey/applied": int(outcome.status == "applied"),
            "branchkey/wait_s": outcome.waited_s,
            "branchkey/uploaded_mb": outcome.uploaded_bytes / 1e6,
        }
        for summary, writer in self._writers:
            # With update_freq=n the callback leaves a condition behind that would drop most of these.
            with writer.as_default(), summary.record_if(condition=True):
                for name, value in scalars.items():
                    summary.scalar(name, value, step=epoch)


class _Figure(float):
    """A number that the progress bar shows as 3 and 0.0, not as 3.0000 and 1.5e-04: it divides, then formats as it likes."""

    def __new__(cls, value: float, form: str) -> _Figure:
        made = super().__new__(cls, value)
        made._form = form
        return made

    _form: str

    def __truediv__(self, other: float) -> _Figure:
        return _Figure(super().__truediv__(other), self._form)

    def __format__(self, spec: str) -> str:
        return format(float(self), self._form)
