"""Make rounds from inside a user's own training loop."""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Union, cast

from torch import nn

from branchkey_integrations.client import Client
from branchkey_integrations.errors import (
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    LayoutError,
    WeightingError,
)
from branchkey_integrations.options import RoundOptions, finite_metrics
from branchkey_integrations.outcome import History, LeafClient, RoundOutcome
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.torch.attentive import Attentive
from branchkey_integrations.torch.distributed import Coordinator
from branchkey_integrations.torch.optimizer import check_optimizers, reset_moments
from branchkey_integrations.torch.parameters import TorchParameters
from branchkey_integrations.torch.sharded import ShardedParameters
from branchkey_integrations.torch.shards import is_sharded

_log = logging.getLogger("branchkey_integrations.torch")

ClientSource = Union[Client, LeafClient, Callable[[], Union[Client, LeafClient]], None]
_NEEDED = ("upload", "mark", "wait_for_aggregation", "open_aggregation")


@dataclass(frozen=True)
class _Absent:
    """Stands for the client on a rank that has none: its engine only mirrors the state of rank 0's."""

    leaf_id: str
    branch_id: str


class BranchKeyHook:
    """Send a model to its branch and load what comes back, once in each epoch of your own loop.

    Weights are read and written in place, so optimizer, scheduler and ``torch.compile`` go on as before. After an aggregate
    is loaded the federated parameters have no gradients, since those belonged to other weights.

    In a distributed job (a process group is initialised before the hook is made) every rank makes the hook and calls
    :meth:`step` alike. Rank 0 alone talks to the platform; samples are summed over the ranks, metrics are those of rank 0,
    and every rank returns the same outcome or raises the same error. Give a function that makes the client: only rank 0
    calls it. A ready client on another rank would take this leaf's notifications away from rank 0; it is closed, with a
    warning. ``Gate(metric=...)`` runs on rank 0 alone and must therefore use the unwrapped model (``ddp.module``). When a
    rank dies, the others raise within seconds, however long they would have waited (with NCCL after its own timeout).

    A model may lie in shards on the ranks (``fully_shard``, FullyShardedDataParallel, tensor parallelism). Its layers are
    those of the whole model; each is put together only while it is read. ``Gate(metric=...)`` then runs on every rank, since
    a forward pass needs them all, and rank 0's value counts.

    Args:
        model: the module, plain or wrapped by DDP, DataParallel or ``torch.compile``, or sharded. A lazy module is checked
            at the first round instead of now.
        client: an open client, or a function without arguments that makes one. The hook closes only what it made.
        optimizer: the optimizer, or several; needed by ``optimizer_state="reset"`` alone.
        options: those of :class:`~branchkey_integrations.options.RoundOptions`; ``progress`` does nothing here.

    Raises:
        ConfigurationError: an option does not exist or cannot work, or nothing of the model is selected.
        LayoutError: a selected parameter cannot be a layer.
    """

    def __init__(self, model: nn.Module, client: ClientSource, *, optimizer: object = None, **options: Any) -> None:
        self._coordinator = Coordinator()
        self._calls = 0
        self._closed = False
        self._owned: Client | LeafClient | None = None
        self.history = History()
        # Each part may fail on one rank alone; the others must hear of it before they wait for that rank.
        self._coordinator.agree(lambda: self._choose(options))
        self._coordinator.agree(lambda: self._check(model, optimizer))
        self._engine = self._open(client)

    @property
    def options(self) -> RoundOptions:
        """How rounds are made."""
        return self._options

    @property
    def round(self) -> int:
        """Number of the last round, from 1; 0 before the first."""
        return self._engine.round

    @property
    def pending(self) -> bool:
        """Whether an update was sent whose aggregate has not been dealt with."""
        return self._engine.pending

    @property
    def last_outcome(self) -> RoundOutcome | None:
        """What became of the last call; also of one that raised, where it got as far as a round."""
        return self.history[-1] if self.history else None

    def step(self, samples: float | None = None, metrics: Mapping[str, Any] | None = None) -> RoundOutcome:
        """Make one round: send the model, wait for the aggregate, check it, load it. Call it at the end of each epoch.

        With ``every_n_epochs=n`` only each n-th call makes a round; the others return ``skipped``.

        Args:
            samples: how many samples this process trained on; needed by ``weighting="samples"``.
            metrics: of the model as it is now, by name; finite numbers go to the platform and to ``weighting=f``.

        Returns:
            What became of it. Unless its status is ``applied`` the model holds its local weights.

        Raises:
            BranchKeyError: with ``on_error="raise"``; parameters, buffers and optimizer are as they were.
        """
        self._require_open()
        # Rank 0 counts for all: a rank that was resumed from another checkpoint would go another way.
        self._calls = 1 + self._coordinator.agree(lambda: self._calls)[0]
        every = self._options.every_n_epochs
        if self._calls % every:
            reason = f"a round each {every} epochs, this was number {self._calls}"
            return self._note(RoundOutcome("skipped", self._engine.round, reason=reason))
        submitted = self._submit(samples, metrics)
        return self._note(submitted if submitted.status != "pending" else self._collect(None))

    def submit(self, samples: float | None = None, metrics: Mapping[str, Any] | None = None) -> RoundOutcome:
        """Do the first half of a round alone: send the model. Arguments and errors as in :meth:`step`.

        Returns:
            ``pending``; ``skipped`` or ``stopped`` when nothing was sent.
        """
        self._require_open()
        return self._note(self._submit(samples, metrics))

    def collect(self, *, wait: bool | None = None) -> RoundOutcome:
        """Do the second half alone: wait for the aggregate, check it, load it. Returns and errors as in :meth:`step`.

        Args:
            wait: False: take what has come, else return ``pending``; None: as the options say.
        """
        self._require_open()
        return self._note(self._collect(wait))

    def report(self, metrics: Mapping[str, Any], *, mode: str) -> None:
        """Send metrics of the aggregate that was loaded last; a platform that does not take them costs a warning.

        Nothing is sent with ``report_metrics=False``. On several ranks every one calls it, and those of rank 0 count.

        Args:
            metrics: by name; finite numbers are sent.
            mode: ``"test"``, ``"train"`` or ``"non-federated"``.
        """
        self._require_open()
        numbers = finite_metrics(metrics)

        def send() -> None:
            about = self._engine.last_applied
            if not numbers or about is None:
                return
            try:
                self._engine.client.send_performance_metrics(about, numbers, mode)
            except ClientClosedError:
                raise
            except BranchKeyError as error:
                _log.warning("round %d: metrics were not taken: %s", self.round, error)

        if self._options.report_metrics:
            self._coordinator.run_on_main(send)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint must hold, as plain types without secrets or weights; the same on every rank."""
        return {"calls": self._calls, "rounds": self._engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint left off, pending round included. Every rank calls it, and rank 0's state counts.

        Raises:
            ConfigurationError: on any rank, it is the state of another leaf or branch, or no state of a hook.
        """

        def load() -> None:
            calls, rounds = state.get("calls"), state.get("rounds")
            if not isinstance(calls, int) or not isinstance(rounds, Mapping):
                found = f"keys {', '.join(map(str, state)) or 'none'}"
                fix = "Pass the state of a BranchKeyHook"
                raise ConfigurationError(what="state", expected="what state_dict() gave", found=found, fix=fix)
            self._engine.load_state_dict(rounds)
            self._calls = calls

        self._coordinator.agree(load)
        # Rank 0 may know more of the pending round, from its journal; the others must see it as pending or not alike.
        known = self._coordinator.run_on_main(self._engine.state_dict)
        if not self._coordinator.is_main:
            self._engine.load_state_dict(known, mirror=True)

    def close(self) -> None:
        """Refuse further rounds, and close the client if the hook made it. May be repeated."""
        self._closed = True
        try:
            self._engine.close()
        finally:
            self._release()

    def _release(self) -> None:
        owned, self._owned = self._owned, None
        if hasattr(owned, "close"):
            cast(Client, owned).close()

    def __enter__(self) -> BranchKeyHook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- making it ---------------------------------------------------------------------------------------------------

    def _choose(self, options: Mapping[str, Any]) -> None:
        self._options = RoundOptions.of(**options)

    def _check(self, model: nn.Module, optimizer: object) -> None:
        self._store: TorchParameters | ShardedParameters
        selection, buffers = self._options.parameters, self._options.buffers
        if isinstance(model, nn.Module) and is_sharded(model):
            self._store = ShardedParameters(model, self._coordinator, parameters=selection, buffers=buffers)
        else:
            self._store = TorchParameters(model, parameters=selection, buffers=buffers)
            if not self._store.is_lazy:
                self._store.layout()
        reset = self._options.optimizer_state == "reset"
        if reset and isinstance(self._store, ShardedParameters):
            self._store.check_separable()
        self._optimizers = check_optimizers(optimizer, self._store.tensors()) if reset else ()

    def _open(self, source: ClientSource) -> RoundEngine:
        engines = []

        def make() -> tuple[str, str]:
            client = source
            # The class itself makes one too, from BRANCHKEY_* variables.
            if isinstance(client, type) or (callable(client) and not hasattr(client, "upload")):
                client = self._owned = client()
            missing = [name for name in _NEEDED if not hasattr(client, name)]
            if missing:
                raise ConfigurationError(
                    what="client",
                    expected="a branchkey_integrations.Client, or a function that makes one",
                    found=f"{type(client).__name__} without {', '.join(missing)}",
                    fix="Make it with branchkey_integrations.Client(credentials)",
                )
            leaf = cast(LeafClient, client)
            if self._coordinator.size > 1:
                leaf = cast(LeafClient, Attentive(leaf, self._coordinator))
            engines.append(RoundEngine(leaf, self._judging_together()))
            return leaf.leaf_id, leaf.branch_id

        try:
            leaf_id, branch_id = self._coordinator.run_on_main(make)
        except BaseException:
            # Nobody gets a hook to close, and what failed may have done so after the client was made.
            for engine in engines:
                engine.close()
            self._release()
            raise
        if engines:
            return engines[0]
        if hasattr(source, "upload") and not isinstance(source, type):
            _log.warning(
                "Rank %d has a client of its own, which would take this leaf's notifications away from rank 0; it is "
                "closed. Pass a function that makes the client instead",
                self._coordinator.rank,
            )
            cast(Client, source).close()
        # Rank 0 alone notes its rounds.
        return RoundEngine(cast(LeafClient, _Absent(leaf_id, branch_id)), replace(self._options, journal=False))

    def _judging_together(self) -> RoundOptions:
        """Give the options of rank 0's engine: of a sharded model the user's metric needs a forward pass of all ranks."""
        gate = self._options.gate
        if gate.metric is None or not isinstance(self._store, ShardedParameters):
            return self._options
        ask = functools.partial(self._coordinator.everywhere, "metric", in_main_thread=True)
        return replace(self._options, gate=replace(gate, metric=ask))

    def _require_open(self) -> None:
        if self._closed:
            raise ClientClosedError(
                what="hook", expected="an open hook", found="a closed one", fix="Make a new BranchKeyHook"
            )

    # --- the two halves ----------------------------------------------------------------------------------------------

    def _submit(self, samples: float | None, metrics: Mapping[str, Any] | None) -> RoundOutcome:
        total = self._align(samples)
        return self._half(lambda: self._engine.submit(self._store, samples=total, metrics=metrics))

    def _collect(self, wait: bool | None) -> RoundOutcome:
        self._align(None)
        outcome = self._half(lambda: self._engine.collect(self._store, wait=wait))
        if outcome.status == "applied":
            tensors = self._store.tensors()
            if isinstance(self._store, TorchParameters):
                self._coordinator.share(tensors)
            for tensor in tensors:
                if tensor.is_leaf and tensor.grad is not None:
                    tensor.grad = None
            if self._optimizers:
                reset_moments(self._optimizers, tensors)
        return outcome

    def _align(self, samples: float | None) -> float | None:
        """Make sure that all ranks hold the same layers, and give the sum of their samples."""
        sharded = self._store if isinstance(self._store, ShardedParameters) else None
        if self._coordinator.size == 1:
            if sharded is not None:
                sharded.refresh()
            return samples

        def mine() -> tuple[str, float | None]:
            try:
                if sharded is not None:
                    sharded.refresh()
                layers = self._store.layout().fingerprint
            except BranchKeyError as error:
                # The same trouble on every rank is for the engine to judge, by the policy for errors.
                layers = str(error)
            return layers, None if samples is None else _count(samples)

        found = self._coordinator.agree(mine)
        for rank, (layers, count) in enumerate(found):
            if layers != found[0][0]:
                raise LayoutError(
                    what=f"model of rank {rank}",
                    expected="the layers that rank 0 has",
                    found="others",
                    fix="Build the same model, with the same parameters frozen, on every rank",
                )
            if (count is None) != (found[0][1] is None):
                raise ConfigurationError(
                    what="samples",
                    expected="a number on every rank, or on none",
                    found=f"{found[0][1]} on rank 0, {count} on rank {rank}",
                    fix="Pass the samples that each rank trained on",
                )
        counts = [count for _, count in found if count is not None]
        return sum(counts) if counts else None

    def _half(self, work: Callable[[], RoundOutcome]) -> RoundOutcome:
        """Do half a round on rank 0 and let every rank know how it ended, error included, and how things stand now."""

        def judged() -> tuple[RoundOutcome | None, BranchKeyError | None, dict[str, Any]]:
            known = self._engine.history.total
            try:
                return work(), None, self._engine.state_dict()
            except BranchKeyError as error:
                new = self._engine.history.since(known)
                return (new[-1] if new else None), error, self._engine.state_dict()

        sharded = self._store if isinstance(self._store, ShardedParameters) else None
        parts = {} if sharded is None else {**sharded.parts, "metric": self._options.gate.score}
        try:
            outcome, error, state = self._coordinator.run_on_main(judged, parts)
        except BaseException:
            if sharded is not None:
                # The others may be gone; what lies on this rank is put right all the same.
                sharded.settle()
            raise
        if sharded is not None:
            sharded.finish()
        if not self._coordinator.is_main:
            self._engine.load_state_dict(state, mirror=True)
        if error is not None:
            if outcome is not None:
                self.history.append(outcome)
            raise error
        return cast(RoundOutcome, outcome)

    def _note(self, outcome: RoundOutcome) -> RoundOutcome:
        self.history.append(outcome)
        return outcome


def _count(samples: Any) -> float:
    value = samples.item() if hasattr(samples, "item") else samples
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0:
        raise WeightingError(
            what="samples",
            expected="a finite number from 0",
            found=repr(samples),
            fix="Pass the number of samples that this rank trained on",
        )
    return cast(float, value)
