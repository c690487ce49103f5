"""Make rounds from inside ``model.fit``, on any backend of Keras 3."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import keras

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras.company import company_of, hazards, is_fit_of
from branchkey_integrations.keras.connection import Absent, ClientSource, Connection
from branchkey_integrations.keras.display import RoundDisplay
from branchkey_integrations.keras.distribution import check_distribution, warn_of_cluster
from branchkey_integrations.keras.optimizer import moments, reset_moments
from branchkey_integrations.keras.parameters import KerasParameters, check_model
from branchkey_integrations.keras.resume import EpochStates, folder_beside_backup
from branchkey_integrations.keras.samples import check_countable, counted
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import RoundOutcome
from branchkey_integrations.parameters import Layout
from branchkey_integrations.rounds import RoundEngine

_log = logging.getLogger("branchkey_integrations.keras")


class BranchKeyCallback(keras.callbacks.Callback):  # type: ignore[misc]  # keras ships no types
    """Send the model to its branch after each epoch of ``fit``, and load what comes back before the next one.

    The update leaves in ``on_epoch_end``, after validation, with the metrics of exactly those weights; the aggregate is
    loaded at the start of the next epoch, and in ``on_train_end`` for the last round, after ``use_ema`` has put its
    averages into the model. So ``ModelCheckpoint`` files the weights that had the score, before or after this one. Put
    callbacks that change the weights themselves (``EarlyStopping(restore_best_weights=True)``, ``SwapEMAWeights``) before
    this one; a warning at the start of ``fit`` names those that stand wrong. A stopped run sets ``model.stop_training``;
    noticed at the start of an epoch, one more batch is trained and not sent.

    Rounds show in the progress bar's line, in ``History`` and beside a ``TensorBoard`` callback: see
    :class:`~branchkey_integrations.keras.display.RoundDisplay`.

    After an error inside ``fit`` Keras calls nobody: close the client yourself (``with Client(...) as client``), or give a
    function that makes it. A copy shares the client, or makes one with the same function, and starts at round 0; pickling is
    refused, because a connection cannot be sent.

    Args:
        client: an open client, which stays open; or a function without arguments that makes one. It is called when ``fit``
            begins, and what it made is closed when ``fit`` ends; after an error, when the callback is given up or used again.
        options: those of :class:`~branchkey_integrations.options.RoundOptions`; ``progress=False`` keeps rounds
            out of progress bar and TensorBoard, not out of ``History``.

    Raises:
        ConfigurationError: an option does not exist or cannot work; when ``fit`` starts, a model whose samples nobody
            counts with ``weighting="samples"``, an optimizer whose moments are not known with
            ``optimizer_state="reset"``, or a job of several processes (devices of one process are served:
            ``MirroredStrategy``, ``keras.distribution``).
        LayoutError: when ``fit`` starts, a model with nothing to train, or with other weights than in rounds before.
    """

    def __init__(self, client: ClientSource, **options: Any) -> None:
        super().__init__()
        self._connection = Connection(client)
        warn_of_cluster()
        self.options = RoundOptions.of(**options)
        self._engine = self._idle_engine(self._connection)
        self._samples = 0
        self._seen: int | None = 0  # None while an epoch's samples are still to be counted
        self._stopped = False
        self._layout: Layout | None = None
        self._display = RoundDisplay()
        self._shown = False
        self._epochs: EpochStates | None = None
        self._remembered: int | None = None
        self._begun = False

    def __deepcopy__(self, memo: dict[int, Any]) -> BranchKeyCallback:
        """Copy the options, not the run: the copy shares a client that was given, has no model, and starts at round 0."""
        connection = self._connection.again()
        fresh = {
            "options": self.options,  # frozen
            "_connection": connection,
            "_engine": self._idle_engine(connection),
            "_display": RoundDisplay(),
            "_layout": None,
            "_epochs": None,
            "_remembered": None,
            "_model": None,
            "params": None,
        }
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            made.__dict__[name] = fresh[name] if name in fresh else copy.deepcopy(value, memo)
        return made

    def __copy__(self) -> BranchKeyCallback:
        """Copy as :func:`copy.deepcopy` does: two callbacks cannot go on with one run."""
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            what=type(self).__name__,
            expected="to stay in its process: it holds an open connection",
            found="an attempt to pickle it",
            fix="Send credentials and options to the other process, and make Client and callback there. Within a "
            "process, copy.deepcopy() works",
        )

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

    @property
    def leaf_id(self) -> str | None:
        """Id of the leaf whose client this is; None while a function has still to make it."""
        return self._engine.client.leaf_id or None

    def set_model(self, model: Any) -> None:
        """Take the model; a tf_keras model is told here, before its ``fit`` fails on something obscure."""
        check_model(getattr(model, "module", model))
        super().set_model(model)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse what cannot work before anything is trained or sent."""
        model = self.model
        self._samples, self._seen, self._stopped, self._begun = 0, 0, False, False
        check_distribution(model)
        try:
            self._connect(model)
            self._check(model)
        except BaseException:
            self._connection.close()
            raise

    def _check(self, model: keras.Model) -> None:
        if model.weights or not model.trainable:
            # Without any it is a subclassed model, which Keras on TensorFlow builds with the first batch only; then the
            # first round checks it, before anything is sent.
            layout = self._store(model).layout()
            if self._layout is not None:
                self._layout.require_same(layout)
        if self.options.weighting == "samples":
            check_countable(model, inside_fit=is_fit_of(model))
        if self.options.optimizer_state == "reset":
            moments(model.optimizer)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Load the aggregate of the epoch before."""
        self._seen, self._shown = None, False
        self._go_on_from(epoch)
        self._collect()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Show the round when an epoch's first batch begins. Must not ask for ``self.model``: on JAX that costs a sync."""
        if not self._shown and not self._stopped:
            self._shown = True
            self._display.epoch_starts(self.last_outcome)

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Count what was trained on, because validation is about to reset the metrics."""
        if self._counts and self._seen is None:
            self._seen = counted(self.model)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Send the weights that were just validated."""
        model = self.model
        metrics = dict(logs or {})
        if self._counts:
            if self._seen is None:
                self._seen = counted(model, metrics.get("loss"))
            self._samples += self._seen
            self._seen = 0
        if self._stopped or (epoch + 1) % self.options.every_n_epochs:
            self._display.epoch_ends(epoch, None)
            self._remember(epoch)
            return
        samples, self._samples = self._samples, 0
        store = self._store(model)
        outcome = self._noted(
            lambda: self._engine.submit(store, samples=samples if self._counts else None, metrics=metrics),
            lambda outcome: self._display.epoch_ends(epoch, outcome),
        )
        self._layout = self._layout or store.layout()
        self._remember(epoch)
        self._heed(model, outcome)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Load the aggregate of the last round."""
        self._go_on_from(None)
        self._collect()
        if self._remembered is not None:
            # Its aggregate is in the model now: a later fit must not load it over other weights.
            self._remember(self._remembered)
        self._engine.close()
        self._connection.close()
        self._display.fit_ends()

    @property
    def _counts(self) -> bool:
        return self.options.weighting == "samples"

    def _store(self, model: keras.Model) -> KerasParameters:
        return KerasParameters(model, parameters=self.options.parameters, buffers=self.options.buffers)

    def _collect(self) -> None:
        if not self._engine.pending and (self.options.wait or self._engine.round == 0):
            return
        model = self.model
        store = self._store(model)
        outcome = self._noted(lambda: self._engine.collect(store), self._display.round_goes_on)
        if outcome.status == "applied" and self.options.optimizer_state == "reset":
            reset_moments(model.optimizer)
        self._heed(model, outcome)

    def _go_on_from(self, epoch: int | None) -> None:
        """Take up the rounds of a ``fit`` that was killed, once; ``epoch`` is None when no epoch was left to train."""
        if self._begun:
            return
        self._begun = True
        if self._epochs is None or self._engine.round:
            return
        if epoch == 0:
            self._epochs.forget()
            return
        state = self._epochs.newest() if epoch is None else self._epochs.at(epoch)
        if state is not None:
            self._engine.load_state_dict(state["rounds"])
            self._samples = state["samples"]

    def _remember(self, epoch: int) -> None:
        self._remembered = epoch
        if self._epochs is not None:
            self._epochs.put(epoch + 1, {"rounds": self._engine.state_dict(), "samples": self._samples})

    def _idle_engine(self, connection: Connection) -> RoundEngine:
        client = connection.client
        # Without a client there is no leaf whose rounds could be noted.
        return RoundEngine(client, replace(self.options, journal=False) if isinstance(client, Absent) else self.options)

    def _connect(self, model: keras.Model) -> None:
        """Make the client where a function makes it, and go on with the rounds that were made through the one before."""
        known, client = self._engine, self._connection.open()
        if client is known.client:
            self._look_around(model)
            return
        known.close()
        self._engine = RoundEngine(client, self.options)
        self._look_around(model)
        if known.round:
            self._engine.load_state_dict(known.state_dict())
        self._engine.history.extend(known.history)

    def _look_around(self, model: keras.Model) -> None:
        """Warn of callbacks in the wrong order, and find out where to show rounds."""
        company = company_of(self)
        federating = [other for other in company if isinstance(other, BranchKeyCallback)]
        if any(other.leaf_id == self.leaf_id for other in federating if other is not self):
            raise ConfigurationError(
                what="callbacks",
                expected="a leaf of its own for each BranchKeyCallback",
                found=f"leaf {self.leaf_id} twice",
                fix="Take one of the two out, or give it the credentials of another leaf",
            )
        folder = self.options.journal if self.options.journal is not None else folder_beside_backup(company)
        if folder and folder is not True:
            self._engine.note_in(os.fspath(folder))
            self._epochs = EpochStates(os.fspath(folder), self._engine.client.leaf_id)
        for hazard in hazards(self, company, model.optimizer):
            _log.warning("%s", hazard)
        # Names that several share would mix their rounds, so the first alone is shown.
        shown = company if federating[:1] in ([], [self]) else []
        self._display = RoundDisplay(shown, progress=self.options.progress is not False)

    def _noted(self, half: Callable[[], RoundOutcome], enter: Callable[[RoundOutcome], None]) -> RoundOutcome:
        """Make half a round and enter its outcome where it is shown, also when it ends in an error."""
        known = self._engine.history.total
        try:
            return half()
        finally:
            for outcome in self._engine.history.since(known):
                enter(outcome)

    def _heed(self, model: keras.Model, outcome: RoundOutcome) -> None:
        if outcome.status == "stopped":
            self._stopped = True
            model.stop_training = True
