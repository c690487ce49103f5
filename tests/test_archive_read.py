"""Reading layers by position: into owned arrays, into given memory, from several threads."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import (
    Archive,
    write_archive,
)
from branchkey_integrations.errors import ArchiveError
from tests.support import archives


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


def test_reading_into_memory_casts_between_floats_only() -> None:
    archive = Archive.open(
        io.BytesIO(archives.npz({"layer_0": np.array([[1.5, np.nan, -2]]), "layer_1": np.arange(3)}))
    )
    for dtype in ("f2", "f4", "f8"):
        out = np.zeros((1, 3), dtype)
        archive.read_into(0, out)
        assert out.tolist()[0][::2] == [1.5, -2.0]
        assert np.isnan(out[0, 1])
    strided = np.zeros((2, 6), "f4")
    archive.read_into(0, strided[:1, ::2])
    assert strided[0, ::2].tolist()[0] == 1.5
    assert not strided[0, 1::2].any()
    assert not strided[1].any()
    floats = np.zeros(3, "f4")
    archive.read_into(1, floats)
    assert floats.tolist() == [0, 1, 2]
    integers = np.zeros((1, 3), "i4")
    with pytest.raises(ArchiveError, match=r"layer_0: .*float64.*found int32"):
        archive.read_into(0, integers)


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [(70000.0, "f2", "65504"), (1e300, "f4", "3.4"), (-1e300, "f4", "3.4"), (300, "i1", "127")],
)
def test_values_too_large_for_the_target_are_refused_before_a_write(value: float, dtype: str, shown: str) -> None:
    archive = Archive.open(io.BytesIO(archives.npz({"layer_0": np.array([1, value])})))
    out = np.full(2, 7, dtype)
    with pytest.raises(ArchiveError, match=f"layer_0: .*{shown}.*found -?[0-9.e+]+"):
        archive.read_into(0, out)
    assert out.tolist() == [7, 7]


def test_reading_into_other_shapes_is_refused() -> None:
    archive = Archive.open(io.BytesIO(archives.npz({"layer_0": np.zeros((1, 3))})))
    for shape in [(3, 1), (3,), (2, 3), ()]:
        with pytest.raises(ArchiveError, match="layer_0: expected shape"):
            archive.read_into(0, np.zeros(shape))
    frozen = np.zeros((1, 3))
    frozen.flags.writeable = False
    with pytest.raises(ArchiveError, match="read-only"):
        archive.read_into(0, frozen)


def test_positions_are_those_of_a_sequence() -> None:
    archive = Archive.open(io.BytesIO(archives.npz(archives.layers(3))))
    assert archive[-1][0, 0] == 2
    assert [layer[0, 0] for layer in archive[::-1]] == [2, 1, 0]
    assert len(archive[1:]) == 2
    for index in (3, -4):
        with pytest.raises(IndexError):
            archive[index]


def test_a_member_with_its_sizes_behind_the_data_is_read() -> None:
    class Forward(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: Any) -> int:
            raise io.UnsupportedOperation

    target = Forward()
    np.savez_compressed(target, **archives.layers(3, weighting=4.0))
    assert target.getvalue()[6] & 8
    archive = Archive.open(io.BytesIO(target.getvalue()))
    archive.check()
    assert [layer[0, 0] for layer in archive] == [0, 1, 2]
    assert archive.weighting == 4.0


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (np.array([3.0]), 3.0),
        (np.array(3), 3.0),
        (np.array([[2.5]], ">f4"), 2.5),
        (np.array([np.nan]), None),
        (np.array(["3"]), None),
        (np.array([True]), None),
        (np.array([1.0, 2.0]), None),
        (np.array([]), None),
        (np.array([3j]), None),
    ],
)
def test_the_weighting_is_read_where_it_is_one_number(stored: np.ndarray, read: float | None) -> None:
    archive = Archive.open(io.BytesIO(archives.npz({"weighting": stored, **archives.layers(1)})))
    assert archive.extras == ("weighting",)
    if read is None and stored.dtype == float and stored.size == 1:
        assert archive.weighting is not None
        assert np.isnan(archive.weighting)
    else:
        assert archive.weighting == read


def test_unknown_members_are_ignored_and_not_counted() -> None:
    extra = {
        "__bk_payload_kind__": np.array("federated_learning"),
        "Layer_0": np.zeros(1),
        "record": np.zeros(1, "i4,f4"),
    }
    archive = Archive.open(io.BytesIO(archives.npz({**extra, **archives.layers(2, weighting=1.0)})))
    assert len(archive) == 2
    assert archive.extras == ("__bk_payload_kind__", "Layer_0", "record", "weighting")
    archive.check()


def test_one_archive_serves_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = [np.full((200, 300), index, "f8") for index in range(8)]
    write_archive(path, arrays)
    wrong: list[int] = []
    with Archive.open(path) as archive:

        def read(index: int) -> None:
            for _ in range(3):
                if not np.array_equal(archive[index], arrays[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=read, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def test_closing_closes_what_was_opened_here_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [np.zeros(2)])
    archive = Archive.open(path)
    archive.close()
    archive.close()
    with pytest.raises(ArchiveError, match="closed"):
        archive[0]
    buffer = io.BytesIO(path.read_bytes())
    Archive.open(buffer).close()
    assert not buffer.closed
