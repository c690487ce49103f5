"""Looking at values piece by piece: finite, squared, each of them once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.values import PIECE_BYTES, all_finite, pieces_of, squared_norm

FLOATS = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 7, 14])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: str, bad: float, where: int) -> None:
    values = np.linspace(-3, 3, 15).astype(dtype)
    assert all_finite(values)
    values[where] = bad
    assert not all_finite(values)
    spread = np.zeros(30, dtype)
    spread[::2] = values
    assert not all_finite(spread[::2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_the_smallest_and_zeros_are_finite(dtype: str) -> None:
    limits = np.finfo(dtype)
    tiny = np.nextafter(np.array(0, dtype), np.array(1, dtype))
    assert all_finite(np.array([limits.max, limits.min, tiny, -tiny, 0.0, -0.0], dtype))
    assert all_finite(np.array([], dtype))


@pytest.mark.parametrize("dtype", ["i1", "u8", "?"])
def test_whole_numbers_are_finite(dtype: str) -> None:
    assert all_finite(np.array([0, 1, 1], dtype))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", ">f4"])
@pytest.mark.parametrize("turn", [lambda a: a, lambda a: a.T, lambda a: a[::2, ::-1]], ids=["plain", "T", "strided"])
def test_pieces_hold_each_value_once_and_are_small(dtype: str, turn: Any) -> None:
    array = turn((np.arange(512 * 300) % 2039).reshape(512, 300).astype(dtype))
    pieces = list(pieces_of(array))
    assert max(piece.nbytes for piece in pieces) <= PIECE_BYTES
    assert {piece.dtype for piece in pieces} == {array.dtype}
    assert sorted(np.concatenate(pieces).tolist()) == sorted(array.reshape(-1).tolist())


def test_contiguous_values_are_not_copied() -> None:
    array = np.zeros((100, 1000), "f4")
    assert all(np.shares_memory(piece, array) for each in (array, array.T) for piece in pieces_of(each))


class Stream:
    """A layer that is made in pieces."""

    dtype = np.dtype("f4")

    def pieces(self, items: int) -> Iterator[np.ndarray]:
        yield np.full(min(items, 3), 2.0, "f4")
        yield np.full(1, 5.0, "f4")


def test_a_layer_that_is_made_in_pieces_is_taken_as_it_comes() -> None:
    assert [piece.tolist() for piece in pieces_of(Stream())] == [[2.0, 2.0, 2.0], [5.0]]
    assert squared_norm(Stream()) == 37.0


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", ">f8"])
def test_squares_are_summed_over_all_pieces(dtype: str) -> None:
    array = np.arange(-60_000, 60_000).reshape(300, 400).astype(dtype) if dtype != "f2" else np.ones((300, 400), dtype)
    assert squared_norm(array) == float(np.sum(array.astype("f8") ** 2))
    assert squared_norm(array.T) == squared_norm(array)
    assert squared_norm(np.zeros((0, 3), dtype)) == 0.0
