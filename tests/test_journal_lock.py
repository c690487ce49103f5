"""One training at a time writes a journal: among processes, and within one."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations import journal as journal_module
from branchkey_integrations import journal_lock
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.journal import Journal

PROGRAM = """
import sys
from branchkey_integrations import journal
journal.PATIENCE_S = 0
held = journal.Journal(sys.argv[1], "leaf", "branch", 1)
if len(sys.argv) > 2:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "PATIENCE_S", 0.0)


class Holder:
    def __init__(self) -> None:
        self.gave_way = 0

    def hand_over(self) -> None:
        self.gave_way += 1


def opened(folder: Path, leaf: str = "leaf") -> Journal:
    journal = Journal(str(folder), leaf, "branch", 1)
    if not journal.is_current:
        journal.begin()
    return journal


def elsewhere(folder: Path) -> str:
    """Open the journal in another process; give what went wrong."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    return child.stderr.strip().rpartition("\n")[2] if child.returncode else ""


def test_another_process_is_told_that_a_leaf_is_trained_already_and_by_what(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with open(journal.path, "rb") as looked_at:
        looked_at.read()  # A lock on the journal itself would be gone with this.
    said = elsewhere(tmp_path)
    assert f"journal {journal.path}: expected one process at a time that trains as this leaf" in said
    assert "End the other process, or give this one the credentials of another leaf" in said
    journal.close()
    assert sorted(os.listdir(tmp_path)) == ["leaf.jsonl"]
    assert elsewhere(tmp_path) == ""


def test_a_process_that_is_still_ending_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "stay"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as before:
        assert before.stdout is not None
        assert before.stdout.readline() == b"held\n"
        monkeypatch.setattr(journal_module, "PATIENCE_S", 60.0)
        # It ends when somebody waits for it, and not sooner.
        monkeypatch.setattr("time.sleep", lambda _: before.kill())
        journal = opened(tmp_path)
    assert "another process holds it; waiting 60 s for it" in caplog.text
    journal.sending(1, "abc", "sha256=x", 10)
    journal.close()


def test_a_file_that_cannot_be_closed_does_not_keep_the_lock(tmp_path: Path) -> None:
    class Stale:
        def close(self) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

    journal = opened(tmp_path)
    journal._file.close()
    journal._file = Stale()  # type: ignore[assignment]
    with pytest.raises(OSError, match="Stale"):
        journal.close()
    assert elsewhere(tmp_path) == ""
    del journal._file


def test_what_the_collector_finds_while_another_thread_takes_a_lock_is_left_to_the_next(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    path = journal._lock_path
    taken, over = threading.Event(), threading.Event()

    def busy() -> None:
        with journal_lock.alone():
            taken.set()
            over.wait(20)

    other = threading.Thread(target=busy)
    other.start()
    assert taken.wait(20)
    del journal
    gc.collect()  # would wait for ever for a thread that in its turn waits for this one
    over.set()
    other.join()
    assert os.path.exists(path)
    opened(tmp_path).close()
    assert not os.path.exists(path)


def test_the_second_one_in_a_process_goes_on_and_the_first_is_told_at_its_next_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(tmp_path)
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    second = opened(link)
    with pytest.raises(ConfigurationError, match="one training at a time as this leaf") as caught:
        first.sending(1, "abc", "sha256=x", 10)
    assert "Go on with the newer one, or give it the credentials of another leaf" in str(caught.value)
    # What has happened already is no error: the thread that listens, say, goes on.
    first.announced("a")
    assert "took it over" in caplog.text
    first.close()
    # The first one's end is not that of the lock, which the second one has.
    assert "another one that holds it" in elsewhere(tmp_path)
    second.sending(1, "abc", "sha256=x", 10)
    second.close()


def test_leaves_in_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, two = opened(tmp_path, "one"), opened(tmp_path, "two")
    one.sending(1, "abc", "sha256=x", 10)
    two.sending(1, "abc", "sha256=x", 10)
    one.close()
    two.sending(2, "abc", "sha256=x", 10)
    two.close()
    assert sorted(os.listdir(tmp_path)) == ["one.jsonl", "two.jsonl"]


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    program = PROGRAM + "import os; os.kill(os.getpid(), 9)"
    child = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, check=False)
    assert child.returncode == -9
    assert sorted(os.listdir(tmp_path)) == ["leaf.jsonl", "leaf.lock"]
    opened(tmp_path).close()
    assert sorted(os.listdir(tmp_path)) == ["leaf.jsonl"]


def _forked(folder: str, answers: Any) -> None:
    inherited = len(journal_lock._held)
    try:
        Journal(folder, "leaf", "branch", 1)
    except ConfigurationError as error:
        answers.put((inherited, error.found))
    else:
        answers.put((inherited, "nobody"))


def test_a_forked_process_does_not_take_its_parents_lock_for_its_own(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_forked, args=(str(tmp_path), answers))
    child.start()
    child.join(60)
    assert answers.get() == (0, "another one that holds it")
    # Nor does its end free it.
    assert "another one that holds it" in elsewhere(tmp_path)
    journal.close()


def test_one_that_nobody_holds_on_to_any_more_is_let_go_of(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.__dict__["itself"] = journal  # so that it is garbage, and not gone at once
    path = str(tmp_path / "leaf.lock")
    assert [held.holder() for held in journal_lock._held] == [journal]
    del journal
    gc.collect()
    assert not os.path.exists(path)


def test_a_lock_whose_file_somebody_took_away_is_made_anew_by_the_next_holder(tmp_path: Path) -> None:
    path, first, second = str(tmp_path / "lock"), Holder(), Holder()
    assert journal_lock.take(path, first)
    os.unlink(path)
    assert journal_lock.take(path, second)
    assert (first.gave_way, second.gave_way) == (1, 0)
    assert os.path.exists(path)
    journal_lock.release(path, first)
    assert os.path.exists(path)
    journal_lock.release(path, second)
    journal_lock.release(path, second)
    assert not os.path.exists(path)
    assert journal_lock._held == []


def test_a_hard_link_to_a_lock_is_the_same_lock(tmp_path: Path) -> None:
    path, other, first, second = str(tmp_path / "lock"), str(tmp_path / "other"), Holder(), Holder()
    assert journal_lock.take(path, first)
    os.link(path, other)
    assert journal_lock.take(other, second)
    assert first.gave_way == 1
    assert len(journal_lock._held) == 1
    journal_lock.release(other, second)
    assert journal_lock._held == []


def test_a_file_that_was_taken_away_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, holder, lock = str(tmp_path / "lock"), Holder(), journal_lock._lock
    handles: list[int] = []

    def late(handle: int) -> bool:
        handles.append(handle)
        if len(handles) == 1:
            os.unlink(path)
        return lock(handle)

    monkeypatch.setattr(journal_lock, "_lock", late)
    assert journal_lock.take(path, holder)
    assert len(handles) == 2
    assert os.path.exists(path)
    journal_lock.release(path, holder)


def test_without_locks_in_the_file_system_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("branchkey_integrations.journal_lock.fcntl.lockf", none)
    first = opened(tmp_path)
    assert "its file system has no locks" in caplog.text
    second = opened(tmp_path)
    with pytest.raises(ConfigurationError, match="took it over"):
        first.begin()
    second.close()


def test_a_journal_that_cannot_be_opened_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "leaf.jsonl").mkdir()
    with pytest.raises(Exception, match="a file that can be opened"):
        opened(tmp_path)
    assert not (tmp_path / "leaf.lock").exists()
    assert journal_lock._held == []


def test_many_threads_that_open_it_leave_one_that_writes(tmp_path: Path) -> None:
    opened(tmp_path).close()
    journals: list[Journal] = []
    threads = [threading.Thread(target=lambda: journals.append(opened(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writes = [journal for journal in journals if not journal._file.closed]
    assert len(writes) == 1
    assert len(journal_lock._held) == 1
    for journal in journals:
        journal.close()
    assert journal_lock._held == []


def test_one_that_is_just_being_opened_gives_way_when_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path).close()
    second: list[Journal] = []
    thread = threading.Thread(target=lambda: second.append(opened(tmp_path)))
    open_file = journal_module._opened

    def slowly(path: str) -> Any:
        monkeypatch.undo()
        thread.start()
        # It has its chance to come in between, and must not take it.
        thread.join(0.2)
        assert second == []
        return open_file(path)

    monkeypatch.setattr(journal_module, "_opened", slowly)
    first = opened(tmp_path)
    thread.join(20)
    with pytest.raises(ConfigurationError, match="took it over"):
        first.begin()
    second[0].sending(1, "abc", "sha256=x", 10)
    second[0].close()


def test_a_lock_that_was_not_had_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[int] = []

    def held(handle: Any, *_: Any) -> None:
        handles.append(handle)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("branchkey_integrations.journal_lock.fcntl.lockf", held)
    with pytest.raises(ConfigurationError, match="another one that holds it"):
        opened(tmp_path)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(handles[0])
