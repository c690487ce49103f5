"""The state machine of a branch: whose update counts, when a round closes, what each leaf still has to hear."""

from __future__ import annotations

import json
from itertools import count

import pytest

from branchkey_integrations.errors import LayoutError, RunBlockedError, SandboxError
from branchkey_integrations.sandbox.branch import Branch, Receipt, Update

LAYERS = (((2, 3), "float32"), ((3,), "float32"))


def branch_of(leaves: int, quorum: int | None = None) -> Branch:
    numbers = count(1)
    branch = Branch(quorum, lambda: f"aggregate-{next(numbers)}")
    for index in range(leaves):
        branch.add_leaf(f"leaf-{index}")
    return branch


def update(leaf: int, digest: str, layers=LAYERS, weighting: float = 1.0) -> Update:
    return Update(f"file-{leaf}-{digest}", f"leaf-{leaf}", digest, weighting, layers)


def test_the_round_closes_when_all_leaves_have_uploaded_and_lists_them_in_leaf_order() -> None:
    branch = branch_of(3)
    assert branch.submit(update(2, "c")) == Receipt("file-2-c")
    assert branch.submit(update(0, "a")) == Receipt("file-0-a")
    closed = branch.submit(update(1, "b")).closed
    assert closed is not None
    assert (closed.number, closed.aggregation_id) == (1, "aggregate-1")
    assert [each.file_id for each in closed.updates] == ["file-0-a", "file-1-b", "file-2-c"]
    assert branch.pending == ()
    assert branch.closing == (closed,)
    branch.finish("aggregate-1")
    assert branch.closing == ()


def test_a_quorum_below_the_number_of_leaves_closes_earlier_and_the_late_one_opens_the_next_round() -> None:
    branch = branch_of(3, quorum=2)
    branch.submit(update(0, "a"))
    assert branch.submit(update(1, "b")).closed is not None
    assert branch.submit(update(2, "c")).closed is None
    assert [each.leaf_id for each in branch.pending] == ["leaf-2"]


def test_the_default_quorum_follows_the_number_of_leaves() -> None:
    branch = branch_of(1)
    assert branch.quorum == 1
    branch.add_leaf("leaf-1")
    assert branch.quorum == 2
    assert Branch(None, lambda: "x").quorum == 1
    assert branch_of(3, quorum=5).quorum == 5


def test_a_newer_update_of_a_leaf_replaces_its_older_one() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "old"))
    assert branch.submit(update(0, "new")) == Receipt("file-0-new")
    closed = branch.submit(update(1, "b")).closed
    assert closed is not None
    assert [each.digest for each in closed.updates] == ["new", "b"]


def test_the_same_digest_in_the_open_round_is_a_repeat_with_the_same_file_id() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    again = Update("file-other", "leaf-0", "a", 1.0, LAYERS)
    assert branch.submit(again) == Receipt("file-0-a", repeated=True)
    assert [each.file_id for each in branch.pending] == ["file-0-a"]


def test_the_same_digest_from_another_leaf_is_no_repeat() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    receipt = branch.submit(update(1, "a"))
    assert not receipt.repeated
    assert receipt.closed is not None
    assert len(receipt.closed.updates) == 2


def test_a_repeat_after_the_round_has_closed_opens_no_new_round() -> None:
    branch = branch_of(1)
    branch.submit(update(0, "a"))
    assert branch.submit(Update("file-other", "leaf-0", "a", 1.0, LAYERS)) == Receipt("file-0-a", repeated=True)
    assert branch.rounds == 1
    assert branch.pending == ()


def test_the_same_weights_count_again_once_the_leaf_has_asked_for_the_aggregate() -> None:
    branch = branch_of(1)
    branch.submit(update(0, "a"))
    branch.announce("aggregate-1")
    branch.fetched("leaf-0", "aggregate-1")
    receipt = branch.submit(update(0, "a"))
    assert not receipt.repeated
    assert receipt.closed is not None
    assert receipt.closed.number == 2


def test_another_leaf_that_asks_for_the_aggregate_does_not_end_the_round_for_this_one() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    branch.submit(update(1, "b"))
    branch.announce("aggregate-1")
    branch.fetched("leaf-1", "aggregate-1")
    assert branch.submit(update(0, "a")).repeated
    assert not branch.submit(update(1, "b")).repeated


def test_an_update_in_between_ends_the_memory_of_the_closed_round() -> None:
    branch = branch_of(1)
    assert branch.submit(update(0, "a")).closed is not None
    assert branch.submit(update(0, "b")).closed is not None
    receipt = branch.submit(update(0, "a"))
    assert not receipt.repeated
    assert receipt.closed is not None
    assert receipt.closed.number == 3


def test_an_old_digest_is_no_repeat_while_another_update_of_the_leaf_is_open() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    branch.submit(update(1, "b"))
    branch.submit(update(0, "c"))
    assert not branch.submit(update(0, "a")).repeated
    assert [each.digest for each in branch.pending] == ["a"]


@pytest.mark.parametrize(
    ("layers", "what", "expected", "found"),
    [
        ((((2, 3), "float32"),), "update", "2 layers", "1"),
        ((((2, 3), "float32"), ((4,), "float32")), "layer_1", "float32[3]", "float32[4]"),
        ((((2, 3), "float32"), ((3, 1), "float32")), "layer_1", "float32[3]", "float32[3, 1]"),
        ((((2, 3), "int64"), ((3,), "float32")), "layer_0", "float32[2, 3]", "int64[2, 3]"),
        ((((2, 3), "float32"), ((3,), "bool")), "layer_1", "float32[3]", "bool[3]"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_by_name_and_harms_nobody(layers, what, expected, found) -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    with pytest.raises(LayoutError) as caught:
        branch.submit(update(1, "bad", layers))
    assert caught.value.what == what
    assert caught.value.expected.startswith(expected)
    assert "leaf-0" in caught.value.expected
    assert caught.value.found == found
    assert [each.digest for each in branch.pending] == ["a"]
    assert branch.submit(update(1, "good")).closed is not None


def test_floats_of_another_width_fit() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    wider = tuple((shape, "float64") for shape, _ in LAYERS)
    assert branch.submit(update(1, "b", wider)).closed is not None


def test_a_leaf_can_correct_its_own_layout_while_it_is_alone() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    branch.submit(update(0, "b", (((7,), "float32"),)))
    assert [each.digest for each in branch.pending] == ["b"]


@pytest.mark.parametrize("status", ["pause", "stop"])
def test_uploads_are_refused_while_the_run_is_not_started(status: str) -> None:
    branch = branch_of(1)
    branch.set_status(status)
    with pytest.raises(RunBlockedError) as caught:
        branch.submit(update(0, "a"))
    assert caught.value.run_status == status
    assert branch.rounds == 0


def test_a_pause_keeps_the_open_round_and_the_run_number() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    branch.set_status("pause")
    branch.set_status("start")
    assert branch.run_number == 1
    assert branch.submit(update(1, "b")).closed is not None


def test_a_start_after_a_stop_is_a_new_run_without_the_old_round_and_news() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a"))
    branch.announce("old")
    branch.set_status("stop")
    assert branch.run_number == 1
    branch.set_status("start")
    assert branch.run_number == 2
    assert branch.pending == ()
    assert branch.news("leaf-0") == (None, None)
    branch.set_status("start")
    assert branch.run_number == 2


def test_an_aggregate_is_news_until_the_leaf_asks_for_it() -> None:
    branch = branch_of(2)
    branch.announce("a1")
    assert branch.news("leaf-0") == (None, "a1")
    branch.fetched("leaf-0", "a1")
    assert branch.news("leaf-0") == (None, None)
    assert branch.news("leaf-1") == (None, "a1")


def test_what_some_leaf_still_lacks_is_known() -> None:
    branch = branch_of(2)
    assert branch.newest_unfetched is None
    branch.announce("a1")
    branch.fetched("leaf-0", "a1")
    assert branch.newest_unfetched == "a1"
    branch.fetched("leaf-1", "a1")
    assert branch.newest_unfetched is None


def test_only_the_newest_aggregate_is_news_and_asking_for_an_older_one_changes_nothing() -> None:
    branch = branch_of(1)
    branch.announce("a1")
    branch.announce("a2")
    branch.fetched("leaf-0", "a1")
    assert branch.news("leaf-0") == (None, "a2")


def test_the_run_status_is_news_to_a_leaf_that_knows_another() -> None:
    branch = branch_of(2)
    branch.set_status("pause")
    assert branch.news("leaf-0") == ("pause", None)
    branch.told_status("leaf-0")
    assert branch.news("leaf-0") == (None, None)
    branch.set_status("start")
    assert branch.news("leaf-0") == ("start", None)
    assert branch.news("leaf-1") == (None, None)


def test_the_state_survives_json() -> None:
    branch = branch_of(2)
    branch.submit(update(0, "a", weighting=2.5))
    branch.submit(update(1, "b"))
    branch.announce("aggregate-1")
    branch.submit(update(1, "next"))
    branch.set_status("pause")
    branch.told_status("leaf-1")
    copy = branch_of(2)
    copy.load_plain(json.loads(json.dumps(branch.to_plain())))
    assert copy.to_plain() == branch.to_plain()
    assert copy.closing == branch.closing
    assert copy.pending == branch.pending
    assert copy.repeat_of("leaf-0", "a") == update(0, "a", weighting=2.5)
    assert copy.news("leaf-0") == ("pause", "aggregate-1")


@pytest.mark.parametrize("broken", [{}, {"run_status": "start"}, []])
def test_a_broken_state_is_refused(broken) -> None:
    with pytest.raises(SandboxError, match="state of the sandbox"):
        branch_of(1).load_plain(broken)


def test_an_update_of_the_same_name_is_a_repeat_whatever_its_bytes_are() -> None:
    branch = branch_of(2)

    def sent(digest: str, name: str) -> Receipt:
        return branch.submit(Update(f"file-{digest}", "leaf-0", digest, 1.0, LAYERS, name))

    assert sent("a", "round-1") == Receipt("file-a")
    assert sent("b", "round-1") == Receipt("file-a", repeated=True)
    assert sent("c", "round-2") == Receipt("file-c")
    assert sent("d", "") == Receipt("file-d")
    assert sent("e", "") == Receipt("file-e")
