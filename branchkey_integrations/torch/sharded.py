"""Offer a model that lies in shards on several ranks as one list of layers (a ``ParameterStore``).

Rank 0 talks to the platform and drives; in each step all ranks take part. No rank holds more than its shards and one layer
(FSDP1: one unit) in the memory of its accelerator. Rank 0 collects what it reads in temporary files, not in main memory,
and what it writes comes from the downloaded archive layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.parameters import Layout, Selection, Selector, headers_of
from branchkey_integrations.torch.distributed import Coordinator
from branchkey_integrations.torch.parameters import numpy_type, stage
from branchkey_integrations.torch.scratch import scratch_array
from branchkey_integrations.torch.shards import Shards, TensorShards, is_sharded, is_unit
from branchkey_integrations.torch.units import UnitShards


class ShardedParameters:
    """Read and write the federated parameters of a sharded model.

    Names, shapes and order are those of the same model without sharding, so that both kinds of leaves share a branch.
    Making one, :meth:`refresh`, :meth:`finish` and :meth:`settle` are for every rank. :meth:`read` and :meth:`write` are
    for rank 0 alone, inside ``coordinator.run_on_main(work, store.parts)``; after it comes one of the other two.

    Args:
        module: the model, wrapped or not.
        coordinator: of the group whose ranks hold the shards.
        parameters: as for :class:`~branchkey_integrations.torch.TorchParameters`; a function is handed what this rank
            holds: the parameter of whole shape for FSDP1, the DTensor for FSDP2.
        buffers: as there; rank 0's are sent, and every rank gets what comes back.

    Raises:
        ConfigurationError, LayoutError: as there.
    """

    is_lazy = False

    def __init__(
        self, module: nn.Module, coordinator: Coordinator, *, parameters: Selection = "all", buffers: bool = False
    ) -> None:
        self._coordinator = coordinator
        self._selector = Selector(parameters)
        self._shards = _shards(module, self._selector, buffers=buffers)
        self._layout = Layout(())
        self._read: dict[int, np.ndarray] = {}
        self._values: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._last: list[np.ndarray] | None = None
        self.refresh()

    @property
    def parts(self) -> Mapping[str, Callable[..., Any]]:
        """What rank 0 asks of every rank while it reads and writes."""
        return {
            "gather": self._gather,
            "remember": self._remember,
            "scatter": self._scatter,
            "finish": self.finish,
            "settle": self.settle,
        }

    def refresh(self) -> None:
        """Look at the model anew, on every rank: what is frozen may have changed since the last round."""
        names = self._shards.scan()
        self._selector.require_some(len(self._shards.layers), names)
        self._layout = Layout(tuple(self._shards.layers))

    def layout(self) -> Layout:
        """Describe the selected parameters, whole, as they were at the last :meth:`refresh`."""
        return self._layout

    def tensors(self) -> list[Tensor]:
        """Give the selected tensors as the optimizer knows them, on any rank."""
        return self._shards.live()

    def check_separable(self) -> None:
        """Demand that the optimizer keeps the selected parameters apart from the others, so that it can forget of them.

        Raises:
            ConfigurationError: flat parameters hold both.
        """
        names = self._shards.inseparable()
        if names:
            raise ConfigurationError(
                what='optimizer_state="reset"',
                expected="an optimizer that keeps the selected parameters apart from the others",
                found=f"flat parameters that hold {names[0]} as well",
                fix="Wrap the model with FullyShardedDataParallel(..., use_orig_params=True)",
            )

    def read(self) -> list[np.ndarray]:
        """Copy the selected parameters into arrays that lie in temporary files where they are large."""
        try:
            for number in range(len(self._shards.groups)):
                self._coordinator.everywhere("gather", number)
            self._last = [self._read[index] for index in range(len(self._layout))]
            return self._last
        finally:
            self._read = {}

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy ``arrays`` into the shards of all ranks: all of them, or none and an error.

        Each rank keeps its former shards, in temporary files where they are large, until all have the new ones; if the
        model was read before, until :meth:`finish`.

        Args:
            arrays: as for :meth:`TorchParameters.write <branchkey_integrations.torch.TorchParameters.write>`. Writing what
                :meth:`read` gave last undoes the write that came after it, on each rank to the bit: what is not sharded
                may differ from rank to rank.

        Raises:
            LayoutError: count, shape, dtype or range does not fit.
        """
        if arrays is self._last and self._before:
            self._coordinator.everywhere("settle")
            return
        self._layout.check_headers(headers_of(arrays))
        self._coordinator.everywhere("remember")
        try:
            for number, group in enumerate(self._shards.groups):
                # Decoded and checked here, in the main thread, where an interrupt does no harm.
                self._values = [
                    stage(self._layout, index, self._empty(index, "meta"), arrays[index]) for index in group
                ]
                self._coordinator.everywhere("scatter", number)
                self._values = []  # before the next are made, since they are as large as a layer
        except BaseException:
            self._coordinator.everywhere("settle")
            raise
        finally:
            self._values = []
        if self._last is None:
            self._coordinator.everywhere("finish")

    def finish(self) -> None:
        """Forget on this rank what it held before."""
        self._before, self._last = [], None

    def settle(self) -> None:
        """Put back what this rank held before the last :meth:`write`, if it is remembered."""
        before, self._before = self._before, []
        for piece, former in before:
            _copy(piece, former)

    # --- on every rank -----------------------------------------------------------------------------------------------

    def _gather(self, number: int) -> None:
        def keep(index: int, tensor: Tensor) -> None:
            if self._coordinator.is_main:
                array = scratch_array(tensor.shape, numpy_type(tensor.dtype))
                torch.from_numpy(array).copy_(tensor)
                self._read[index] = array

        with torch.no_grad():
            self._shards.gather(self._shards.groups[number], keep)

    def _remember(self) -> None:
        self._before = []
        for piece in self._shards.pieces():
            if piece.numel() == 0:
                continue
            former = scratch_array((piece.numel() * piece.element_size(),), np.uint8)
            kept = torch.from_numpy(former).view(piece.dtype).view(piece.shape)
            kept.copy_(piece)
            self._before.append((piece, kept))

    def _scatter(self, number: int) -> None:
        group = self._shards.groups[number]
        values = self._values if self._coordinator.is_main else [self._empty(index, "cpu") for index in group]
        self._coordinator.share(values)
        self._shards.scatter(group, values)

    def _empty(self, index: int, device: str) -> Tensor:
        layer = self._layout.layers[index]
        return torch.empty(layer.shape, dtype=getattr(torch, layer.dtype), device=device)


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(source)


def _shards(module: nn.Module, selector: Selector, *, buffers: bool) -> Shards:
    kind = UnitShards if any(map(is_unit, module.modules())) else TensorShards
    return kind(module, selector, buffers=buffers)


def at_rest(module: nn.Module) -> list[Tensor]:
    """Give what this rank holds of the parameters of ``module``, sharded or not, in the same form whenever it is asked for.

    After a forward pass without a backward one, parts of a sharded model lie there whole; they do not after this. For every
    rank, in the same order.
    """
    if not is_sharded(module):
        return list(module.parameters())
    return _shards(module, Selector(), buffers=False).rest()
