"""An archive that is gone through twice is unpacked once, and nothing depends on the disk for it."""

from __future__ import annotations

import errno
import io
import os
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_kept, deflate
from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import ArchiveError
from tests.support.archives import npz

_VALUES = np.random.default_rng(0).normal(size=(300, 400)).astype("f4")
#: More than one piece, nothing at all, and every way of lying in the file.
_LAYERS = [
    _VALUES,
    np.asfortranarray(_VALUES.T.copy()[:7]),
    _VALUES.astype(">f4")[:5],
    np.empty((0, 3), "f4"),
    np.array(1.5, "f8"),
]


def _open(layers: list[np.ndarray] = _LAYERS) -> Archive:
    content = io.BytesIO(npz({f"layer_{index}": layer for index, layer in enumerate(layers)}))
    return Archive.open(content, private=True)


def _first_pass(archive: Archive) -> None:
    archive.keep_unpacked()
    for index in range(len(archive)):
        for _ in archive.pieces(index):
            pass


def _same(archive: Archive, layers: list[np.ndarray] = _LAYERS) -> bool:
    return all(
        got.tobytes() == np.ascontiguousarray(layer.astype(layer.dtype.newbyteorder("="))).tobytes()
        for got, layer in zip(archive, layers)
    )


def _no_inflating(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(deflate, "decompressor", refuse)


def test_the_second_pass_unpacks_nothing_and_gives_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    with _open() as archive:
        _first_pass(archive)
        _no_inflating(monkeypatch)
        assert _same(archive)
        into = np.zeros_like(_VALUES)
        archive.read_into(0, into)
        assert into.tobytes() == _VALUES.tobytes()
        assert np.concatenate([piece.copy() for piece in archive.pieces(0)]).tobytes() == _VALUES.tobytes()


def test_without_being_told_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with _open() as archive:
        for _ in archive.pieces(0):
            pass
        _no_inflating(monkeypatch)
        with pytest.raises(AssertionError, match="unpacked again"):
            archive[0]


def test_stored_members_are_read_where_they_are() -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for index, method in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)):
            member = io.BytesIO()
            np.save(member, _VALUES + index)
            packed.writestr(f"layer_{index}.npy", member.getvalue(), method)
    with Archive.open(content, private=True) as archive:
        _first_pass(archive)
        assert archive._kept is not None
        assert os.fstat(archive._kept._file.fileno()).st_size == _VALUES.nbytes
        assert _same(archive, [_VALUES, _VALUES + 1])
    only_stored = io.BytesIO(npz({"layer_0": _VALUES}, compressed=False))
    with Archive.open(only_stored, private=True) as archive:
        archive.keep_unpacked()
        assert archive._kept is None


def test_the_copy_goes_with_the_archive() -> None:
    archive = _open()
    _first_pass(archive)
    assert archive._kept is not None
    file = archive._kept._file
    archive.keep_unpacked()
    assert archive._kept._file is file
    archive.close()
    archive.close()
    assert file.closed


def test_a_layer_that_was_damaged_is_not_kept() -> None:
    content = bytearray(npz({"layer_0": _VALUES}))
    at = content.index(b"PK\x01\x02")
    content[at + 16] ^= 1  # its CRC in the directory
    content[14] ^= 1  # and in front of it
    with Archive.open(io.BytesIO(bytes(content)), private=True) as archive:
        for _ in range(2):
            with pytest.raises(ArchiveError, match="layer_0: expected sound data, found CRC"):
                _first_pass(archive)


def test_a_layer_that_was_left_in_the_middle_is_not_kept() -> None:
    with _open() as archive:
        archive.keep_unpacked()
        next(archive.pieces(0))
        assert archive._kept is not None
        assert archive._kept._crcs == {}
        assert _same(archive)


def _half_taken(_: int) -> Any:
    return SimpleNamespace(f_bavail=2 * sum(each.nbytes for each in _LAYERS) - 1, f_frsize=1)


def _refused(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("function", "broken"), [("fstatvfs", _half_taken), ("posix_fallocate", _refused), ("pwrite", _refused)]
)
def test_without_room_the_archive_is_unpacked_twice(
    function: str, broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "branchkey_integrations.archive")
    monkeypatch.setattr(os, function, broken)
    with _open() as archive:
        _first_pass(archive)
        assert (archive._kept is None) == (function != "pwrite")
        assert _same(archive)
    assert "kept" in caplog.text or "keep" in caplog.text


def test_no_place_for_temporary_files_costs_the_copy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with _open() as archive:
        _first_pass(archive)
        assert archive._kept is None
        assert _same(archive)


@pytest.mark.parametrize("lacks", ["posix_fallocate", "pwrite", "preadv"])
def test_a_system_that_lacks_a_call_does_without(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, lacks)
    assert archive_kept.keep({0: 10}) is None


def test_nothing_to_keep_takes_no_file() -> None:
    assert archive_kept.keep({}) is None
    assert archive_kept.keep({0: 0}) is None


def _flip(archive: Archive) -> None:
    assert archive._kept is not None
    descriptor = archive._kept._file.fileno()
    byte = os.pread(descriptor, 1, 100)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), 100)


def _cut(archive: Archive) -> None:
    assert archive._kept is not None
    os.ftruncate(archive._kept._file.fileno(), 100)


@pytest.mark.parametrize(("damage", "found"), [(_flip, "CRC [0-9a-f]{8} where"), (_cut, "less than was written")])
def test_a_copy_that_changed_on_the_disk_is_noticed_and_not_used_again(damage: Any, found: str) -> None:
    with _open() as archive:
        _first_pass(archive)
        damage(archive)
        with pytest.raises(
            ArchiveError, match=f"layer_0: expected what was unpacked to a temporary file, found {found}"
        ):
            archive[0]
        assert archive[0].tobytes() == _VALUES.tobytes()


def test_a_disk_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with _open() as archive:
        _first_pass(archive)
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", fail)
            with pytest.raises(ArchiveError, match="found Input/output error"):
                archive[0]
        assert _same(archive)


@pytest.mark.parametrize(("kind", "kept"), [("tmpfs", False), ("ramfs", False), ("ext4", True)])
def test_nothing_is_kept_where_temporary_files_lie_in_memory(
    kind: str, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = os.stat(tempfile.gettempdir()).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    table = f"22 1 0:5 / /dev rw - tmpfs tmpfs rw\n36 1 {number} / / rw,noatime shared:1 - {kind} /dev/root rw\n"
    (tmp_path / "mountinfo").write_text(table)
    before = open

    def opened(path: Any, *args: Any, **options: Any) -> Any:
        return before(tmp_path / "mountinfo" if path == "/proc/self/mountinfo" else path, *args, **options)

    monkeypatch.setattr("builtins.open", opened)
    with _open() as archive:
        _first_pass(archive)
        assert (archive._kept is not None) is kept
        assert _same(archive)


def test_on_a_real_file_system_in_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    with _open() as archive:
        _first_pass(archive)
        assert archive._kept is None
        assert _same(archive)
