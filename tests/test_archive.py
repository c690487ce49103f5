"""The codec on good input: what goes in comes out, bit for bit, for us and for everybody else."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_pack, archive_zip
from branchkey_integrations.archive import (
    Archive,
    ArchiveInfo,
    LayerHeader,
    check_weighting,
    file_digest,
    validate_upload,
    write_archive,
)
from branchkey_integrations.archive_directory import find_directory, read_members
from branchkey_integrations.errors import ArchiveError, WeightingError
from tests.support import archives
from tests.support.archives import (
    same,
)


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


@pytest.fixture(params=["deflate", "store"])
def compression(request: pytest.FixtureRequest) -> Any:
    return request.param


GENERATOR = np.random.default_rng(3)
ODD_ARRAYS: dict[str, np.ndarray] = {
    "0-d": np.array(2.5, "f4"),
    "empty": np.empty((0, 3), "f4"),
    "float16": GENERATOR.normal(size=(5, 3)).astype("f2"),
    "float64": GENERATOR.normal(size=(5, 3)),
    "int64": np.array([-(2**63), 2**63 - 1]),
    "uint8": np.arange(7, dtype="u1"),
    "bool": np.array([True, False]),
    "nan and negative zero": np.array([np.nan, -0.0, np.inf], "f4"),
    "fortran": np.asfortranarray(GENERATOR.normal(size=(40, 30)).astype("f4")),
    "strided": np.arange(60, dtype="f4").reshape(6, 10)[::-2, 1::3],
    "big-endian": np.array([1.5, -2.0], ">f4"),
    "big-endian 0-d": np.array(1.5, ">f8"),
    "big-endian fortran": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    "broadcast": np.broadcast_to(np.float32(3), (70, 1000)),
    "zeros": np.zeros((300, 1000), "f4"),
    "larger than one chunk": GENERATOR.normal(size=(401, 1003)).astype("f4"),
    "larger, transposed": GENERATOR.normal(size=(401, 1003)).astype("f4").T,
}


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_every_kind_of_array_comes_back_bit_for_bit(name: str, compression: Any, tmp_path: Path) -> None:
    array = ODD_ARRAYS[name]
    path = tmp_path / "a.npz"
    info = write_archive(path, [array], 2.0, compression=compression)
    with Archive.open(path) as archive:
        back = archive[0]
        assert same(back, array)
        assert back.flags.owndata
        assert back.flags.writeable
        assert back.flags.c_contiguous
        assert back.dtype.isnative
        assert archive.headers == info.layers == (LayerHeader(array.shape, back.dtype),)
        assert archive.headers[0].nbytes == array.nbytes
        out = np.empty(array.shape, back.dtype)
        archive.read_into(0, out)
        assert same(out, array)
        archive.check()


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_numpy_and_the_zip_module_read_what_is_written(name: str, compression: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [ODD_ARRAYS[name]], 1530, compression=compression)
    with np.load(path, allow_pickle=False) as loaded:
        assert loaded.files == ["weighting", "layer_0"]
        assert loaded["weighting"].dtype == np.float64
        assert loaded["weighting"].tolist() == [1530.0]
        assert same(loaded["layer_0"], ODD_ARRAYS[name])
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        methods = {zipfile.ZIP_STORED if compression == "store" else zipfile.ZIP_DEFLATED}
        assert {member.compress_type for member in file.infolist()} == methods
        assert not any(member.flag_bits for member in file.infolist())


@pytest.mark.parametrize("name", ODD_ARRAYS)
@pytest.mark.parametrize("compressed", [True, False])
def test_what_numpy_writes_is_read(name: str, compressed: bool) -> None:
    array = ODD_ARRAYS[name]
    archive = Archive.open(io.BytesIO(archives.npz({"layer_0": array}, compressed=compressed)))
    assert same(archive[0], array)
    out = np.empty(array.shape, array.dtype.newbyteorder("="))
    archive.read_into(0, out)
    assert same(out, array)
    archive.check()


def test_twelve_layers_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [np.full((4, 4), index, "f4") for index in range(12)])
    with Archive.open(path) as archive:
        assert [int(layer[0, 0]) for layer in archive] == list(range(12))
    # The order in the file is no help: numpy's own writer keeps the order of its arguments.
    shuffled = dict(sorted(archives.layers(12).items()))
    assert list(shuffled)[2] == "layer_10"
    archive = Archive.open(io.BytesIO(archives.npz(shuffled)))
    assert [int(layer[0, 0]) for layer in archive] == list(range(12))
    assert len(archive) == 12


def test_an_aggregate_holds_layers_only(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_archive(path, [np.zeros(2, "f4")])
    with zipfile.ZipFile(path) as file:
        assert file.namelist() == ["layer_0.npy"]
    with Archive.open(path) as archive:
        assert archive.weighting is None
        assert archive.extras == ()


def test_an_aggregate_may_be_empty_so_that_the_gate_can_refuse_it() -> None:
    buffer = io.BytesIO()
    write_archive(buffer, [])
    assert len(Archive.open(buffer)) == 0


def test_size_and_digest_are_those_of_the_file(compression: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = [GENERATOR.normal(size=(600, 700)).astype("f4"), np.zeros(3, "f4"), GENERATOR.normal(size=(700, 600)).T]
    info = write_archive(path, arrays, 7, compression=compression)
    data = path.read_bytes()
    assert info.size_bytes == len(data)
    assert info.sha256 == hashlib.sha256(data).digest()
    assert info.digest == "sha256=" + base64.b64encode(hashlib.sha256(data).digest()).decode()
    assert len(info.digest) == len("sha256=") + 44
    assert file_digest(path) == ArchiveInfo(len(data), info.sha256)
    assert validate_upload(path) == info
    with Archive.open(path) as archive:
        assert archive.size_bytes == len(data)
        assert archive.weighting == 7.0


class Pipe(io.RawIOBase):
    """Take writes only, a few bytes less than offered, and no way back."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = min(len(data), 50_000)
        self.data += memoryview(data)[:taken]
        return taken


def test_every_kind_of_target_gets_the_same_bytes(compression: Any, tmp_path: Path) -> None:
    arrays = [GENERATOR.normal(size=(600, 700)).astype("f4"), np.zeros(5, "f4"), np.ones((800, 800), "f4").T]
    path, plain, update, appended = (tmp_path / name for name in "abcd")
    infos = [write_archive(path, arrays, 1, compression=compression)]
    buffer, pipe = io.BytesIO(), Pipe()
    infos.append(write_archive(buffer, arrays, 1, compression=compression))
    infos.append(write_archive(pipe, arrays, 1, compression=compression))  # type: ignore[arg-type]
    with open(plain, "wb") as one, open(update, "w+b", buffering=0) as two, open(appended, "a+b") as three:
        for file in (one, two, three):
            infos.append(write_archive(file, arrays, 1, compression=compression))
    with tempfile.SpooledTemporaryFile(max_size=1000) as spooled:
        infos.append(write_archive(spooled, arrays, 1, compression=compression))  # type: ignore[arg-type]
        assert same(Archive.open(spooled)[0], arrays[0])  # type: ignore[arg-type]
    written = [path.read_bytes(), buffer.getvalue(), bytes(pipe.data)]
    written += [file.read_bytes() for file in (plain, update, appended)]
    assert len(set(written)) == 1
    assert infos == [infos[0]] * 7
    assert infos[0].sha256 == hashlib.sha256(written[0]).digest()


def test_a_file_is_written_from_where_it_stands() -> None:
    buffer = io.BytesIO(b"head")
    buffer.seek(4)
    array = GENERATOR.normal(size=(600, 700))
    info = write_archive(buffer, [array])
    data = buffer.getvalue()
    assert data[:4] == b"head"
    assert hashlib.sha256(data[4:]).digest() == info.sha256
    assert same(Archive.open(io.BytesIO(data[4:]))[0], array)


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = [GENERATOR.normal(size=(600, 700)).astype("f4")]
    digests = {write_archive(tmp_path / name, arrays, 1).sha256 for name in "abc"}
    assert len(digests) == 1


def test_values_that_change_while_they_are_written_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros(500_000, "f4")
    again = archive_pack.Packing.__init__

    def training_goes_on(self: Any, *args: Any, **options: Any) -> None:
        array[:] += 1
        again(self, *args, **options)

    monkeypatch.setattr(archive_pack.Packing, "__init__", training_goes_on)
    with pytest.raises(ArchiveError, match=r"layer_0.*stay the same"):
        write_archive(Pipe(), [array])  # type: ignore[arg-type]


def test_64_bit_records_are_written_and_read(monkeypatch: pytest.MonkeyPatch, compression: Any) -> None:
    # The limit is lowered in place of writing 4 GiB: every size and offset above it must move into the long records.
    arrays = [np.arange(100.0), np.arange(1000.0), np.arange(3.0)]
    buffer = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(archive_zip, "MAX16", 2)
        write_archive(buffer, arrays, 1, compression=compression)
    assert b"PK\x06\x06" in buffer.getvalue()
    data = archives.patched(buffer.getvalue(), (archives.END, 8, b"\xff\xff\xff\xff"))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
    for layer, array in zip(Archive.open(io.BytesIO(data)), arrays):
        assert same(layer, array)


def test_a_layer_beyond_4_gib_packed_and_raw_has_long_sizes_in_every_record() -> None:
    member = archive_zip.Member("layer_0.npy", 0, 0, 1, 2**33, 2**33, 2**34)
    record = b"".join(archive_zip.directory([member], 2**35))
    data = archives.patched(archives.zipped({"layer_0.npy": b""}), (archives.END, 0, b""))[:30] + record
    assert record.count(b"PK\x06\x06") == record.count(b"PK\x06\x07") == 1

    def read_at(offset: int, count: int) -> bytes:  # as if 32 GiB of data lay between
        return (data[:30] + bytes(64))[offset : offset + count] if offset < 64 else record[offset - 2**35 :][:count]

    found = find_directory(read_at, 2**35 + len(record))
    assert list(read_members(read_at, found)) == [member]
    assert found.start == 2**35


def test_a_path_may_be_text_or_any_path_object(tmp_path: Path) -> None:
    write_archive(os.fspath(tmp_path / "a.npz"), [np.zeros(2)], 1)
    assert validate_upload(os.fspath(tmp_path / "a.npz")) == validate_upload(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "value", [1, 1.5, np.float32(2), np.int64(3), np.array([4.0]), np.array(5), Fraction(1, 2), 1e-300]
)
def test_a_good_weighting_is_a_float(value: Any) -> None:
    number = check_weighting(value)
    assert type(number) is float
    assert number == float(np.asarray(value, dtype=float).reshape(()))


@pytest.mark.parametrize(
    "value",
    [
        0,
        -5,
        np.nan,
        np.inf,
        -np.inf,
        True,
        np.True_,
        np.array([True]),
        "5",
        b"5",
        None,
        [],
        [1, 2],
        10**400,
        3j,
        np.array("5"),
    ],
)
def test_a_bad_weighting_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightingError, match="weighting: expected one finite number above zero, found"):
        check_weighting(value)
    if value is not None:
        with pytest.raises(WeightingError):
            write_archive(tmp_path / "a.npz", [np.zeros(2)], value)
        assert not list(tmp_path.iterdir())
