"""An ordinary Lightning script on two processes, started as users start theirs; each rank writes down what it saw.

Arguments: a JSON file with URL and credentials of each branch, the folder for reports, the names of the fits to run.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader, TensorDataset

from branchkey_integrations import Client, Gate
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.lightning import BranchKeyCallback

torch.set_num_threads(1)

#: For how long a leaf waits in the fit "long wait", and how long a collective of its process group may take.
LONG_WAIT_S = 20.0
PATIENCE_S = 8.0


class Net(lightning.LightningModule):
    """Rows that two ranks cannot share evenly; fed by random rows of its own seed."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.net(batch[0]) - 1).square().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sharded(Net):
    """The same under FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Split(Net):
    """The same under tensor parallelism: both ranks see every batch."""

    def configure_model(self) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class UnitsOnCpu(FSDPStrategy):
    """Lightning's FSDP without the accelerator that it insists on (and torch does not)."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def rows(seed: int = 1) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(18, 4, generator=torch.Generator().manual_seed(seed))), batch_size=3)


def held_out() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)


def counted(log: str, credentials: dict[str, Any], url: str) -> Client:
    """Make the client, and note which process did."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{os.environ.get('LOCAL_RANK', 0)}\n")
    return Client(credentials, host=url, output_dir=os.path.dirname(log))


def whole(strategy: Any, model: nn.Module) -> list[Any]:
    if isinstance(strategy, FSDPStrategy):
        with type(strategy.model).summon_full_params(strategy.model, writeback=False):
            return [parameter.tolist() for parameter in model.parameters()]
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for p in model.parameters()]


class Reporter(Callback):
    """Write down what this rank ended with, in whatever process it was."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.began = time.monotonic()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.monotonic()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
        self.write(trainer, weights=whole(trainer.strategy, pl_module), error=None, steps=sorted(steps))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.write(trainer, weights=None, error=type(exception).__name__, text=str(exception))

    def write(self, trainer: Any, **more: Any) -> None:
        ours = next(each for each in trainer.callbacks if isinstance(each, BranchKeyCallback))
        report = {
            "statuses": [outcome.status for outcome in ours.history],
            "waited_s": max((outcome.waited_s for outcome in ours.history), default=0.0),
            "round": ours.round,
            "seconds": time.monotonic() - self.began,
            **more,
        }
        Path(self.folder, f"{self.name}.{trainer.global_rank}.json").write_text(json.dumps(report), encoding="utf-8")


class Impatient(Callback):
    """Let collectives fail after :data:`PATIENCE_S` while training goes on; ranks may take longer to start and to end."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE_S))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=300))


def fit(name: str, branches: dict[str, Any], folder: str) -> None:
    made = os.path.join(folder, f"{name}.made")
    client: Any = functools.partial(counted, made, *branches[name])
    options: dict[str, Any] = {"timeout_s": 120}
    epochs = 2
    callbacks: list[Callback] = [Reporter(folder, name)]
    resumed = None
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    model = Net()
    if name == "twenty epochs":
        epochs = 20
    elif name == "refused":
        options["gate"] = Gate(max_norm_ratio=2)
    elif name == "silent":
        options["timeout_s"] = 1.0
    elif name == "long wait":
        callbacks.append(Impatient())
        epochs, options = 1, {"timeout_s": LONG_WAIT_S, "on_error": "keep_local"}
    elif name in ("fully_shard", "checkpointed", "resumed"):
        model = Sharded()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        if name != "fully_shard":
            options["evaluate_aggregate"] = True
            callbacks.append(ModelCheckpoint(folder, save_last=True, monitor="val_loss"))
        if name == "resumed":
            epochs, resumed = 3, os.path.join(folder, "last.ckpt")
    elif name == "tensor parallel":
        model = Split(width=6)
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, process_group_backend="gloo")
    elif name == "units":
        strategy = UnitsOnCpu(process_group_backend="gloo", auto_wrap_policy={nn.Linear})
    elif name in ("ddp_spawn", "ddp_fork"):
        strategy = name
    elif name.startswith("ready"):
        client = Client(branches[name][0], host=branches[name][1], output_dir=folder)
        strategy = "ddp_spawn" if name.endswith("spawn") else "ddp_fork"
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[BranchKeyCallback(client, **options), *callbacks],
        default_root_dir=folder,
    )
    began = time.monotonic()
    error = ""
    try:
        trainer.fit(model, rows(), held_out(), ckpt_path=resumed)
    except (BranchKeyError, TypeError, torch.multiprocessing.ProcessRaisedException) as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        if name.startswith("ready"):
            client.close()
    weights = [parameter.tolist() for parameter in model.parameters()] if "_" in name and "shard" not in name else None
    end = {"error": error, "seconds": time.monotonic() - began, "weights": weights}
    rank = os.environ.get("LOCAL_RANK", "0") if dist.is_initialized() else "parent"
    Path(folder, f"{name}.end.{rank}.json").write_text(json.dumps(end), encoding="utf-8")


def main() -> None:
    branches = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in sys.argv[3:]:
        fit(name, branches, sys.argv[2])
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    # Taking the interpreter apart with torch inside takes seconds, and nothing here is worth saving.
    os._exit(0)


if __name__ == "__main__":
    main()
