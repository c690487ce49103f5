"""A model of bare numpy arrays, for rounds without a framework."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from branchkey_integrations.errors import LayoutError
from branchkey_integrations.parameters import LayerSpec, Layout


class NumpyStore:
    """Hold named arrays as a model would; ``writes`` counts how often it was written to."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.writes = 0

    def layout(self) -> Layout:
        return Layout(tuple(LayerSpec(name, each.shape, each.dtype.name) for name, each in self.arrays.items()))

    def read(self) -> list[np.ndarray]:
        return [each.copy() for each in self.arrays.values()]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        layout = self.layout()
        layout.check_headers(getattr(arrays, "headers", arrays))
        new = [arrays[index] for index in range(len(layout))]
        for index, array in enumerate(new):
            layout.check_range(index, array)
        for each, array in zip(self.arrays.values(), new):
            each[...] = array
        self.writes += 1

    @property
    def image(self) -> bytes:
        """All bytes of the model."""
        return b"".join(each.tobytes() for each in self.arrays.values())


class RefusingStore(NumpyStore):
    """Find fault with every aggregate when it is written."""

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        raise LayoutError(what="layer_0 (weight)", expected="another", found="this")


def small_store(value: float = 1.0) -> NumpyStore:
    return NumpyStore(weight=np.full((2, 3), value, "f4"), bias=np.full(3, value / 2, "f4"))
