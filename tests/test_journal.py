"""The file in which a leaf notes its rounds: what it knows after a crash, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations.errors import ConfigurationError, JournalError
from branchkey_integrations.events import Mailbox
from branchkey_integrations.journal import Journal
from branchkey_integrations.noted import NotedRound


def opened(folder: Path, leaf: str = "leaf", branch: str = "branch", run: int | None = 1) -> Journal:
    return Journal(str(folder), leaf, branch, run)


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def begun(folder: Path) -> Journal:
    journal = opened(folder)
    journal.begin()
    return journal


def sent(journal: Journal, number: int, upload_id: str = "file", layout: str = "abc") -> None:
    journal.sending(number, layout, "sha256=x", 10)
    journal.posted(number)
    journal.sent(number, upload_id)


def test_what_was_noted_is_known_to_the_next_process(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    sent(journal, 1, "file-1")
    journal.announced("a-1")
    journal.closed(1, "applied", "a-1")
    sent(journal, 2, "file-2")
    journal.announced("a-2")
    journal.close()
    again = opened(tmp_path)
    assert again.is_current
    assert again.rounds == [
        NotedRound(1, "yes", "file-1", "sha256=x", 10, "abc", "a-1", closed="applied"),
        NotedRound(2, "yes", "file-2", "sha256=x", 10, "abc", "a-2"),
    ]
    assert again.heard == ["a-1", "a-2"]
    assert again.unread is None


@pytest.mark.parametrize(
    ("steps", "known"),
    [
        (["sending"], None),
        (["sending", "posted"], "maybe"),
        (["sending", "posted", "sent"], "yes"),
        (["sending", "posted", "not_sent"], None),
        (["sending", "posted", "sending"], None),
    ],
)
def test_only_an_archive_that_went_out_whole_counts_as_sent(tmp_path: Path, steps: list[str], known: str) -> None:
    journal = begun(tmp_path)
    for step in steps:
        if step == "sending":
            journal.sending(1, "abc", "sha256=x", 10)
        elif step == "sent":
            journal.sent(1, "file")
        else:
            getattr(journal, step)(1)
    journal.close()
    again = opened(tmp_path)
    for noted in (again.get(1), again.unfinished("abc")):
        assert (noted.sent if noted else None) == known


def test_each_step_is_on_the_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    journal = begun(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(journal.path).read_bytes().splitlines()[-1]))
    journal.sending(1, "abc", "sha256=x", 10)
    journal.announced("a")
    assert [json.loads(line)["event"] for line in synced] == ["sending", "announced"]


def test_a_line_that_a_crash_cut_short_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'{"event":"closed","rou')
    again = opened(tmp_path)
    noted = again.get(1)
    assert noted is not None
    assert not noted.closed
    again.closed(1, "applied", "a")
    again.close()
    third = opened(tmp_path).get(1)
    assert third is not None
    assert third.closed == "applied"
    assert third.aggregation_id == "a"


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[1]\n",
        b'{"event":"other"}\n',
        b"\xff\n",
        b'{"event":["begin"]}\n',
        b'{"event":"state","heard":5}\n',
        b'{"event":"state","forgotten":"x"}\n',
        b'{"event":"state","newest":[]}\n',
    ],
)
def test_a_line_that_means_nothing_is_refused_by_its_number(tmp_path: Path, line: bytes) -> None:
    journal = begun(tmp_path)
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(line)
    with pytest.raises(JournalError, match="line 2") as caught:
        opened(tmp_path)
    assert "Move the file away" in str(caught.value)
    assert not (tmp_path / "leaf.lock").exists()
    Path(journal.path).unlink()
    begun(tmp_path).close()  # the refused one let go of the file


def test_another_run_or_branch_knows_nothing_of_it(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    journal.close()
    for run, branch in ((2, "branch"), (1, "other")):
        other = opened(tmp_path, run=run, branch=branch)
        assert not other.is_current
        assert other.get(1) is None
        assert other.unfinished("abc") is None
        other.close()
    second = opened(tmp_path, run=2)
    second.begin()
    assert second.rounds == []
    second.close()
    assert opened(tmp_path).get(1) is None


def test_a_new_run_of_the_branch_is_a_new_beginning_and_an_unknown_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    for same in (None, 1):
        journal.follow(same)
        assert [noted.round for noted in journal.rounds] == [1]
    with monkeypatch.context() as once:
        once.setattr(os, "fsync", _full)
        with pytest.raises(JournalError, match=os.strerror(errno.ENOSPC)):
            journal.follow(2)
    assert journal.get(1) is not None
    journal.follow(2)
    assert (journal.rounds, journal.is_current) == ([], True)
    journal.close()
    assert opened(tmp_path, run=2).is_current


def test_only_an_open_round_of_the_same_layers_is_unfinished(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    assert journal.unfinished("abc") is None
    sent(journal, 1)
    found = journal.unfinished("abc")
    assert found is not None
    assert found.round == 1
    assert journal.unfinished("other layers") is None
    journal.closed(1, "timeout", None)
    assert journal.unfinished("abc") is None


def test_an_aggregate_that_came_when_no_round_was_open_stays_unread_until_a_round_takes_it(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    journal.announced("early")
    assert journal.unread == "early"
    sent(journal, 1)
    assert journal.unread is None
    journal.announced("a")
    journal.closed(1, "applied", "a")
    journal.announced("late")
    assert journal.unread == "late"
    journal.closed(1, "applied", "another")
    assert journal.unread == "late"
    journal.closed(1, "applied", "late")
    assert journal.unread is None
    noted = journal.get(1)
    assert noted is not None
    assert noted.aggregation_id == "late"


def test_a_round_that_ends_without_its_aggregate_still_knows_which_one_was_announced(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    journal.announced("a")
    journal.closed(1, "skipped", None)
    noted = journal.get(1)
    assert noted is not None
    assert (noted.closed, noted.aggregation_id) == ("skipped", "a")


def test_within_a_process_the_newest_takes_it_over(tmp_path: Path) -> None:
    old = begun(tmp_path)
    sent(old, 1)
    new = opened(tmp_path)
    assert [noted.round for noted in new.rounds] == [1]
    with pytest.raises(ConfigurationError, match="took it over"):
        old.sending(2, "abc", "sha256=x", 10)
    sent(new, 2)
    old.close()
    new.close()
    assert [noted.round for noted in opened(tmp_path).rounds] == [1, 2]


def test_a_closed_one_notes_nothing_and_lets_nothing_be_sent(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    before = Path(journal.path).read_bytes()
    journal.close()
    journal.announced("a")
    journal.closed(1, "applied", "a")
    journal.begin()
    for send in (lambda: journal.sending(2, "abc", "sha256=x", 10), lambda: journal.posted(1)):
        with pytest.raises(JournalError, match="closed meanwhile"):
            send()
    assert Path(journal.path).read_bytes() == before


def test_an_engine_that_was_dropped_lets_go_of_it(tmp_path: Path) -> None:
    begun(tmp_path)
    opened(tmp_path).close()


def test_a_leaf_id_that_is_no_file_name_becomes_one(tmp_path: Path) -> None:
    one, two = opened(tmp_path, leaf="../a/b"), opened(tmp_path, leaf="..\\a/b")
    assert Path(one.path).parent == Path(two.path).parent == tmp_path
    assert one.path != two.path


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file") as caught:
        opened(tmp_path / "file")
    assert "journal=" in str(caught.value)


def test_a_full_disk_forbids_the_upload_but_not_what_has_happened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = begun(tmp_path)
    sent(journal, 1)
    size = os.path.getsize(journal.path)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[: len(data) // 2]))

    whole, journal._file = journal._file, Full(journal._file)  # type: ignore[assignment]
    with pytest.raises(JournalError, match=os.strerror(errno.ENOSPC)):
        journal.sending(2, "abc", "sha256=x", 10)
    journal.closed(1, "applied", "a")
    assert os.strerror(errno.ENOSPC) in caplog.text
    journal._file = whole
    assert os.path.getsize(journal.path) == size
    journal.sending(2, "abc", "sha256=x", 10)
    journal.close()
    assert [noted.round for noted in opened(tmp_path).rounds] == [1, 2]


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    journal = begun(tmp_path)
    threads = [
        threading.Thread(target=lambda k=k: [journal.announced(f"{k}-{i}") for i in range(20)]) for k in range(4)
    ]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert len(set(opened(tmp_path).heard)) == 80


def test_the_mailbox_lets_an_observer_note_an_id_before_a_reader_can_take_it() -> None:
    mailbox, seen = Mailbox(), []
    mailbox.put("early")
    mailbox.observe(lambda identifier: seen.append((identifier, mailbox.mark())))
    assert mailbox.put("next")
    assert not mailbox.put("next")
    assert seen == [("early", 1), ("next", 1)]
    assert mailbox.get_nowait() == "next"
    mailbox.observe(None)
    mailbox.put("unobserved")
    assert len(seen) == 2
