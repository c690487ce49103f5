"""Reach the layers of a model under ``FullyShardedDataParallel`` (FSDP1), whose units torch can put together for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from branchkey_integrations.parameters import LayerSpec, Selector
from branchkey_integrations.torch.names import CanonicalNames
from branchkey_integrations.torch.parameters import describe
from branchkey_integrations.torch.shards import Keep, Shards, is_unit

#: What torch calls the flat parameter of a unit.
_FLAT = "_flat_param"


class _Names:
    """Canonical names of parameters by the module that holds them."""

    def __init__(self, root: nn.Module) -> None:
        self._canonical = CanonicalNames(root)
        self._paths = {id(part): path for path, part in root.named_modules()}

    def __call__(self, owner: nn.Module, attribute: str) -> str:
        path = self._paths[id(owner)]
        return self._canonical(f"{path}.{attribute}" if path else attribute)


class _Place(NamedTuple):
    """Where a layer is found: in which unit (None: outside of all), and under what name in which module."""

    unit: nn.Module | None
    owner: nn.Module
    attribute: str


class UnitShards(Shards):
    """Parameters that lie in the flat parameters of ``FullyShardedDataParallel`` units.

    One unit is whole at a time. ``summon_full_params`` is used and not the state dict of ``torch.distributed.checkpoint``,
    which needs the whole model on rank 0 at once.
    """

    def __init__(self, module: nn.Module, selector: Selector, *, buffers: bool) -> None:
        super().__init__(module, selector, buffers=buffers)
        self._places: list[_Place] = []
        self._left_out: list[tuple[nn.Module | None, str]] = []

    def scan(self) -> list[str]:
        """Look at the model anew, unit by unit."""
        called = _Names(self._module)
        found: dict[int, list[tuple[str, LayerSpec | None, _Place]]] = {}
        for unit, owners in self._units():
            seen: set[int] = set()
            with self._whole(unit, writeback=False):
                for owner in owners:
                    for attribute, parameter in owner.named_parameters(recurse=False):
                        if id(parameter) in seen:
                            continue
                        seen.add(id(parameter))
                        name = called(owner, attribute)
                        chosen = self._selector(name, parameter, parameter.requires_grad)
                        spec = describe(name, parameter) if chosen else None
                        found.setdefault(id(owner), []).append((name, spec, _Place(unit, owner, attribute)))
        self.layers, self._places, self._left_out, names = [], [], [], []
        # Units are no more than a wrapper to the user: the order is that of the model without them.
        for owner in self._module.modules():
            for name, spec, place in found.get(id(owner), ()):
                names.append(name)
                if spec is not None:
                    self.layers.append(spec)
                    self._places.append(place)
                else:
                    self._left_out.append((place.unit, name))
        for name, buffer, owner, attribute in self._placed_buffers():
            self.layers.append(describe(name, buffer))
            self._places.append(_Place(None, owner, attribute))
        units = list(dict.fromkeys(place.unit for place in self._places))
        self.groups = [[index for index, place in enumerate(self._places) if place.unit is unit] for unit in units]
        return names

    def gather(self, group: Sequence[int], keep: Keep) -> None:
        """Put the unit together that holds the group."""
        with self._whole(self._places[group[0]].unit, writeback=False):
            for index in group:
                keep(index, getattr(self._places[index].owner, self._places[index].attribute).detach())

    def scatter(self, group: Sequence[int], values: Sequence[Tensor]) -> None:
        """Write into the whole unit, of which each rank keeps its part."""
        with self._whole(self._places[group[0]].unit, writeback=True), torch.no_grad():
            for index, value in zip(group, values):
                getattr(self._places[index].owner, self._places[index].attribute).copy_(value)

    def pieces(self) -> list[Tensor]:
        """Give the local tensors, selected or not, since units hold both."""
        return self.rest() + [buffer for _, buffer, _, _ in self._placed_buffers()]

    def rest(self) -> list[Tensor]:
        """Give the local tensors of all parameters."""
        # Opened and closed, since after a forward pass without a backward one a unit may lie there whole.
        for unit, _ in self._units():
            with self._whole(unit, writeback=False):
                pass
        return [parameter.detach() for parameter in self._module.parameters()]

    def live(self) -> list[Tensor]:
        """Give the parameters, or the flat ones that hold them."""
        units = {id(place.unit) for place in self._places}
        wanted = {layer.name for layer in self.layers}
        called = _Names(self._module)
        return [
            parameter
            for unit, owners in self._units()
            for owner in owners
            for attribute, parameter in owner.named_parameters(recurse=False)
            # Of a flat parameter (use_orig_params=False) the optimizer knows the whole only.
            if called(owner, attribute) in wanted or (attribute == _FLAT and id(unit) in units)
        ]

    def inseparable(self) -> list[str]:
        """Name the parameters that are not selected and lie in one flat parameter with some that are."""
        selected = {id(place.unit) for place in self._places}
        flat = {
            id(unit)
            for unit, owners in self._units()
            if any(attribute == _FLAT for owner in owners for attribute, _ in owner.named_parameters(recurse=False))
        }
        return [name for unit, name in self._left_out if id(unit) in selected & flat]

    def _units(self) -> Iterator[tuple[nn.Module | None, list[nn.Module]]]:
        """Give each unit with the modules whose parameters it holds, from the outermost inwards, as torch demands."""
        owned: dict[int, list[nn.Module]] = {}
        order: list[nn.Module | None] = [None]
        owned[id(None)] = []

        def walk(part: nn.Module, unit: nn.Module | None) -> None:
            if is_unit(part):
                unit = part
                if id(part) not in owned:
                    owned[id(part)] = []
                    order.append(part)
            if all(part is not known for known in owned[id(unit)]):
                owned[id(unit)].append(part)
            for child in part.children():
                walk(child, unit)

        walk(self._module, None)
        return ((unit, owned[id(unit)]) for unit in order)

    def _placed_buffers(self) -> list[tuple[str, Tensor, nn.Module, str]]:
        known = {id(buffer): name for name, buffer in self.held_buffers()}
        found = []
        for owner in self._module.modules():
            for attribute, buffer in owner.named_buffers(recurse=False):
                name = known.pop(id(buffer), None)
                if name is not None:
                    found.append((name, buffer, owner, attribute))
        return found

    def _whole(self, unit: nn.Module | None, *, writeback: bool) -> contextlib.AbstractContextManager[Any]:
        if unit is None:
            return contextlib.nullcontext()
        from torch.distributed.fsdp import FullyShardedDataParallel

        whole: contextlib.AbstractContextManager[Any] = FullyShardedDataParallel.summon_full_params(
            unit, recurse=False, writeback=writeback
        )
        return whole
