"""Look at the numbers of an array, a piece that fits the processor's cache at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

#: Bytes looked at in one go: larger pieces fall out of the cache, smaller ones cost more calls than work.
PIECE_BYTES = 128 * 1024


def pieces_of(array: Any) -> Iterator[np.ndarray]:
    """Give the values of an array, or of a layer that is made in pieces anyway, as flat pieces in any order.

    No copy is made where the values lie side by side.
    """
    if not isinstance(array, np.ndarray) and hasattr(array, "pieces"):
        yield from array.pieces(PIECE_BYTES // array.dtype.itemsize)
        return
    flat = array.ravel(order="K")
    items = max(PIECE_BYTES // array.dtype.itemsize, 1)
    yield from (flat[start : start + items] for start in range(0, flat.size, items))


def all_finite(piece: np.ndarray) -> bool:
    """Tell whether no value of a piece is NaN or infinite; true for whole numbers."""
    dtype = piece.dtype
    if dtype.kind != "f":
        return True
    if dtype.itemsize == 2 and dtype.isnative and piece.flags.c_contiguous:
        # numpy widens half floats one by one; their bits tell as much, seven times faster: an exponent of ones is no number.
        bits = piece.view(np.uint16) & np.uint16(0x7FFF)
        return not bits.size or int(bits.max()) < 0x7C00
    return bool(np.isfinite(piece).all())


def squared_norm(array: Any) -> float:
    """Sum the squares in float64, without a float64 copy of the whole array."""
    return sum(map(_squares, pieces_of(array)), 0.0)


def _squares(piece: np.ndarray) -> float:
    wide = piece.astype(np.float64)
    # einsum and not dot, which starts threads of its own for a piece of this size and makes them spin.
    return float(np.einsum("i,i->", wide, wide))
