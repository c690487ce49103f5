"""Tell which of Lightning's strategies can be served, and where under each the model and its samples are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.torch.sharded import at_rest

_SERVED = frozenset({"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"})
#: Some of these inherit from a strategy that is served, so they are looked for first: DeepSpeed keeps parameters in buffers
#: of its own, and on XLA and HPU nothing happens until the whole step is asked for.
_REFUSED = ("DeepSpeed", "XLA", "HPU")


def require_served(strategy: Any) -> None:
    """Refuse a strategy under which the model's parameters cannot be read and written.

    Raises:
        ConfigurationError: names the strategy.
    """
    # By name, since the two flavours have unrelated classes.
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if not names & _SERVED or any(word in name for word in _REFUSED for name in names):
        raise ConfigurationError(
            what="strategy",
            expected="a single device, DDP, FSDPStrategy or ModelParallelStrategy",
            found=type(strategy).__name__,
            fix='Use Trainer(strategy="ddp"), or strategy="fsdp" for a model that does not fit into one device',
        )


def federated_module(strategy: Any, module: nn.Module) -> nn.Module:
    """Give the module whose parameters are federated: ``module`` itself, or what FSDP1 has wrapped around it."""
    wrapped: nn.Module = strategy.model if _is(strategy, "FSDPStrategy") else module
    return wrapped


def parameters_at_rest(strategy: Any, module: nn.Module) -> list[Tensor]:
    """Give what this rank holds of the parameters, in the same form whenever it is asked for; on every rank."""
    return at_rest(federated_module(strategy, module))


def own_samples(strategy: Any, samples: int | None) -> int | None:
    """Give the samples that no other rank has counted too: ranks that share the layers of one model see the same batch."""
    mesh = getattr(strategy, "device_mesh", None) if _is(strategy, "ModelParallelStrategy") else None
    if samples is None or mesh is None or "tensor_parallel" not in (mesh.mesh_dim_names or ()):
        return samples
    return samples if mesh["tensor_parallel"].get_local_rank() == 0 else 0


def _is(strategy: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(strategy).__mro__)
