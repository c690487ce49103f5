"""What an adapter offers to the round engine: a store of parameters, and the layout that must not change.

Nothing here knows a framework. An adapter's store reads its model into owned numpy arrays and writes arrays back in
place; the layout says which position of the archive is which parameter.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Union

import numpy as np

from branchkey_integrations.errors import ConfigurationError, LayoutError

#: Largest finite value of each float type that numpy lacks (ml_dtypes and torch agree on them).
_LARGEST: dict[str, float] = {"bfloat16": 3.3895313892515355e38, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
_SHOWN_DIFFERENCES = 5
#: Half a megabyte of names in a checkpoint.
_MOST_IN_STATE = 5_000


@dataclass(frozen=True)
class LayerSpec:
    """Describe one layer: the user's name for it, its shape, and the dtype it has in the model (``float32``, ``bfloat16``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @property
    def largest(self) -> float:
        """Largest finite value that the dtype holds; exact, so an int for integers."""
        return self._limits[1]

    @property
    def lowest(self) -> float:
        """Lowest finite value that the dtype holds."""
        return self._limits[0]

    @property
    def _limits(self) -> tuple[float, float]:
        if self.dtype in _LARGEST:
            return -_LARGEST[self.dtype], _LARGEST[self.dtype]
        kind = np.dtype(self.dtype)
        if kind.kind in "fc":
            return float(np.finfo(kind).min), float(np.finfo(kind).max)
        return (int(np.iinfo(kind).min), int(np.iinfo(kind).max)) if kind.kind in "iu" else (0, 1)

    @property
    def is_float(self) -> bool:
        """Tell whether the layer holds real floating-point numbers."""
        return self.dtype in _LARGEST or np.dtype(self.dtype).kind == "f"


class HasShape(Protocol):
    """Anything with a shape and a dtype: an array, or the header of one in an archive."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    @property
    def dtype(self) -> Any:
        """A dtype that numpy understands."""
        ...


@dataclass(frozen=True)
class Layout:
    """Say which layer stands at which position; two layouts are equal when every name, shape and dtype is."""

    layers: tuple[LayerSpec, ...]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the ordered names, shapes and dtypes."""
        text = json.dumps(
            [[layer.name, list(layer.shape), layer.dtype] for layer in self.layers], separators=(",", ":")
        )
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def to_plain(self) -> list[list[Any]] | None:
        """Give the layers as lists of name, shape and dtype for a checkpoint; None when they are too many for one."""
        if len(self) > _MOST_IN_STATE:
            return None
        return [[layer.name, list(layer.shape), layer.dtype] for layer in self.layers]

    @classmethod
    def from_plain(cls, layers: Sequence[Sequence[Any]]) -> Layout:
        """Make a layout of what :meth:`to_plain` gave."""
        return cls(tuple(LayerSpec(str(name), tuple(map(int, shape)), str(dtype)) for name, shape, dtype in layers))

    def differences(self, other: Layout) -> list[str]:
        """Describe, a line each, what changed from this layout to ``other``."""
        lines = []
        if len(self) != len(other):
            before, after = ({layer.name for layer in each.layers} for each in (self, other))
            odd = [layer.name for layer in (*self.layers, *other.layers) if layer.name in before ^ after]
            shown = ", ".join(odd[:_SHOWN_DIFFERENCES]) + (" and more" if len(odd) > _SHOWN_DIFFERENCES else "")
            lines.append(f"{len(self)} layers became {len(other)}" + (f": {shown}" if odd else ""))
        for index, (mine, theirs) in enumerate(zip(self.layers, other.layers)):
            if mine != theirs:
                lines.append(f"layer_{index} was {mine}, is {theirs}")
        return lines

    def require_same(self, other: Layout) -> None:
        """Demand that ``other`` is this layout.

        Raises:
            LayoutError: names the first layers that differ.
        """
        lines = self.differences(other)
        if lines:
            more = f" (and {len(lines) - _SHOWN_DIFFERENCES} more)" if len(lines) > _SHOWN_DIFFERENCES else ""
            raise LayoutError(
                what="layout of the model",
                expected="the same layers in every round",
                found="; ".join(lines[:_SHOWN_DIFFERENCES]) + more,
                fix="Keep the model and the selection of parameters as they were in the first round",
            )

    def check_headers(self, headers: Sequence[HasShape]) -> None:
        """Demand that the layers fit by count, shape and kind of dtype.

        Raises:
            LayoutError: names the first layer that does not fit, what was expected and what was found.
        """
        if len(headers) != len(self):
            raise LayoutError(
                what="aggregate",
                expected=f"{len(self)} layers",
                found=f"{len(headers)}",
                fix="All leaves of a branch need the same model and the same choice of parameters",
            )
        for index, (layer, header) in enumerate(zip(self.layers, headers)):
            dtype = np.dtype(header.dtype)
            if tuple(header.shape) != layer.shape:
                raise LayoutError(
                    what=f"layer_{index} ({layer.name})",
                    expected=f"shape {layer.shape}",
                    found=f"shape {tuple(header.shape)}",
                    fix="All leaves of a branch need the same model",
                )
            if dtype.kind not in ("fiub" if layer.is_float else "iub"):
                raise LayoutError(
                    what=f"layer_{index} ({layer.name})",
                    expected=f"numbers that can become {layer.dtype}",
                    found=f"dtype {dtype}",
                    fix="All leaves of a branch need the same model",
                )

    def check_range(self, index: int, array: np.ndarray) -> None:
        """Demand that every finite value of layer ``index`` lies in the range of its parameter's dtype.

        Raises:
            LayoutError: names the layer, the range allowed and the value found. NaN and inf are the gate's business.
        """
        layer = self.layers[index]
        if array.size == 0:
            return
        if layer.is_float and array.dtype.kind == "f" and float(np.finfo(array.dtype).max) <= layer.largest:
            return
        # Lowest and highest apart, never abs(): the lowest integer of a type has no absolute value in it.
        ends: tuple[float, float]
        if array.dtype.kind == "f":
            finite = np.isfinite(array)
            ends = float(np.min(array, initial=0.0, where=finite)), float(np.max(array, initial=0.0, where=finite))
        else:
            ends = int(array.min()), int(array.max())
        for value in ends:
            if not layer.lowest <= value <= layer.largest:
                raise LayoutError(
                    what=f"layer_{index} ({layer.name})",
                    expected=f"values from {layer.lowest:g} to {layer.largest:g}, the range of {layer.dtype}",
                    found=f"{value:g}",
                    fix="This model's parameter cannot hold the value; nothing was loaded",
                )

    def check(self, arrays: Sequence[np.ndarray]) -> None:
        """Demand that ``arrays`` can be written into this layout without broadcasting, truncating or overflowing."""
        self.check_headers(arrays)
        for index, array in enumerate(arrays):
            self.check_range(index, array)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


def headers_of(arrays: Sequence[np.ndarray]) -> Sequence[HasShape]:
    """Describe ``arrays`` without keeping them; an archive knows its headers without decoding anything."""
    known = getattr(arrays, "headers", None)
    if known is not None:
        return tuple(known)
    found = []
    for index, array in enumerate(arrays):
        if not isinstance(array, (np.ndarray, np.generic)):
            raise LayoutError(
                what=f"layer_{index}",
                expected="a numpy array",
                found=type(array).__name__,
                fix="Convert it first; nothing was loaded",
            )
        found.append(_Header(array.shape, array.dtype))
    return found


class ParameterStore(Protocol):
    """Read and write the federated parameters of one live model.

    A store may also have ``view()``, see :func:`view_of`.
    """

    def layout(self) -> Layout:
        """Describe the selected parameters in order, from the model as it is now."""
        ...

    def read(self) -> list[np.ndarray]:
        """Copy the selected parameters out, in layout order, as arrays that nothing else refers to.

        Types that numpy lacks (bfloat16, float8) come widened to float32, exactly.
        """
        ...

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy ``arrays`` into the parameters in place: all of them, or none and an error.

        Raises:
            LayoutError: count, shape, dtype or range does not fit; nothing was written.
        """
        ...


def view_of(store: ParameterStore) -> Sequence[Any]:
    """Give a store's layers without a copy where it offers that (``view()``), else as :meth:`ParameterStore.read`.

    Each is an array, or a stream that ``write_archive`` takes. The model must not change until they are used up.
    """
    view: Callable[[], Sequence[Any]] | None = getattr(store, "view", None)
    return store.read() if view is None else view()


Selection = Union[str, Sequence[str], Callable[[str, Any], bool]]


@dataclass(frozen=True)
class Selector:
    """Decide which parameters are federated.

    Args:
        selection: ``"all"``, ``"trainable"``, one glob pattern, several, or ``f(name, tensor) -> bool``. Patterns match
            the whole name, case-sensitively: ``"encoder.*"``, ``["*.lora_*", "head.bias"]``.
    """

    selection: Selection = "all"

    def __post_init__(self) -> None:
        chosen = self.selection
        is_patterns = (
            isinstance(chosen, Sequence)
            and not isinstance(chosen, (str, bytes))
            and bool(chosen)
            and all(isinstance(pattern, str) and pattern for pattern in chosen)
        )
        if not (callable(chosen) or (isinstance(chosen, str) and chosen) or is_patterns):
            raise ConfigurationError(
                what="parameters",
                expected='"all", "trainable", glob patterns or f(name, tensor) -> bool',
                found=repr(chosen),
                fix='Pass for example parameters="trainable" or parameters=["encoder.*"]',
            )

    def __call__(self, name: str, tensor: Any, trainable: bool) -> bool:
        """Tell whether the parameter ``name`` is federated."""
        chosen = self.selection
        if callable(chosen):
            return bool(chosen(name, tensor))
        if chosen == "all":
            return True
        if chosen == "trainable":
            return trainable
        patterns = [chosen] if isinstance(chosen, str) else chosen
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    def require_some(self, count: int, names: Sequence[str]) -> None:
        """Demand that the selection kept at least one parameter of ``names``."""
        if count == 0:
            some = ", ".join(names[:_SHOWN_DIFFERENCES]) + (", …" if len(names) > _SHOWN_DIFFERENCES else "")
            raise ConfigurationError(
                what=f"parameters={self.selection!r}" if not callable(self.selection) else "parameters (your function)",
                expected="at least one parameter of the model",
                found=f"none among {len(names)} ({some})" if names else "a model without parameters",
                fix="Correct the selection, or build the model first",
            )
