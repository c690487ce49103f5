"""Tell the scores of the weights that are sent from those of other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Elements that are summed at a time; 2 MiB in double precision.
_PIECE = 1 << 18


class Scores:
    """Remember which weights each metric of a validation is of.

    Validation may run before the last steps of an epoch, and callbacks that keep an average of the weights run it on that
    average. Such scores are no scores of what is sent.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Any, Tensor | None]] = {}
        self._before: dict[str, Any] = {}
        self._weights: Tensor | None = None

    def open(self, parameters: Iterable[Tensor], metrics: Mapping[str, Any]) -> None:
        """Note the weights that are about to be validated, and the metrics that were there before."""
        self._weights, self._before = _trace(parameters), dict(metrics)

    def close(self, metrics: Mapping[str, Any]) -> None:
        """Note which metrics came of it."""
        for name, value in metrics.items():
            if self._before.get(name) is not value:
                self._found[name] = (value, self._weights)
        self._before, self._weights = {}, None

    def knows(self, name: str) -> bool:
        """Tell whether ``name`` is a metric that validation logs."""
        return name in self._found

    def of_other_weights(self, parameters: Iterable[Tensor], metrics: Mapping[str, Any]) -> set[str]:
        """Name those of ``metrics`` that came of validating other weights than ``parameters`` are now."""
        found = {name: self._found[name] for name in metrics if name in self._found}
        if not found:
            return set()
        now = _trace(parameters)
        # A metric that training has logged since under the same name is of training.
        return {
            name
            for name, (value, weights) in found.items()
            if float(metrics[name]) == float(value) and (weights is None or not torch.equal(weights, now))
        }


def _trace(parameters: Iterable[Tensor]) -> Tensor:
    """Give the bits of each parameter's sum, which differ wherever training or averaging has moved weights.

    Versions of tensors would cost less, but a write through ``.data`` does not raise them.
    """
    sums: list[Tensor] = []
    with torch.no_grad():
        for parameter in parameters:
            # What a sharded parameter has here is enough, and asks no other rank.
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if local.is_floating_point() and local.layout == torch.strided:
                # In pieces, because on a CPU a sum in a wider type makes a copy in that type.
                whole = local.detach()
                pieces = (whole,) if whole.numel() <= _PIECE else whole.reshape(-1).split(_PIECE)
                sums.extend(piece.sum(dtype=torch.float64).cpu() for piece in pieces)
        return torch.stack(sums).view(torch.int64) if sums else torch.zeros(0, dtype=torch.int64)
