"""A training that goes on for ever: what its journal, its history and its engine hold of it stays the same."""

from __future__ import annotations

import errno
import gc
import json
import os
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations import events, noted, outcome
from branchkey_integrations import journal as journal_module
from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import JournalError
from branchkey_integrations.events import Mailbox
from branchkey_integrations.journal import Journal
from branchkey_integrations.noted import FORGOTTEN, NotedRound
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import History, RoundOutcome, UploadReceipt
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox
from tests.support.offline import leaf
from tests.support.rounds import step
from tests.support.stores import small_store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rounds, eight ids and forty lines are all that is kept."""
    monkeypatch.setattr(noted, "KEPT_ROUNDS", 5)
    monkeypatch.setattr(noted, "KEPT_IDS", 8)
    monkeypatch.setattr(journal_module, "MOST_LINES", 40)


def opened(folder: Path) -> Journal:
    return Journal(str(folder), "leaf", "branch", 1)


def make(journal: Journal, number: int, closed: bool = True) -> None:
    journal.sending(number, "abc", f"sha256={number}", 10)
    journal.posted(number)
    journal.sent(number, f"file-{number}")
    journal.announced(f"a-{number}")
    if closed:
        journal.closed(number, "applied", f"a-{number}")


def lines_of(journal: Journal) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(journal.path).read_text().splitlines()]


def test_the_file_and_what_is_known_of_it_stay_small_and_the_same_after_a_restart(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    longest = 0
    for number in range(1, 101):
        make(journal, number)
        longest = max(longest, len(lines_of(journal)))
    # Forty more lines than the last time it was written anew, when it had a line for each of five rounds and two more.
    assert 40 < longest <= 40 + 7 + 1
    assert os.listdir(tmp_path) != []
    for each in (journal, opened(tmp_path)):
        assert [found.round for found in each.rounds] == [96, 97, 98, 99, 100]
        assert each.rounds[0] == NotedRound(96, "yes", "file-96", "sha256=96", 10, "abc", "a-96", closed="applied")
        assert each.heard == [f"a-{number}" for number in range(93, 101)]
        assert (each.unread, each.is_current, each.unfinished("abc")) == (None, True, None)
    assert sorted(os.listdir(tmp_path)) == ["leaf.jsonl", "leaf.lock"]


def test_a_round_that_is_too_old_to_be_known_is_still_known_not_to_be_sent_again(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    for number in range(1, 11):
        make(journal, number)
    journal._compact()
    journal.close()
    again = opened(tmp_path)
    assert again.get(5) == NotedRound(5, sent="yes", closed=FORGOTTEN)
    assert again.get(6) == NotedRound(6, "yes", "file-6", "sha256=6", 10, "abc", "a-6", closed="applied")
    assert again.get(11) is None
    assert again.get(0) is None
    again.begin()
    assert again.get(5) is None


def test_the_round_that_is_open_is_kept_however_low_its_number_is(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    for number in range(11, 18):
        make(journal, number)
    make(journal, 3, closed=False)
    journal._compact()
    for each in (journal, opened(tmp_path)):
        found = each.unfinished("abc")
        assert found is not None
        assert (found.round, found.aggregation_id) == (3, "a-3")
        assert each.get(14) is not None
        assert each.get(13) == NotedRound(13, sent="yes", closed=FORGOTTEN)
    with_more = opened(tmp_path)
    with_more.closed(3, "applied", "a-3")
    make(with_more, 18)
    assert [found.round for found in with_more.rounds] == [14, 15, 16, 17, 18]
    assert with_more.get(13) == NotedRound(13, sent="yes", closed=FORGOTTEN)


def test_lines_of_the_process_before_count_too(tmp_path: Path) -> None:
    for number in range(1, 30):
        journal = opened(tmp_path)
        if number == 1:
            journal.begin()
        make(journal, number)
        journal.close()
        assert len(lines_of(journal)) <= 40 + 1


def test_the_names_of_files_are_put_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    journal = opened(tmp_path)
    assert synced == [True]
    journal.begin()
    assert synced == [True, False, True]


def test_what_was_not_read_yet_outlives_the_writing_anew(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    make(journal, 1)
    journal.announced("late")
    journal._compact()
    journal.close()
    assert opened(tmp_path).unread == "late"


def test_a_new_beginning_takes_what_was_before_out_of_the_file(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    make(journal, 1, closed=False)
    journal.begin(journal.get(1), 1)
    assert [line["event"] for line in lines_of(journal)] == ["begin"]
    assert journal.heard == ["a-1"]
    journal.close()
    again = opened(tmp_path)
    left = NotedRound(1, "yes", "file-1", "sha256=1", 10, "abc", "a-1")
    assert (again.rounds, again.unfinished("abc")) == ([left], left)


def test_after_a_new_beginning_nothing_of_the_training_before_is_open_or_unread(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    make(journal, 1)
    journal.announced("late")
    journal.begin()
    assert (journal.unread, journal.unfinished("abc"), journal.rounds, journal.heard) == (None, None, [], [])
    journal.announced("new")
    assert journal.unread == "new"


@pytest.mark.parametrize("step_name", ["os.replace", "os.fsync"])
def test_a_disk_that_is_full_when_it_is_written_anew_lets_it_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step_name: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = opened(tmp_path)
    journal.begin()
    for number in range(1, 8):
        make(journal, number)
    before = Path(journal.path).read_bytes()
    with monkeypatch.context() as once:
        once.setattr(step_name, full)
        journal._compact()
        assert os.strerror(errno.ENOSPC) in caplog.text
        with pytest.raises(JournalError, match="a file that can be written"):
            journal.begin()
    assert Path(journal.path).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["leaf.jsonl", "leaf.lock"]
    make(journal, 8)
    assert len(lines_of(journal)) == 41
    # Not tried again with each line.
    monkeypatch.setattr(journal, "_compact", lambda: pytest.fail("too soon"))
    make(journal, 9)
    journal.close()
    assert [each.round for each in opened(tmp_path).rounds] == [5, 6, 7, 8, 9]


def test_a_checkpoint_older_than_the_journal_remembers_sends_nothing_and_joins_later(tmp_path: Path) -> None:
    store = small_store()
    with Sandbox(leaves=1) as sandbox:
        with leaf(sandbox, tmp_path) as engine:
            start = engine.state_dict()
            for _ in range(7):
                step(engine, store)
        with leaf(sandbox, tmp_path) as engine:
            engine.load_state_dict(start)
            made = [step(engine, store)]
            assert not engine.pending
            made += [step(engine, store) for _ in range(7)]
        assert [(each.round, each.status) for each in made] == [
            *((number, "skipped") for number in (1, 2)), *((number, "applied") for number in range(3, 9))
        ]  # fmt: skip
        assert "so many after it that its aggregate is not known; not sent again" in made[0].reason
        assert sandbox.hits("upload") == 8
        with leaf(sandbox, tmp_path) as engine:
            engine.load_state_dict(
                {**start, "pending": {"round": 2, "upload_id": "x", "digest": "", "uploaded_bytes": 1}}
            )
            assert not engine.pending


def test_the_fingerprint_of_all_rounds_is_one_text_in_memory(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.begin()
    for number in (1, 2):
        journal.sending(number, "".join(["layers of ", "the model"]), "sha256=x", 10)
    one, two = journal.rounds
    assert one.layout is two.layout


def test_a_history_holds_the_newest_outcomes_and_says_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "LONGEST_HISTORY", 10)
    history = History()
    for number in range(1, 11):
        history.append(RoundOutcome("pending", number))
    mark = history.total
    assert history.since(mark) == []
    history.extend([RoundOutcome("applied", 11), RoundOutcome("applied", 12)])
    assert [each.round for each in history] == [6, 7, 8, 9, 10, 11, 12]
    assert [each.round for each in history.since(mark)] == [11, 12]
    assert history.total == 12


def test_an_engine_tells_two_outcomes_a_round(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox, leaf(sandbox, tmp_path) as engine:
        step(engine, small_store())
        assert [each.status for each in engine.history] == ["pending", "applied"]
        assert isinstance(engine.history, History)


class LocalBranch:
    """A branch of one leaf that lives in this process and answers at once: what is measured is the leaf's alone."""

    leaf_id, branch_id, run_number, run_status = "leaf", "branch", 1, "start"

    def __init__(self, aggregate: Path) -> None:
        self.queue = Mailbox()
        self.last_upload: UploadReceipt | None = None
        self._aggregate = aggregate
        self._count = 0

    def mark(self) -> int:
        return self.queue.mark()

    def upload(self, arrays: Any, weighting: float, *, metadata: Any = None, note: Any = None) -> str:
        self._count += 1
        digest = f"sha256={self._count:064x}"
        for name in ("sending", "posted"):
            note(name, digest, 1000)
        self.last_upload = UploadReceipt(f"file-{self._count:032x}", 1000, digest, "deflate")
        self.queue.put(f"aggregate-{self._count:032x}")
        return self.last_upload.file_id

    def wait_for_aggregation(self, timeout_s: float | None, *, newer_than: int | None = None, **_: Any) -> str:
        found = self.queue.wait_newer(newer_than or 0, timeout_s)
        assert found is not None
        return found

    def open_aggregation(self, aggregation_id: str, **_: Any) -> Any:
        return Archive.open(self._aggregate)

    def send_performance_metrics(self, *_: Any) -> None:
        pass


def test_hundreds_of_rounds_leave_no_more_behind_than_some_dozens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "LONGEST_HISTORY", 10)
    monkeypatch.setattr(events, "_SEEN_IDS", 10)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # The disk is not what is measured.
    store = small_store()
    write_archive(tmp_path / "aggregate.npz", store.read(), 1.0)
    client: Any = LocalBranch(tmp_path / "aggregate.npz")
    engine = RoundEngine(client, RoundOptions.of(journal=tmp_path / "journal"))
    held = []
    tracemalloc.start()
    try:
        for number in range(240):
            assert step(engine, store, metrics={"loss": 0.5}).status == "applied"
            if number in (39, 239):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        engine.close()
    # Without a bound each round leaves a kilobyte.
    assert held[1] - held[0] < 20_000
    assert sum(path.stat().st_size for path in (tmp_path / "journal").iterdir()) < 20_000
