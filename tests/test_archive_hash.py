"""An archive is hashed beside the writing of it, with the same bytes and the same digest as in line."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_hash, archive_write
from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import ArchiveError

_RNG = np.random.default_rng(0)
#: Over 8 MiB, and small layers between large ones.
_LAYERS = [_RNG.normal(size=size).astype("f4") for size in (1_300_000, 10, 900_000, 3, 600_000, 200_000, 7)]


def _followers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("branchkey-hash")]


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the ranges that a thread was given, on a machine of two cores."""
    monkeypatch.setattr(archive_write, "cores", lambda: 2)
    turns: list[int] = []
    reached = archive_hash.Follower.reached

    def counted(self: archive_hash.Follower, end: int) -> None:
        turns.append(end)
        reached(self, end)

    monkeypatch.setattr(archive_hash.Follower, "reached", counted)
    return turns


def _in_line(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    with monkeypatch.context() as patched:
        patched.setattr(archive_write, "cores", lambda: 1)
        buffer = io.BytesIO()
        info = write_archive(buffer, _LAYERS, 3.0)
    return buffer.getvalue(), info.sha256


@pytest.mark.parametrize("compression", ["deflate", "store"])
def test_the_digest_is_that_of_the_file(compression: Any, followed: list[int], tmp_path: Path) -> None:
    info = write_archive(tmp_path / "a.npz", _LAYERS, 3.0, compression=compression)
    content = (tmp_path / "a.npz").read_bytes()
    assert (info.size_bytes, info.sha256) == (len(content), hashlib.sha256(content).digest())
    assert len(followed) > 2
    assert followed[-1] == len(content)
    assert _followers() == []
    with Archive.open(tmp_path / "a.npz") as archive:
        assert [layer.tobytes() for layer in archive] == [layer.tobytes() for layer in _LAYERS]


def test_the_bytes_are_those_that_one_thread_writes(
    followed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = write_archive(tmp_path / "a.npz", _LAYERS, 3.0)
    assert ((tmp_path / "a.npz").read_bytes(), info.sha256) == _in_line(monkeypatch)


def test_what_stands_before_the_archive_does_not_count(followed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"something else")
        info = write_archive(file, _LAYERS, 3.0)
        file.seek(0)
        content = file.read()
    assert (content, info.sha256) == (b"something else" + _in_line(monkeypatch)[0], _in_line(monkeypatch)[1])
    assert followed


def test_small_archives_one_core_and_memory_have_no_thread(
    followed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(io.BytesIO(), _LAYERS, 3.0)
    write_archive(tmp_path / "small.npz", _LAYERS[1:], 3.0)
    monkeypatch.setattr(archive_write, "cores", lambda: 1)
    write_archive(tmp_path / "alone.npz", _LAYERS, 3.0)
    monkeypatch.setattr(archive_write, "cores", lambda: 2)
    monkeypatch.delattr("os.preadv")
    write_archive(tmp_path / "elsewhere.npz", _LAYERS, 3.0)
    assert followed == []


def test_an_error_and_an_interrupt_end_the_thread(followed: list[int], tmp_path: Path) -> None:
    class Interrupted:
        shape, dtype, nbytes = (5_000_000,), np.dtype("f4"), 20_000_000

        def pieces(self, items: int) -> Any:
            yield _LAYERS[0][:items]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(tmp_path / "a.npz", [*_LAYERS, Interrupted()], 3.0)
    assert (_followers(), list(tmp_path.iterdir())) == ([], [])
    spoilt = [*_LAYERS[:-1], np.array([np.nan], "f4")]
    with pytest.raises(ArchiveError, match="layer_6: expected finite numbers only"):
        write_archive(tmp_path / "a.npz", spoilt, 3.0, finite=True)
    assert (_followers(), list(tmp_path.iterdir())) == ([], [])
    assert followed


def test_a_file_that_cannot_be_read_back_is_named(
    followed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    with pytest.raises(ArchiveError, match=r"a\.npz: .*the file lost what was written to it"):
        write_archive(tmp_path / "a.npz", _LAYERS, 3.0)
    assert (_followers(), list(tmp_path.iterdir())) == ([], [])
    assert followed


def test_a_wrapper_that_changes_bytes_is_hashed_as_it_reads(followed: list[int], tmp_path: Path) -> None:
    class Turned:
        """Store each byte turned round, and pass the descriptor on as wrappers do."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: Any) -> int:
            return int(self._file.write((~np.frombuffer(data, np.uint8)).tobytes()))

        def read(self, count: int) -> bytes:
            return bytes((~np.frombuffer(self._file.read(count), np.uint8)).tobytes())

    with open(tmp_path / "turned", "x+b") as file:
        target: Any = Turned(file)
        info = write_archive(target, _LAYERS, 3.0)
        target.seek(0)
        assert info.sha256 == hashlib.sha256(target.read(info.size_bytes)).digest()
    assert followed == []


def test_when_no_thread_can_be_begun_any_more_all_is_done_in_line(tmp_path: Path) -> None:
    # Python begins no threads once the main thread has ended, while a training in another one may go on.
    script = f"""
import threading, hashlib, numpy as np
from branchkey_integrations import archive_write, parallel
from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.parameters import LayerSpec, Layout
from branchkey_integrations.screening import screen
parallel.cores = archive_write.cores = lambda: 2

def train():
    threading.main_thread().join()
    layers = [np.arange(2_000_000, dtype="f4"), np.ones(900_000, "f4")]
    info = write_archive({str(tmp_path / "a.npz")!r}, layers, 1.0)
    assert info.sha256 == hashlib.sha256(open({str(tmp_path / "a.npz")!r}, "rb").read()).digest()
    with Archive.open({str(tmp_path / "a.npz")!r}) as archive:
        screen(archive, Layout(tuple(LayerSpec(str(i), each.shape, "float32") for i, each in enumerate(layers))))
    print("done", flush=True)

threading.Thread(target=train).start()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
