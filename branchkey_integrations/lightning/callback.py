"""Make rounds from inside Lightning's training loop."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning.flavours import adopt, installed_bases
from branchkey_integrations.lightning.samples import count_samples
from branchkey_integrations.lightning.strategies import require_whole_model
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import RoundOutcome
from branchkey_integrations.torch import BranchKeyHook
from branchkey_integrations.torch.hook import ClientSource

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as _Flavours
else:
    # A class of its own between the two, because only such a class can be given another base later.
    _Flavours = type("_Flavours", installed_bases(), {"__module__": __name__})

_log = logging.getLogger("branchkey_integrations.lightning")

#: What ``branchkey/status`` is in a logger, which takes numbers only.
STATUS_CODES = {"applied": 0, "pending": 1, "skipped": 2, "timeout": 3, "rejected": 4, "stopped": 5}


class BranchKeyCallback(_Flavours):
    """Send the model to its branch after each training epoch, and load what comes back before the next one.

    Works in the Trainer of ``lightning.pytorch`` and of ``pytorch_lightning``. The update leaves in
    ``on_train_epoch_end``, after validation, with the metrics of exactly those weights; the aggregate is loaded at the
    start of the next training epoch, and in ``on_train_end`` for the last round, so a checkpoint of an epoch holds the
    weights that had its score. Nothing happens in sanity checks, ``fast_dev_run``, tuner runs, ``validate``, ``test``
    and ``predict``.

    Under DDP rank 0 alone talks to the platform and every rank ends with the same weights, outcome or error. Give a
    function that makes the client then: it is called on rank 0 when training starts, and what it made is closed at the end.

    Loggers get ``branchkey/round``, ``branchkey/wait_s``, ``branchkey/uploaded_mb`` and ``branchkey/status`` (a number,
    see :data:`STATUS_CODES`) for each round. A stopped run stops the Trainer.

    Args:
        client: an open client, or a function without arguments that makes one.
        name: tells several callbacks in one Trainer apart; goes into checkpoints and the names that are logged.
        options: those of :class:`~branchkey_integrations.options.RoundOptions`.

    Raises:
        ConfigurationError: an option does not exist or cannot work; in ``setup``, a strategy that shards the model.
    """

    def __new__(cls, *_: Any, **__: Any) -> BranchKeyCallback:
        """Become a callback of the flavours that were imported after this module."""
        adopt(_Flavours, installed_bases())
        return super().__new__(cls)

    def __init__(self, client: ClientSource, *, name: str | None = None, **options: Any) -> None:
        super().__init__()
        if not callable(client) and not hasattr(client, "upload"):
            raise ConfigurationError(
                what="client",
                expected="a branchkey_integrations.Client, or a function that makes one",
                found=type(client).__name__,
                fix="Make it with branchkey_integrations.Client(credentials)",
            )
        self.options = RoundOptions.of(**options)
        self.history: list[RoundOutcome] = []
        self._client = client
        self._given = options
        self._name = name
        self._hook: BranchKeyHook | None = None
        self._state: Mapping[str, Any] | None = None
        self._epochs = 0
        self._samples: int | None = 0
        self._batches = 0
        self._stale: dict[str, Any] = {}

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
        """Count the samples of a batch; override it where the first tensor's length is not their number."""
        return count_samples(batch)

    # --- when things are made and released ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a strategy that cannot be served, before anything is built."""
        if stage == "fit" and not trainer.fast_dev_run:
            require_whole_model(trainer.strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Connect. Not in ``setup``, which tuner runs and empty fits reach as well."""
        if trainer.fast_dev_run or self._hook is not None:
            return
        optimizers = list(trainer.optimizers) or None
        hook = BranchKeyHook(pl_module, self._client, optimizer=optimizers, **self._given)
        try:
            if self._state is not None:
                hook.load_state_dict(self._state)
            self._require_alone(trainer, hook)
        except BaseException:
            hook.close()
            raise
        self._hook = hook

    def _require_alone(self, trainer: Any, hook: BranchKeyHook) -> None:
        mine = hook.state_dict()["rounds"]["leaf_id"]
        for other in trainer.callbacks:
            if other is not self and isinstance(other, BranchKeyCallback) and other.leaf_id == mine:
                raise ConfigurationError(
                    what="callbacks",
                    expected="a leaf of its own for each BranchKeyCallback",
                    found=f"leaf {mine} twice",
                    fix="Take one of the two out, or give it the credentials of another leaf",
                )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Release what is ours; ``teardown`` does not come after an exception."""
        self._release()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Release what is ours."""
        self._release()

    def _release(self) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            self._state = hook.state_dict()
            hook.close()

    # --- rounds ------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the aggregate of the epoch before."""
        self._collect(trainer)
        # Metrics that nobody logs again in this epoch are of other weights than those that will be sent.
        self._stale = dict(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Count what was really seen."""
        if self._hook is None:
            return
        self._batches += 1
        if self.options.weighting == "samples" and self._samples is not None:
            found = self.count_samples(batch)
            self._samples = None if found is None else self._samples + found

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Send the weights that were just validated."""
        if self._hook is None or self._batches == 0:
            # Without a batch (stopped at the start of an epoch) there is nothing new to send.
            return
        self._epochs += 1
        if self._epochs % self.options.every_n_epochs:
            return
        metrics = {
            name: value for name, value in trainer.callback_metrics.items() if self._stale.get(name) is not value
        }
        samples, self._samples, self._batches = self._samples, 0, 0
        outcome = self._noted(lambda hook: hook.submit(samples=samples, metrics=metrics))
        if outcome.status != "pending":
            self._tell(trainer, outcome)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Load the aggregate of the last epoch."""
        self._collect(trainer)

    def _collect(self, trainer: Any) -> None:
        if self._hook is None or not (self._hook.pending or (self._hook.round and not self.options.wait)):
            return
        self._tell(trainer, self._noted(lambda hook: hook.collect()))

    def _noted(self, half: Any) -> RoundOutcome:
        hook = self._hook
        assert hook is not None  # noqa: S101  callers looked
        known = len(hook.history)
        try:
            outcome: RoundOutcome = half(hook)
            return outcome
        finally:
            self.history.extend(hook.history[known:])

    def _tell(self, trainer: Any, outcome: RoundOutcome) -> None:
        """Let loggers, progress bar and Trainer know how a round ended; on every rank."""
        if outcome.status == "stopped":
            _log.warning("The run was stopped: training ends")
            trainer.should_stop = True
        prefix = "branchkey" if self._name is None else f"branchkey/{self._name}"
        figures = {
            f"{prefix}/round": float(outcome.round),
            f"{prefix}/wait_s": outcome.waited_s,
            f"{prefix}/uploaded_mb": outcome.uploaded_bytes / 1e6,
            f"{prefix}/status": float(STATUS_CODES[outcome.status]),
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        bar = trainer.progress_bar_callback
        wanted = sys.stderr.isatty() if self.options.progress is None else self.options.progress
        if wanted and bar is not None and trainer.is_global_zero:
            megabytes = outcome.uploaded_bytes / 1e6
            bar.print(
                f"{prefix}: round {outcome.round} {outcome.status}, {megabytes:.3g} MB sent, "
                f"{outcome.waited_s:.1f} s waited"
            )

    # --- checkpoints and copies --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold: plain types, no secrets, no weights."""
        state = self._hook.state_dict() if self._hook is not None else self._state
        return {
            "hook": None if state is None else dict(state),
            "epochs": self._epochs,
            "samples": self._samples,
            "batches": self._batches,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a checkpoint left off; whose it is, is checked when training starts."""
        if self._hook is not None and state_dict["hook"] is not None:
            self._hook.load_state_dict(state_dict["hook"])
        self._state = state_dict["hook"]
        self._epochs = state_dict["epochs"]
        self._samples = state_dict["samples"]
        self._batches = state_dict["batches"]

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a spawned process, makes a connection of its own when its training starts.
        return {
            **self.__dict__,
            "_hook": None,
            "_state": self._hook.state_dict() if self._hook is not None else self._state,
            "_stale": {},
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> BranchKeyCallback:
        """Copy everything but the client, which cannot be copied, and what the user's options refer to."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__getstate__().items():
            twin.__dict__[name] = value if name in ("_client", "_given", "options") else copy.deepcopy(value, memo)
        return twin
