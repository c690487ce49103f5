"""Files that appear when they are whole; what killed processes left goes, what living ones write stays."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations import parts
from tests.support.leaks import REPOSITORY

_PART = ".a.npz.0123456789abcdef.part"
_LONG_AGO_S = parts.IDLE_S + 60


def leave(path: Path, idle_s: float) -> Path:
    """Make a file that was last written to so long ago."""
    path.write_bytes(b"half")
    then = time.time() - idle_s
    os.utime(path, (then, then))
    return path


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with parts.replacing(str(path), durable=True) as file:
        file.write(b"after")
        file.flush()
        (part,) = set(tmp_path.iterdir()) - {path}
        assert path.read_bytes() == b"before"
        assert part.read_bytes() == b"after"
        assert part.name.startswith(".a.")
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"after")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there_before(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def write() -> None:
        with parts.replacing(str(path)) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"before")


def test_a_durable_file_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((os.fstat(descriptor).st_size, path.exists())))
    for durable in (False, True):
        with parts.replacing(str(path), durable=durable) as file:
            file.write(b"four")
        path.unlink()
    assert seen == [(4, False)]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Let another process be in the middle of writing a file."""
    code = (
        "import sys\nfrom branchkey_integrations import parts\n"
        "with parts.replacing(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); print('writing', flush=True); sys.stdin.read(1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.npz")],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (part,) = tmp_path.iterdir()
        then = time.time() - _LONG_AGO_S
        os.utime(part, (then, then))
        yield process, part
        process.kill()


def test_the_part_of_a_living_process_stays_and_that_of_a_killed_one_goes(
    writer: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, part = writer
    parts.sweep(str(tmp_path))
    assert part.read_bytes() == b"half"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    parts.sweep(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_swept_folder_disturbs_nobody_who_ends_well(
    writer: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    parts.sweep(str(tmp_path))
    process, _ = writer
    process.communicate("x", timeout=10)
    assert process.returncode == 0
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.npz", b"half")]


@pytest.mark.parametrize("name", [_PART, ".a-0123456789abcdef.part", ".update.npz.0123456789ab.part"])
def test_a_part_that_nobody_holds_goes_when_it_has_not_grown_for_long(tmp_path: Path, name: str) -> None:
    part = leave(tmp_path / name, parts.IDLE_S - 60)
    parts.sweep(str(tmp_path))
    assert part.exists()
    leave(part, _LONG_AGO_S)
    parts.sweep(str(tmp_path))
    assert not part.exists()


def test_parts_of_others_stay(tmp_path: Path) -> None:
    names = ["film.mkv.part", ".part", ".a.part", ".a.0123456789ABCDEF.part", "a.npz.part", "a.npz", _PART + "x"]
    for name in names:
        leave(tmp_path / name, 10 * parts.IDLE_WITHOUT_LOCKS_S)
    (tmp_path / _PART).mkdir()
    parts.sweep(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*names, _PART}
    parts.sweep(str(tmp_path), ".npz.part")
    assert not (tmp_path / "a.npz.part").exists()


def test_a_link_is_neither_followed_nor_deleted(tmp_path: Path) -> None:
    target = leave(tmp_path / "precious", _LONG_AGO_S)
    (tmp_path / _PART).symlink_to(target)
    parts.sweep(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"precious", _PART}


@pytest.mark.parametrize("missing", ["no fcntl", "no locks"])
def test_without_locks_a_part_goes_after_a_day(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if missing == "no fcntl":
        monkeypatch.setattr(parts, "fcntl", None)
    else:
        monkeypatch.setattr(parts.fcntl, "flock", refuse)
    part = leave(tmp_path / _PART, parts.IDLE_WITHOUT_LOCKS_S - 60)
    parts.sweep(str(tmp_path))
    assert part.exists()
    leave(part, parts.IDLE_WITHOUT_LOCKS_S + 60)
    parts.sweep(str(tmp_path))
    assert not part.exists()
    with parts.replacing(str(tmp_path / "a")) as file:
        file.write(b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_a_part_that_was_swept_before_it_was_locked_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, met = parts._lock, []

    def late(file: Any) -> bool | None:
        met.append(file.name)
        if len(met) == 1:
            os.unlink(file.name)  # found unlocked
        return False if len(met) == 2 else lock(file)  # found by somebody who has just locked it

    monkeypatch.setattr(parts, "_lock", late)
    with parts.replacing(str(tmp_path / "a")) as file:
        file.write(b"whole")
    assert len(set(met)) == 3
    assert (tmp_path / "a").read_bytes() == b"whole"
    monkeypatch.setattr(parts, "_lock", lambda _: False)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)), parts.replacing(str(tmp_path / "b")):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_swept_already(tmp_path: Path) -> None:
    parts.sweep(str(tmp_path / "missing"), ".part")
    assert list(tmp_path.iterdir()) == []
