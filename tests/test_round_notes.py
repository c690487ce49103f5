"""What a leaf that starts again takes from its journal, and what it does not take for news."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchkey_integrations.events import Mailbox
from branchkey_integrations.journal import Journal
from branchkey_integrations.outcome import PendingRound
from branchkey_integrations.round_notes import RoundNotes


class Leaf:
    leaf_id, branch_id, run_number = "leaf", "branch", 1

    def __init__(self) -> None:
        self.queue = Mailbox()


def noted(folder: Path, *announced: str) -> None:
    """Note a round that was loaded, and what was announced after it."""
    journal = Journal(str(folder), "leaf", "branch", 1)
    journal.begin()
    journal.sending(1, "abc", "sha256=x", 10)
    journal.posted(1)
    journal.sent(1, "file-1")
    journal.announced("a-1")
    journal.closed(1, "applied", "a-1")
    for each in announced:
        journal.announced(each)
    journal.close()


def resumed(folder: Path, leaf: Any, pending: PendingRound | None = None) -> RoundNotes:
    notes = RoundNotes(leaf, str(folder))
    notes.resume(pending, "abc")
    return notes


def test_an_aggregate_that_was_dealt_with_is_no_news_when_it_comes_again(tmp_path: Path) -> None:
    noted(tmp_path)
    leaf = Leaf()
    resumed(tmp_path, leaf).close()
    assert not leaf.queue.put("a-1")
    assert leaf.queue.put("a-2")


def test_one_that_nobody_read_is_there_after_the_restart_and_noted_once(tmp_path: Path) -> None:
    noted(tmp_path, "late")
    leaf = Leaf()
    notes = resumed(tmp_path, leaf)
    assert leaf.queue.get_nowait() == "late"
    notes.close()
    assert Journal(str(tmp_path), "leaf", "branch", 1).heard == ["a-1", "late"]


def test_one_that_nobody_read_does_not_take_the_place_of_what_this_process_heard(tmp_path: Path) -> None:
    noted(tmp_path, "late")
    leaf = Leaf()
    leaf.queue.put("newer")
    notes = resumed(tmp_path, leaf)
    assert leaf.queue.get_nowait() == "newer"
    assert not leaf.queue.put("late")
    notes.close()
    assert Journal(str(tmp_path), "leaf", "branch", 1).heard == ["a-1", "late", "newer"]


def test_what_is_heard_from_now_on_is_noted_until_it_is_closed(tmp_path: Path) -> None:
    noted(tmp_path)
    leaf = Leaf()
    notes = resumed(tmp_path, leaf)
    leaf.queue.put("a-2")
    notes.close()
    leaf.queue.put("a-3")
    assert Journal(str(tmp_path), "leaf", "branch", 1).heard == ["a-1", "a-2"]


def test_a_round_that_the_journal_does_not_know_stays_as_the_checkpoint_has_it(tmp_path: Path) -> None:
    noted(tmp_path)
    pending = PendingRound(7, -1, None, "", 0, waits=True)
    notes = RoundNotes(Leaf(), str(tmp_path))  # type: ignore[arg-type]
    assert notes.resume(pending, "abc") is pending
    notes.close()


def test_all_that_is_known_of_an_open_round_is_taken_up(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), "leaf", "branch", 1)
    journal.begin()
    journal.sending(3, "abc", "sha256=x", 10)
    journal.posted(3)
    journal.announced("a-3")
    journal.close()
    notes = RoundNotes(Leaf(), str(tmp_path))  # type: ignore[arg-type]
    assert notes.resume(PendingRound(3, 5, None, "", 0), "abc") == PendingRound(
        3, -1, None, "sha256=x", 10, aggregation_id="a-3", repeated=True, certain=False
    )
    notes.sent(3, "file-3")
    notes.close()
    again = RoundNotes(Leaf(), str(tmp_path))  # type: ignore[arg-type]
    assert again.resume(PendingRound(3, 5, None, "", 0), "abc") == PendingRound(
        3, -1, "file-3", "sha256=x", 10, aggregation_id="a-3", repeated=True, certain=True
    )
    again.close()


def test_an_open_round_of_a_checkpoint_comes_into_an_empty_journal_whole(tmp_path: Path) -> None:
    for upload_id, sent in (("file", "yes"), (None, "maybe")):
        folder = tmp_path / sent
        resumed(folder, Leaf(), PendingRound(3, 5, upload_id, "sha256=x", 10, aggregation_id="a")).close()
        journal = Journal(str(folder), "leaf", "branch", 1)
        (found,) = journal.rounds
        journal.close()
        assert (found.round, found.sent, found.upload_id, found.digest, found.uploaded_bytes, found.layout) == (
            3, sent, upload_id, "sha256=x", 10, "abc"
        )  # fmt: skip
        assert found.aggregation_id == "a"
