"""Reach the layers of a model of which every rank holds a part: whole for a moment, a few at a time, on every rank at once.

Here is the kind that ``fully_shard`` (FSDP2), tensor parallelism and mixtures of the two make: parameters are DTensors.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from branchkey_integrations.parameters import LayerSpec, Selector
from branchkey_integrations.torch.names import CanonicalNames, is_fully_sharded, persistent_buffers, wrapped_child
from branchkey_integrations.torch.parameters import describe

Keep = Callable[[int, Tensor], None]


class Shards(ABC):
    """What both kinds offer. All but ``live`` are collective: every rank calls them, in the same order."""

    def __init__(self, module: nn.Module, selector: Selector, *, buffers: bool) -> None:
        self.layers: list[LayerSpec] = []
        self.groups: list[list[int]] = []
        self._module = module
        self._selector = selector
        self._buffers = buffers

    @abstractmethod
    def scan(self) -> list[str]:
        """Look at the model anew: set ``layers`` (whole shapes) and ``groups`` (positions that are reached together).

        Returns:
            The names of all parameters, selected or not.
        """

    @abstractmethod
    def gather(self, group: Sequence[int], keep: Keep) -> None:
        """Put the layers of a group together and hand each to ``keep``; afterwards they are shards again."""

    @abstractmethod
    def scatter(self, group: Sequence[int], values: Sequence[Tensor]) -> None:
        """Set the layers of a group to ``values``, whole tensors that are equal on every rank; each keeps its part."""

    @abstractmethod
    def pieces(self) -> list[Tensor]:
        """Give the memory of this rank that ``scatter`` changes, as plain tensors."""

    @abstractmethod
    def rest(self) -> list[Tensor]:
        """Let parts that lie there whole be shards again; give what this rank holds of all parameters."""

    @abstractmethod
    def live(self) -> list[Tensor]:
        """Give the selected tensors as the optimizer knows them."""

    def inseparable(self) -> list[str]:
        """Name the parameters that are not selected, but that the optimizer cannot tell from some that are."""
        return []

    def held_buffers(self) -> list[tuple[str, Tensor]]:
        """Give the selected buffers by name; every rank has its own."""
        if not self._buffers:
            return []
        canonical = CanonicalNames(self._module)
        named = ((canonical(raw), buffer) for raw, buffer in persistent_buffers(self._module))
        return [
            (name, buffer)
            for name, buffer in named
            if buffer.is_floating_point() and self._selector(name, buffer, trainable=True)
        ]


def is_sharded(module: nn.Module) -> bool:
    """Tell whether some parameter of ``module`` is spread over the ranks."""
    return any(is_unit(part) or is_fully_sharded(part) for part in module.modules()) or any(
        map(_is_dtensor, module.parameters())
    )


# By name: importing these classes takes seconds, and where they are in use they have been imported.


def _is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"


def is_unit(module: nn.Module) -> bool:
    """Tell whether ``module`` is a unit of ``FullyShardedDataParallel``."""
    return wrapped_child(module) == "_fsdp_wrapped_module"


def _size_bytes(layer: LayerSpec) -> int:
    size = torch.empty(0, dtype=getattr(torch, layer.dtype)).element_size()
    for length in layer.shape:
        size *= length
    return size


class TensorShards(Shards):
    """Parameters that are DTensors, and plain ones among them, which every rank holds whole."""

    def __init__(self, module: nn.Module, selector: Selector, *, buffers: bool) -> None:
        super().__init__(module, selector, buffers=buffers)
        self._tensors: list[Tensor] = []

    def scan(self) -> list[str]:
        """Look at the model anew."""
        self._reshard()
        canonical = CanonicalNames(self._module)
        names: list[str] = []
        chosen: list[tuple[str, Tensor]] = []
        for raw, parameter in self._module.named_parameters():
            name = canonical(raw)
            names.append(name)
            if self._selector(name, parameter, parameter.requires_grad):
                chosen.append((name, parameter))
        chosen += self.held_buffers()
        self._tensors = [tensor for _, tensor in chosen]
        self.layers = [replace(describe(name, _local(tensor)), shape=tuple(tensor.shape)) for name, tensor in chosen]
        self.groups = _runs(self.layers)
        return names

    def gather(self, group: Sequence[int], keep: Keep) -> None:
        """Put DTensors together one by one."""
        self._reshard()
        for index in group:
            tensor = self._tensors[index].detach()
            if _is_dtensor(tensor):
                distributed: Any = tensor
                # Offloaded to main memory, it can only be sent from where its mesh is.
                tensor = distributed.to(distributed.device_mesh.device_type).full_tensor()
            keep(index, tensor)

    def scatter(self, group: Sequence[int], values: Sequence[Tensor]) -> None:
        """Write this rank's part of each value."""
        self._reshard()
        for index, value in zip(group, values):
            target: Any = self._tensors[index]
            part = value
            if _is_dtensor(target):
                from torch.distributed.tensor import distribute_tensor

                known = inspect.signature(distribute_tensor).parameters
                # Every rank has the whole already; releases that cannot be told so send it once more.
                without = {"src_data_rank": None} if "src_data_rank" in known else {}
                mesh = target.device_mesh
                part = _local(distribute_tensor(value.to(mesh.device_type), mesh, target.placements, **without))
            local = _local(target)
            with torch.inference_mode(local.is_inference()), torch.no_grad():
                local.copy_(part)

    def pieces(self) -> list[Tensor]:
        """Give the local tensors."""
        self._reshard()
        return [_local(tensor) for tensor in self._tensors]

    def live(self) -> list[Tensor]:
        """Give the DTensors themselves."""
        self._reshard()
        return self._tensors

    def rest(self) -> list[Tensor]:
        """Give the local tensors of all parameters."""
        self._reshard()
        return [_local(parameter) for parameter in self._module.parameters()]

    def _reshard(self) -> None:
        # After a forward pass without a backward one (validation) the outermost parameters lie there whole: copies, which
        # know nothing of what is written into the shards, and would be used in the next forward pass.
        for part in self._module.modules():
            if is_fully_sharded(part):
                part.reshard()  # type: ignore[operator]


def _local(tensor: Any) -> Tensor:
    if not _is_dtensor(tensor):
        return tensor.detach()  # type: ignore[no-any-return]
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _runs(layers: Sequence[LayerSpec]) -> list[list[int]]:
    """Take neighbours together as long as they need no more memory than the largest layer alone."""
    limit = max((_size_bytes(layer) for layer in layers), default=0)
    groups: list[list[int]] = []
    filled = 0
    for index, layer in enumerate(layers):
        size = _size_bytes(layer)
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups
