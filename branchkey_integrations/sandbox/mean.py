"""The weighted mean of archives, one layer of one leaf in memory at a time.

FedAvg (McMahan et al. 2017, equation for w_{t+1}): for each element, sum(weighting * value) / sum(weighting) over the
leaves. Products and sums are float64, taken in the order of the leaves; the quotient is rounded once to the layer's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

#: Elements that are widened to float64 at a time, so that no second layer-sized buffer is needed.
_BLOCK = 1 << 15
#: Sums of weightings beyond these would lose products to overflow or underflow.
_SAFE = (2.0**-400, 2.0**400)

Array = np.ndarray[Any, Any]


class Stopped(Exception):
    """The mean was given up because the sandbox closes."""


class WeightedMean(Sequence[Array]):
    """Compute each layer of the mean when it is asked for.

    Args:
        archives: a sequence of layers for each leaf, all with equal shapes; each layer is fetched once for each access.
        weightings: finite numbers above zero, one for each leaf.
        dtypes: dtype of each layer of the result. Floats are rounded once from float64; integers to the nearest, halves to
            even; booleans are True where the mean is above one half.
        stopped: asked before each layer of each leaf; when it says True, :class:`Stopped` is raised.
    """

    def __init__(
        self,
        archives: Sequence[Sequence[Array]],
        weightings: Sequence[float],
        dtypes: Sequence[np.dtype[Any]],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._archives = archives
        self._weightings = [float(weighting) for weighting in weightings]
        self._dtypes = list(dtypes)
        self._stopped = stopped

    def __len__(self) -> int:
        return len(self._dtypes)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._layer(index % len(self))

    def __iter__(self) -> Iterator[Array]:
        return (self._layer(index) for index in range(len(self)))

    def _layer(self, index: int) -> Array:
        dtype = self._dtypes[index]
        total = sum(self._weightings)
        mean = self._sum(index, self._weightings) if _SAFE[0] < total < _SAFE[1] else None
        if mean is not None:
            mean /= total
        if mean is None or not np.isfinite(mean).all():
            # Powers of two change no digit, so this is the same mean with the exponents moved out of harm's way.
            scaled = _scaled(self._weightings)
            mean = self._sum(index, scaled)
            mean /= sum(scaled)
        if dtype.kind == "b":
            return np.asarray(mean > 0.5)
        if dtype.kind in "iu":
            np.rint(mean, out=mean)
            limits = np.iinfo(dtype)
            # 2**63 is a float64 but no int64: what rounds beyond the end stays at the end.
            inside = (mean > float(limits.min)) & (mean < float(limits.max))
            ends = np.where(mean <= float(limits.min), limits.min, limits.max).astype(dtype)
            return np.where(inside, np.where(inside, mean, 0).astype(dtype), ends)
        return mean.astype(dtype, copy=False)

    def _sum(self, index: int, weightings: Sequence[float]) -> Array:
        total: Array | None = None
        for archive, weighting in zip(self._archives, weightings):
            if self._stopped():
                raise Stopped
            layer = np.asarray(archive[index])
            if total is None:
                total = np.zeros(layer.shape, dtype=np.float64)
            into, values = total.reshape(-1), layer.reshape(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                for start in range(0, values.size, _BLOCK):
                    block = values[start : start + _BLOCK].astype(np.float64)
                    block *= weighting
                    into[start : start + _BLOCK] += block
            del layer, values
        assert total is not None  # noqa: S101 - a closed round holds at least one update
        return total


def _scaled(weightings: Sequence[float]) -> list[float]:
    """Multiply all weightings by the power of two that brings their sum to at most one."""
    exponent = math.frexp(max(weightings))[1] + max(1, len(weightings)).bit_length()
    return [math.ldexp(weighting, -exponent) for weighting in weightings]


def common_dtypes(dtypes_of_leaves: Sequence[Sequence[str]]) -> list[np.dtype[Any]]:
    """Give the dtype of each layer of the mean: the one the leaves share, else the smallest that holds all of theirs."""
    return [np.result_type(*(np.dtype(name) for name in names)) for names in zip(*dtypes_of_leaves)]
