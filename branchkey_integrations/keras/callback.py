"""Make rounds from inside ``model.fit``, on any backend of Keras 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras.optimizer import moments, reset_moments
from branchkey_integrations.keras.parameters import KerasParameters, check_model
from branchkey_integrations.keras.samples import check_countable, counted
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import LeafClient, RoundOutcome
from branchkey_integrations.rounds import RoundEngine


class BranchKeyCallback(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """Send the model to its branch after each epoch of ``fit``, and load what comes back before the next one.

    The update leaves in ``on_epoch_end``, after validation, with the metrics of exactly those weights; the aggregate is
    loaded at the start of the next epoch, and in ``on_train_end`` for the last round, after ``use_ema`` has put its
    averages into the model. So ``ModelCheckpoint`` files the weights that had the score. Put callbacks that change the
    weights in ``on_train_end`` (``EarlyStopping(restore_best_weights=True)``) before this one. A stopped run sets
    ``model.stop_training``; noticed at the start of an epoch, one more batch is trained and not sent.

    After an error inside ``fit`` Keras calls nobody: close the client yourself (``with Client(...) as client``).

    Args:
        client: an open client; it stays open.
        options: those of :class:`~branchkey_integrations.options.RoundOptions`; ``progress`` does nothing here.

    Raises:
        ConfigurationError: an option does not exist or cannot work; when ``fit`` starts, a model whose samples nobody
            counts with ``weighting="samples"``, or an optimizer whose moments are not known with
            ``optimizer_state="reset"``.
        LayoutError: when ``fit`` starts, a model with nothing to train.
    """

    def __init__(self, client: LeafClient, **options: Any) -> None:
        super().__init__()
        if not hasattr(client, "upload"):
            raise ConfigurationError(
                what="client",
                expected="a branchkey_integrations.Client",
                found=type(client).__name__,
                fix="Make it with branchkey_integrations.Client(credentials)",
            )
        self.options = RoundOptions.of(**options)
        self._engine = RoundEngine(client, self.options)
        self._samples = 0
        self._seen: int | None = 0  # None while an epoch's samples are still to be counted
        self._stopped = False

    @property
    def history(self) -> list[RoundOutcome]:
        """What became of each half round, oldest first."""
        return self._engine.history

    @property
    def last_outcome(self) -> RoundOutcome | None:
        """What became of the last half round."""
        return self._engine.last_outcome

    @property
    def round(self) -> int:
        """Number of the last round, from 1; 0 before the first."""
        return self._engine.round

    def set_model(self, model: Any) -> None:
        """Take the model; a tf_keras model is told here, before its ``fit`` fails on something obscure."""
        check_model(getattr(model, "module", model))
        super().set_model(model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse what cannot work before anything is trained or sent."""
        model = self.model
        self._samples, self._seen, self._stopped = 0, 0, False
        if model.weights:
            # Without any it is a subclassed model, which Keras on TensorFlow builds with the first batch only; then the
            # first round checks it, before anything is sent.
            self._store(model).layout()
        if self.options.weighting == "samples":
            check_countable(model)
        if self.options.optimizer_state == "reset":
            moments(model.optimizer)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Load the aggregate of the epoch before."""
        self._seen = None
        self._collect()

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Count what was trained on, because validation is about to reset the metrics."""
        if self._counts and self._seen is None:
            self._seen = counted(self.model)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Send the weights that were just validated."""
        model = self.model
        metrics = dict(logs or {})
        if self._counts:
            self._samples += counted(model, metrics.get("loss")) if self._seen is None else self._seen
            self._seen = 0
        if self._stopped or (epoch + 1) % self.options.every_n_epochs:
            return
        samples, self._samples = self._samples, 0
        outcome = self._engine.submit(self._store(model), samples=samples if self._counts else None, metrics=metrics)
        self._heed(model, outcome)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Load the aggregate of the last round."""
        self._collect()

    @property
    def _counts(self) -> bool:
        return self.options.weighting == "samples"

    def _store(self, model: keras.Model) -> KerasParameters:
        return KerasParameters(model, parameters=self.options.parameters, buffers=self.options.buffers)

    def _collect(self) -> None:
        if not self._engine.pending and (self.options.wait or self._engine.round == 0):
            return
        model = self.model
        outcome = self._engine.collect(self._store(model))
        if outcome.status == "applied" and self.options.optimizer_state == "reset":
            reset_moments(model.optimizer)
        self._heed(model, outcome)

    def _heed(self, model: keras.Model, outcome: RoundOutcome) -> None:
        if outcome.status == "stopped":
            self._stopped = True
            model.stop_training = True
