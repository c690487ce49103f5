"""Layers that are made while they are written, pieces of layers that are read, and who may read a file twice."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.archive_stream import PIECE_BYTES
from branchkey_integrations.errors import ArchiveError
from tests.support import archives
from tests.support.archives import npz


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


class Made:
    """Make the values of an array piece by piece, each in the same memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.flat = array.reshape(-1)
        self.most = 0

    def pieces(self, items: int) -> Iterator[np.ndarray]:
        buffer = np.empty(items, self.dtype)
        self.most = max(self.most, items)
        for start in range(0, self.flat.size, items):
            part = self.flat[start : start + items]
            buffer[: part.size] = part
            yield buffer[: part.size]


class ForwardOnly(io.BytesIO):
    def seekable(self) -> bool:
        return False


RANDOM = np.random.default_rng(3)
ARRAYS: list[Any] = [
    RANDOM.normal(size=(300, 1200)).astype("f4"),  # larger than what is packed in memory
    RANDOM.normal(size=(3, 5)).astype("f2"),
    np.array(2.5),
    np.zeros((0, 4), "f4"),
    np.arange(70_000, dtype=">i8"),
]


@pytest.mark.parametrize("file", [io.BytesIO, ForwardOnly])
@pytest.mark.parametrize("compression", ["deflate", "store"])
def test_a_layer_made_in_pieces_gives_the_bytes_of_the_whole_array(file: Any, compression: Any) -> None:
    made, plain = file(), file()
    streams = [Made(array) for array in ARRAYS]
    told = write_archive(made, streams, 4, compression=compression, finite=True)
    assert told == write_archive(plain, ARRAYS, 4, compression=compression, finite=True)
    assert made.getvalue() == plain.getvalue()
    assert max(stream.most * stream.dtype.itemsize for stream in streams) <= PIECE_BYTES


def test_a_layer_made_in_pieces_is_held_to_finite_numbers() -> None:
    bad = ARRAYS[0].copy()
    bad[299, 1199] = np.inf
    with pytest.raises(ArchiveError, match="layer_1: expected finite numbers only"):
        write_archive(io.BytesIO(), [ARRAYS[1], Made(bad)], 1, finite=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_pieces_are_the_values_in_order_whatever_the_byte_order(compressed: bool) -> None:
    file = io.BytesIO(npz({f"layer_{index}": array for index, array in enumerate(ARRAYS)}, compressed=compressed))
    with Archive.open(file) as archive:
        for index, array in enumerate(ARRAYS):
            pieces = [piece.copy() for piece in archive.pieces(index)]
            assert all(piece.nbytes <= PIECE_BYTES and piece.dtype.isnative for piece in pieces)
            found = np.concatenate([np.empty(0, array.dtype), *pieces])
            assert np.array_equal(found, array.reshape(-1))
            assert archive.in_c_order(index)


def test_fortran_order_is_told_and_read_in_the_order_of_the_file() -> None:
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    with Archive.open(io.BytesIO(npz({"layer_0": array}))) as archive:
        assert not archive.in_c_order(0)
        assert np.concatenate(list(archive.pieces(0))).tolist() == [0, 3, 1, 4, 2, 5]


def test_pieces_of_a_damaged_layer_raise_at_the_end() -> None:
    data = npz({"layer_0": np.arange(500.0)}, compressed=False)
    broken = io.BytesIO(data.replace(np.array([250.0]).tobytes(), np.array([251.5]).tobytes()))
    with Archive.open(broken) as archive, pytest.raises(ArchiveError, match=r"layer_0: .*CRC"):
        list(archive.pieces(0))


class ReadsOnly:
    """A file that cannot fill memory given to it, and gives little at a time."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, 1000))


class FillsALittle(ReadsOnly):
    def readinto(self, view: memoryview) -> int:
        return self._file.readinto(view[:1000])


@pytest.mark.parametrize("kind", [ReadsOnly, FillsALittle])
def test_stored_layers_are_read_from_files_that_give_little_at_a_time(kind: Any) -> None:
    file = io.BytesIO()
    write_archive(file, [ARRAYS[0]], compression="store")
    with Archive.open(kind(file.getvalue())) as archive:
        assert archive[0].tobytes() == ARRAYS[0].tobytes()
    # Cut in the middle of the values, behind a directory that was read already.
    cut = kind(file.getvalue())
    with Archive.open(cut) as archive:
        cut._file.truncate(700_000)
        with pytest.raises(ArchiveError, match="a file that ends too early"):
            archive.read_into(0, np.empty_like(ARRAYS[0]))


def test_an_archive_is_private_only_where_that_is_said(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.npz", [np.zeros(2)])
    with Archive.open(tmp_path / "a.npz") as archive:
        assert (archive.private, archive.checked_for) == (False, None)
    with open(tmp_path / "a.npz", "rb") as file, Archive.open(file, private=True) as archive:
        assert archive.private
