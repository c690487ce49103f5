"""What must not leave this site, and what is left on the disk when writing fails."""

from __future__ import annotations

import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import (
    Archive,
    file_digest,
    validate_upload,
    write_archive,
)
from branchkey_integrations.errors import ArchiveError, ConfigurationError, WeightingError
from tests.support import archives
from tests.support.archives import (
    layers,
    npz,
)


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    for call in (Archive.open, validate_upload, file_digest):
        with pytest.raises(ArchiveError, match=r"missing\.npz: .*No such file"):
            call(tmp_path / "missing.npz")
        with pytest.raises(ArchiveError, match=r"[Ii]s a directory"):
            call(tmp_path)
    with pytest.raises(ArchiveError, match=r"a\.npz: .*No such file"):
        write_archive(tmp_path / "nowhere" / "a.npz", [np.zeros(2)])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArchiveError, match=r"[Ii]s a directory"):
        write_archive(tmp_path / "folder", [np.zeros(2)])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe, pytest.raises(ArchiveError, match="seek"):
        Archive.open(pipe)
    os.close(write)


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_a_full_disk_leaves_no_half_file_and_the_old_one(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [np.ones(3)])
    before = path.read_bytes()
    values = np.random.default_rng(0).normal(size=size)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ArchiveError, match=r"a\.npz: .*File too large"):
            write_archive(path, [values])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(ArchiveError, match="No space left"):
        write_archive(full, [values])


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("branchkey_integrations.archive_write.ZipWriter.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_archive(tmp_path / "a.npz", [np.zeros(2)])
    assert not list(tmp_path.iterdir())


def test_a_new_file_has_the_rights_that_any_new_file_gets(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.npz", [np.zeros(2)])
    (tmp_path / "b").touch()
    assert (tmp_path / "a.npz").stat().st_mode == (tmp_path / "b").stat().st_mode


class OnTheGpu:
    """Refuse to become an array, as a tensor on a GPU or with a gradient does."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.array([None, 1], dtype=object), "dtype object"),
        ([[1.0, 2.0], [3.0]], "dtype object|inhomogeneous|ragged"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([b"a"]), "dtype .S1"),
        (np.zeros(2, "i4,f4"), "dtype"),
        (np.zeros(2, "V2"), "dtype .V2"),
        (np.zeros(2, "c8"), "dtype complex64"),
        (np.zeros(2, np.longdouble), "dtype float128"),
        (np.zeros(2, "M8[s]"), "dtype datetime64"),
        (None, "dtype object"),
        (OnTheGpu(), "OnTheGpu .*requires grad"),
    ],
)
def test_an_array_that_cannot_be_a_layer_is_refused_by_its_position(value: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=f"layer_3: .*found.*({found})"):
        write_archive(tmp_path / "a.npz", [np.zeros(2), np.zeros(2), np.zeros(2), value])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arrays", [np.zeros((3, 2)), {"a": np.zeros(2)}, "ab", 3, None])
def test_something_else_than_a_list_of_arrays_is_refused(arrays: Any) -> None:
    with pytest.raises(ArchiveError, match="layers: expected a list of arrays, found"):
        write_archive(io.BytesIO(), arrays)


def test_an_update_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="update: expected at least one layer, found none"):
        write_archive(tmp_path / "a.npz", [], 1)


def test_more_layers_than_can_be_read_are_not_written() -> None:
    with pytest.raises(ArchiveError, match="layers: expected fewer than 65535 layers, found 65535"):
        write_archive(io.BytesIO(), [np.zeros(0)] * 65_535)


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="compression"):
        write_archive(io.BytesIO(), [np.zeros(2)], compression="lzma")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("where", [0, 299_999])
def test_values_that_are_not_finite_do_not_leave(bad: float, dtype: str, where: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    values = np.zeros(300_000, dtype)
    values[where] = bad
    arrays = {"weighting": np.array([1.0]), **layers(3), "layer_2": values}
    path.write_bytes(npz(arrays, compressed=where == 0))
    with pytest.raises(ArchiveError, match="layer_2: expected finite numbers only, found NaN or infinity"):
        validate_upload(path)
    for layer in (values, values.reshape(300, 1000).T, values[::-1]):
        with pytest.raises(ArchiveError, match="layer_1: expected finite numbers only"):
            write_archive(tmp_path / "b.npz", [np.ones(3, "i4"), layer], 1, finite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    ("weighting", "error", "found"),
    [
        (None, WeightingError, "weighting: expected an array of one number in the archive, found none"),
        (np.array([np.nan]), WeightingError, "weighting: .*found nan"),
        (np.array([np.inf]), WeightingError, "weighting: .*found inf"),
        (np.array([-5]), WeightingError, "weighting: .*found -5.0"),
        (np.array([0]), WeightingError, "weighting: .*found 0.0"),
        (np.array("abc"), WeightingError, "weighting: .*found something else"),
        (np.array([True]), WeightingError, "weighting: .*found something else"),
        (np.array([1.0, 2.0]), WeightingError, "weighting: .*found something else"),
        (np.array([None]), ArchiveError, "weighting: .*object"),
    ],
)
def test_a_bad_weighting_does_not_leave(weighting: Any, error: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(npz({**({} if weighting is None else {"weighting": weighting}), **layers(2)}))
    with pytest.raises(error, match=found):
        validate_upload(path)


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({}, "expected at least one layer"),
        ({"conv.weight": np.zeros(2)}, "at least one layer.*conv.weight"),
        ({"layer_0": np.zeros(1), "layer_7": np.zeros(1)}, "layer_1: "),
        ({"layer_0": np.array(["a"])}, "layer_0: .*<U1"),
        ({"layer_0": np.array([None])}, "layer_0: .*object"),
    ],
)
def test_other_archives_do_not_leave(arrays: Any, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(npz({"weighting": np.array([1.0]), **arrays}))
    with pytest.raises(ArchiveError, match=found):
        validate_upload(path)


def test_a_broken_layer_does_not_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    data = npz({"weighting": np.array([1.0]), "layer_0": np.arange(500.0)}, compressed=False)
    path.write_bytes(data.replace(np.array([250.0]).tobytes(), np.array([251.5]).tobytes()))
    with pytest.raises(ArchiveError, match=r"layer_0: .*CRC"):
        validate_upload(path)
