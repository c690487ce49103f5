"""Make rounds from inside Lightning's training loop."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning.averages import tell_of_averages, trains
from branchkey_integrations.lightning.checkpoints import Checkpoints, journal_folder
from branchkey_integrations.lightning.evaluation import require_validation, validate
from branchkey_integrations.lightning.flavours import adopt, callback_of_all_flavours, loaded_bases
from branchkey_integrations.lightning.samples import count_in_each, count_samples
from branchkey_integrations.lightning.scores import Scores
from branchkey_integrations.lightning.shown import STATUS_CODES, Shown, tell_stopped
from branchkey_integrations.lightning.strategies import (
    federated_module,
    own_samples,
    parameters_at_rest,
    require_served,
)
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import History, RoundOutcome
from branchkey_integrations.torch import BranchKeyHook
from branchkey_integrations.torch.hook import ClientSource

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as _Flavours
else:
    # A class of its own between the two, because only such a class can be given another base later.
    _Flavours = callback_of_all_flavours(__name__)

__all__ = ["STATUS_CODES", "BranchKeyCallback"]

_log = logging.getLogger("branchkey_integrations.lightning")


class BranchKeyCallback(_Flavours):
    """Send the model to its branch after each training epoch, and load what comes back before the next one.

    Works in the Trainer of ``lightning.pytorch`` and of ``pytorch_lightning``. The update leaves in
    ``on_train_epoch_end``, after validation, with the metrics of exactly those weights; the aggregate is loaded at the
    start of the next training epoch, and in ``on_train_end`` for the last round, so a checkpoint of an epoch holds the
    weights that had its score. Nothing happens in sanity checks, ``fast_dev_run``, tuner runs, ``validate``, ``test``
    and ``predict``.

    Under DDP, FSDP and model parallelism rank 0 alone talks to the platform, and every rank ends with the same weights,
    outcome or error. Give a function that makes the client then (one that pickles, for ``ddp_spawn``): it is called on
    rank 0 when training starts, and what it made is closed at the end.

    With ``ModelCheckpoint(monitor="val_loss")`` a file holds exactly the weights that had the score in its name: a save at a
    moment at which the known score is of other weights is put off until the next validation.
    ``evaluate_aggregate=True`` validates each aggregate as it is loaded. Its scores are ``branchkey/aggregate/<metric>`` in
    ``trainer.callback_metrics`` and the loggers, the platform gets them as ``test``, and
    ``ModelCheckpoint(monitor="branchkey/aggregate/val_loss")`` keeps the best aggregate, and nothing but aggregates.
    Callbacks and loggers hear nothing of such a validation, and training goes on as if there had been none.

    Loggers get ``branchkey/round``, ``branchkey/wait_s``, ``branchkey/uploaded_mb`` and ``branchkey/status`` (a number,
    see :data:`STATUS_CODES`) for each round, with its ``epoch``, and the progress bar ``bk``: ``3 waiting 12s``,
    ``3 applied 0.5s``. A stopped run stops the Trainer, as soon as ``min_epochs`` and ``min_steps`` let it.

    Args:
        client: an open client, or a function without arguments that makes one.
        name: tells several callbacks in one Trainer apart; goes into checkpoints and the names that are logged.
        evaluate_aggregate: validate each aggregate that is loaded.
        options: those of :class:`~branchkey_integrations.options.RoundOptions`.

    Raises:
        ConfigurationError: an option does not exist or cannot work; in ``setup``, a strategy that cannot be served.
    """

    def __new__(cls, *_: Any, **__: Any) -> BranchKeyCallback:
        """Become a callback of the flavours that were imported after this module."""
        adopt(_Flavours, loaded_bases())
        return super().__new__(cls)

    def __init__(
        self, client: ClientSource, *, name: str | None = None, evaluate_aggregate: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if not callable(client) and not hasattr(client, "upload"):
            raise ConfigurationError(
                what="client",
                expected="a branchkey_integrations.Client, or a function that makes one",
                found=type(client).__name__,
                fix="Make it with branchkey_integrations.Client(credentials)",
            )
        if not isinstance(evaluate_aggregate, bool):
            raise ConfigurationError(
                what="evaluate_aggregate",
                expected="True or False",
                found=repr(evaluate_aggregate),
                fix="Pass evaluate_aggregate=True",
            )
        self.options = RoundOptions.of(**options)
        self.evaluate_aggregate = evaluate_aggregate
        self.history = History()
        self._client = client
        self._process = os.getpid()
        self._given = options
        self._name = name
        self._folder: str | None = None
        self._hook: BranchKeyHook | None = None
        self._state: Mapping[str, Any] | None = None
        self._epochs = 0
        self._epoch = 0  # of the batches that were counted last
        self._samples: int | None = 0
        self._batches = 0
        self._stale: dict[str, Any] = {}
        self._scores = Scores()
        self._told = False
        self._loaders: Any = None
        self._trains: bool | None = None
        self._shown = Shown(name, self.options.progress)
        self._checkpoints = Checkpoints(f"{self._shown.prefix}/aggregate/")

    @property
    def last_outcome(self) -> RoundOutcome | None:
        """What became of the last half round."""
        return self.history[-1] if self.history else None

    @property
    def round(self) -> int:
        """Number of the last round, from 1; 0 before the first."""
        if self._hook is not None:
            return self._hook.round
        return int(self._state["rounds"]["round"]) if self._state else 0

    @property
    def leaf_id(self) -> str | None:
        """Id of the leaf while training goes on, on every rank; None before and after."""
        return None if self._hook is None else str(self._hook.state_dict()["rounds"]["leaf_id"])

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint; the same under both import names."""
        return "BranchKeyCallback" if self._name is None else f"BranchKeyCallback[{self._name}]"

    def count_samples(self, batch: Any) -> int | None:
        """Count the samples of a batch; override it where the first tensor's length is not their number.

        Batches of several loaders (a dictionary of loaders, a ``CombinedLoader``) count together.
        """
        return count_samples(batch) if self._loaders is None else count_in_each(self._loaders, batch)

    # --- when things are made and released ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a strategy or a client that cannot be served, before anything is built."""
        if stage == "fit" and not trainer.fast_dev_run:
            # Here, because Lightning fills in the folders that nobody chose after this.
            self._folder = self._folder or journal_folder(trainer)
            require_served(trainer.strategy)
            self._require_own_client()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Connect. Not in ``setup``, which tuner runs and empty fits reach as well."""
        if trainer.fast_dev_run or self._hook is not None:
            return
        loaders = trainer.train_dataloader
        self._loaders = loaders if isinstance(loaders, (Mapping, list, tuple)) else None
        if self.evaluate_aggregate:
            require_validation(trainer)
        self._checkpoints.watch(trainer, evaluates=self.evaluate_aggregate)
        optimizers = list(trainer.optimizers) or None
        options = {**self._given, "journal": self._folder if self.options.journal is None else self.options.journal}
        module = federated_module(trainer.strategy, pl_module)
        hook = BranchKeyHook(module, self._client, optimizer=optimizers, **options)
        try:
            if self._state is not None:
                hook.load_state_dict(self._state)
            self._require_alone(trainer, hook)
        except BaseException:
            hook.close()
            raise
        self._hook = hook
        if trainer.is_global_zero:
            tell_of_averages(trainer.callbacks, self)
        if self._batches and self._epoch < trainer.current_epoch:
            # The checkpoint was made with the last batch of an epoch, and Lightning does not come back to that epoch's end.
            self.on_train_epoch_end(trainer, pl_module)
            self._collect(trainer, pl_module)

    def _require_own_client(self) -> None:
        if self._process != os.getpid() and not callable(self._client):
            # Its thread did not come along, and its sockets are the parent's.
            raise ConfigurationError(
                what="client",
                expected="a function that makes the client, since this process was forked from another",
                found="a client that was made before",
                fix="Pass functools.partial(Client, credentials) or another function of a module",
            )

    def _require_alone(self, trainer: Any, hook: BranchKeyHook) -> None:
        mine = hook.state_dict()["rounds"]["leaf_id"]
        leaves = [callback for callback in trainer.callbacks if isinstance(callback, BranchKeyCallback)]
        for other in leaves:
            if other is not self and other.leaf_id == mine:
                places = [f"{leaves.index(each) + 1} ({each.state_key})" for each in leaves if each in (self, other)]
                raise ConfigurationError(
                    what="callbacks",
                    expected="a leaf of its own for each BranchKeyCallback",
                    found=f"leaf {mine} in both number {' and number '.join(places)}",
                    fix="Take one of the two out, or give it the credentials of another leaf",
                )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Release what is ours; ``teardown`` does not come after an exception."""
        self._release()
        self._checkpoints.release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Release what is ours."""
        self._release()
        self._checkpoints.release()

    def _release(self) -> None:
        hook, self._hook = self._hook, None
        self._loaders = None
        if hook is not None:
            self._state = hook.state_dict()
            hook.close()

    # --- rounds ------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the aggregate of the epoch before."""
        self._collect(trainer, pl_module)
        # Metrics that nobody logs again in this epoch are of other weights than those that will be sent.
        self._stale = dict(trainer.callback_metrics)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which weights are validated. Not sooner, since others may put an average in their place before."""
        if self._hook is not None and batch_idx == dataloader_idx == 0:
            self._scores.open(parameters_at_rest(trainer.strategy, pl_module), trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note what they scored."""
        if self._hook is not None:
            self._scores.close(trainer.callback_metrics)
            self._checkpoints.after_validation(trainer, self._scores)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count what was really seen."""
        if self._hook is None:
            return
        if batch_idx == 0 or self._trains is None:
            # Once an epoch, since this hook runs for every batch.
            self._trains = trains(trainer)
            self._epoch = trainer.current_epoch
        if not self._trains:
            return
        if self._checkpoints.watches:
            self._checkpoints.before_save(trainer, pl_module, "on_train_batch_end", self._scores)
        self._batches += 1
        if self.options.weighting == "samples" and self._samples is not None:
            found = self.count_samples(batch)
            self._samples = None if found is None else self._samples + found

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Send the weights that were just validated."""
        if self._hook is not None and self._checkpoints.watches:
            self._checkpoints.before_save(trainer, pl_module, "on_train_epoch_end", self._scores)
        if self._hook is None or self._batches == 0:
            # Without a batch (stopped at the start of an epoch) there is nothing new to send.
            return
        self._epochs += 1
        if self._epochs % self.options.every_n_epochs:
            return
        metrics = {
            name: value for name, value in trainer.callback_metrics.items() if self._stale.get(name) is not value
        }
        for name in sorted(self._scores.of_other_weights(parameters_at_rest(trainer.strategy, pl_module), metrics)):
            self._leave_out(name, metrics)
        samples, self._samples, self._batches = self._samples, 0, 0
        outcome = self._noted(lambda hook: hook.submit(samples=own_samples(trainer.strategy, samples), metrics=metrics))
        if outcome.status == "pending":
            self._shown.sent(trainer, outcome)
        else:
            self._tell(trainer, pl_module, outcome)

    def _leave_out(self, name: str, metrics: dict[str, Any]) -> None:
        del metrics[name]
        if not self._told:
            self._told = True
            _log.warning(
                "%s is left out of the metrics of an update, because validation ran on other weights than those that are "
                "sent: on an average, or before the last steps of the epoch",
                name,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Load the aggregate of the last epoch."""
        self._collect(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Load the last aggregate in a resumed fit that had nothing left to train, so that nobody else is called."""
        if self._hook is None and self._state is not None and self._state["rounds"]["pending"]:
            self.on_train_start(trainer, pl_module)
            self._collect(trainer, pl_module)

    def _collect(self, trainer: Any, module: Any) -> None:
        if self._hook is None or not (self._hook.pending or (self._hook.round and not self.options.wait)):
            return
        with self._shown.waiting(trainer, module, self._hook.round):
            outcome = self._noted(lambda hook: hook.collect())
        if outcome.status == "applied" and self.evaluate_aggregate:
            self._evaluate(trainer, module, self._hook)
        self._tell(trainer, module, outcome)

    def _evaluate(self, trainer: Any, module: Any, hook: BranchKeyHook) -> None:
        """Score the aggregate that the model holds now, and let everybody know who asked for it; on every rank."""
        scores = validate(trainer, module)
        figures = {f"aggregate/{name}": value for name, value in scores.items()}
        trainer.callback_metrics.update({f"{self._shown.prefix}/{name}": value for name, value in figures.items()})
        self._shown.figures(trainer, {name: float(value) for name, value in figures.items()}, self._epoch)
        hook.report(scores, mode="test")
        self._checkpoints.save_aggregate(trainer, module)

    def _noted(self, half: Any) -> RoundOutcome:
        hook = self._hook
        assert hook is not None  # noqa: S101  callers looked
        known = hook.history.total
        try:
            outcome: RoundOutcome = half(hook)
            return outcome
        finally:
            self.history.extend(hook.history.since(known))

    def _tell(self, trainer: Any, module: Any, outcome: RoundOutcome) -> None:
        """Let loggers, progress bar and Trainer know how a round ended; on every rank."""
        if outcome.status == "stopped":
            tell_stopped(trainer)
            trainer.should_stop = True
        self._shown.outcome(trainer, module, outcome, self._epoch)

    # --- checkpoints and copies --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold: plain types, no secrets, no weights."""
        state = self._hook.state_dict() if self._hook is not None else self._state
        return {
            "hook": None if state is None else dict(state),
            "epochs": self._epochs,
            "samples": self._samples,
            "batches": self._batches,
            "epoch": self._epoch,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint left off; whose it is, is checked when training starts."""
        if self._hook is not None and state_dict["hook"] is not None:
            self._hook.load_state_dict(state_dict["hook"])
        self._state = state_dict["hook"]
        self._epochs = state_dict["epochs"]
        self._samples = state_dict["samples"]
        self._batches = state_dict["batches"]
        self._epoch = state_dict.get("epoch", 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a spawned process, makes a connection of its own when its training starts. The methods of the module
        # that Lightning puts into every callback would take the module and its Trainer along.
        mine = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {
            **mine,
            "_hook": None,
            "_state": self._hook.state_dict() if self._hook is not None else self._state,
            "_stale": {},
            "_scores": Scores(),
            "_loaders": None,
            "_checkpoints": Checkpoints(f"{self._shown.prefix}/aggregate/"),
        }

    def __copy__(self) -> BranchKeyCallback:
        """Copy as deeply as :func:`copy.deepcopy` does; two callbacks that share a history would both write it."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> BranchKeyCallback:
        """Copy everything but the client, which cannot be copied, and what the user's options refer to."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__getstate__().items():
            twin.__dict__[name] = value if name in ("_client", "_given", "options") else copy.deepcopy(value, memo)
        return twin
