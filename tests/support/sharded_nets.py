"""A model with everything that sharding has trouble with, and the ways to shard it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from branchkey_integrations import Client
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.sandbox import Sandbox

torch.set_num_threads(1)


class Net(nn.Module):
    """Rows that two ranks cannot share evenly, fewer rows than ranks, tied, frozen and 0-d parameters, a BatchNorm."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.words = nn.Embedding(7, 5)
        self.body = nn.Sequential(nn.Linear(5, 3), norm(3), nn.Linear(3, 5))
        self.frozen = nn.Linear(5, 1)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.words(tokens) * self.scale
        return self.out(self.body(hidden) + self.frozen(hidden))


def plain(seed: int = 0, dtype: torch.dtype = torch.float32, norm: type[nn.Module] = nn.BatchNorm1d) -> Net:
    torch.manual_seed(seed)
    net = Net(norm)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return net.to(dtype)


def fully_sharded(
    seed: int = 0, dtype: torch.dtype = torch.float32, norm: type[nn.Module] = nn.BatchNorm1d, **options: object
) -> Net:
    """Shard as FSDP2 does: the body as a unit, and the rest; the 0-d parameter stays whole, as torch demands."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = plain(seed, dtype, norm)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(net.body, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, ignored_params={net.scale}, **options)
    return net


def in_units(seed: int = 0, *, original: bool = True) -> nn.Module:
    """Shard as FSDP1 does: the body as a unit inside another, and some outside of all."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = plain(seed)
    settings = {"device_id": torch.device("cpu"), "use_orig_params": original}
    net.body = FullyShardedDataParallel(net.body, **settings)
    # No flat parameter may hold frozen and trained ones, and none a 0-d one.
    kept = [net.scale] if original else [net.scale, *net.frozen.parameters()]
    return FullyShardedDataParallel(net, ignored_states=kept, **settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = 2) -> None:
    torch.manual_seed(100 + rank)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 7, (6,))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()


def tensor_parallel() -> tuple[nn.Module, nn.Module]:
    """Give a model split over two ranks, and the same model whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    twin, model = (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2))
    model.load_state_dict(twin.state_dict())
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan), twin


KINDS = ["fully_shard", "fully_shard with bfloat16 passes", "units", "flat units"]


def make(kind: str, seed: int = 0) -> nn.Module:
    """Give the model sharded in one of the ways of ``KINDS``."""
    if kind == "fully_shard":
        return fully_sharded(seed)
    if kind == "fully_shard with bfloat16 passes":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Not with BatchNorm, which mixes no types on a CPU.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        return fully_sharded(seed, norm=nn.LayerNorm, mp_policy=policy)
    return in_units(seed, original=kind == "units")


def connect(at: tuple[str, dict[str, Any]]) -> Callable[[], Client]:
    url, credentials = at
    return lambda: Client(credentials, host=url, quarantine_dir=False)


def where(branch: Sandbox, leaf: int = 0) -> tuple[str, dict[str, Any]]:
    return branch.url, branch.credentials[leaf].to_dict()


def whole(model: nn.Module) -> list[Any]:
    """All parameters and statistics, put together by other means than those under test."""
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        for part in model.modules():
            if hasattr(part, "reshard"):
                part.reshard()
        found = [(p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for p in model.parameters()]
    else:
        with type(model).summon_full_params(model, writeback=False):
            found = [parameter.tolist() for parameter in model.parameters()]
    return found + [b.tolist() for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]


def pieces(model: nn.Module) -> list[bytes]:
    """The bytes of this rank alone."""
    for part in model.modules():
        if type(part).__name__.startswith("FSDP"):
            part.reshard()
    local = [p.to_local() if hasattr(p, "to_local") else p for p in [*model.parameters(), *model.buffers()]]
    return [tensor.detach().clone().numpy().tobytes() for tensor in local]


def moments(optimizer: torch.optim.Optimizer) -> list[Any]:
    found = []
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            value = state[name]
            found.append((value.to_local() if hasattr(value, "to_local") else value).tolist())
    return found


def caught(work: Callable[[], object]) -> tuple[str, str] | None:
    try:
        work()
    except BranchKeyError as error:
        return type(error).__name__, str(error)
    return None


def answer_with(branch: Sandbox, value: float, last: float | None = None) -> threading.Thread:
    """Publish an aggregate full of ``value`` when the update has come."""
    shapes = [tuple(p.shape) for p in plain().parameters()]
    layers = [np.full(shape, value, np.float32) for shape in shapes]
    if last is not None:
        layers[-1][...] = last

    def answer() -> None:
        branch.wait_for(lambda: branch.uploads, 60)
        branch.publish(layers)

    answering = threading.Thread(target=answer)
    answering.start()
    return answering
