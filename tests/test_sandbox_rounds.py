"""Whole rounds over the wire: quorum, mean, repeats, misfits, a new run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from branchkey_integrations.sandbox import Sandbox, service
from tests.support.raw_leaf import RawLeaf, aggregate_ready, npz, received


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=3) as opened:
        yield opened


@pytest.fixture
def leaves(sandbox: Sandbox) -> list[RawLeaf]:
    return [RawLeaf(sandbox, index) for index in range(3)]


def wait_for_aggregates(sandbox: Sandbox, count: int) -> str:
    sandbox.wait_for(lambda: len(sandbox.aggregates) >= count)
    assert len(sandbox.aggregates) == count
    return sandbox.aggregates[-1]


def test_three_leaves_get_the_float64_mean_of_what_they_sent_rounded_once(sandbox: Sandbox, leaves) -> None:
    generator = np.random.default_rng(3)
    sent = [[generator.standard_normal((17, 5)).astype("f4") for _ in range(12)] for _ in leaves]
    weightings = [105.0, 150.0, 40.0]
    with leaves[0].connected() as websocket:
        # In another order than that of the leaves: the result must not depend on who is first.
        for index in (2, 0, 1):
            leaves[index].send(sent[index], weightings[index])
        aggregation_id = wait_for_aggregates(sandbox, 1)
        assert received(websocket) == aggregate_ready(aggregation_id)
    for leaf in leaves:
        layers = leaf.download(aggregation_id)
        assert len(layers) == 12
        for position, layer in enumerate(layers):
            total = sum(w * arrays[position].astype("f8") for w, arrays in zip(weightings, sent))
            assert layer.dtype == np.float32
            assert layer.tobytes() == (total / sum(weightings)).astype("f4").tobytes()
    assert [layer.tobytes() for layer in sandbox.aggregate(aggregation_id)] == [layer.tobytes() for layer in layers]


def test_nothing_is_averaged_before_the_quorum_and_the_late_leaf_opens_the_next_round() -> None:
    with Sandbox(leaves=3, quorum=2) as sandbox:
        leaves = [RawLeaf(sandbox, index) for index in range(3)]
        assert sandbox.quorum == 2
        leaves[0].send([np.array([1.0])])
        assert sandbox.aggregates == []
        leaves[1].send([np.array([3.0])])
        first = wait_for_aggregates(sandbox, 1)
        leaves[2].send([np.array([10.0])])
        leaves[0].send([np.array([20.0])])
        second = wait_for_aggregates(sandbox, 2)
        assert leaves[2].download(first)[0].tolist() == [2.0]
        assert leaves[2].download(second)[0].tolist() == [15.0]


def test_a_leaf_that_is_added_counts_for_the_quorum(sandbox: Sandbox, leaves) -> None:
    assert sandbox.quorum == 3
    sandbox.add_leaf("fourth")
    assert sandbox.quorum == 4
    for leaf in leaves:
        leaf.send([np.zeros(1)])
    assert sandbox.aggregates == []
    RawLeaf(sandbox, 3).send([np.full(1, 4.0)])
    assert leaves[0].download(wait_for_aggregates(sandbox, 1))[0].tolist() == [1.0]


def test_a_newer_upload_of_a_leaf_counts_in_place_of_its_older_one(sandbox: Sandbox, leaves) -> None:
    first = leaves[0].send([np.array([100.0])])
    second = leaves[0].send([np.array([3.0])])
    assert first != second
    leaves[1].send([np.array([3.0])])
    leaves[2].send([np.array([0.0])])
    assert leaves[0].download(wait_for_aggregates(sandbox, 1))[0].tolist() == [2.0]
    assert len(sandbox.uploads) == 4


def test_a_repeat_is_answered_with_the_same_id_and_counted_once(sandbox: Sandbox, leaves) -> None:
    content = npz([np.array([1.0])])
    ids = {leaves[0].upload(content).json()["data"]["file_id"] for _ in range(3)}
    assert len(ids) == 1
    assert len(sandbox.uploads) == 1
    assert sandbox.hits("upload") == 3


def test_a_repeat_after_the_round_has_closed_is_not_counted_into_the_next_one() -> None:
    with Sandbox(leaves=1) as sandbox:
        leaf = RawLeaf(sandbox)
        content = npz([np.array([1.0])])
        first = leaf.upload(content).json()["data"]["file_id"]
        aggregation_id = wait_for_aggregates(sandbox, 1)
        again = leaf.upload(content)
        assert again.status_code == 201
        assert again.json()["data"]["file_id"] == first
        assert len(sandbox.uploads) == 1
        # Once the leaf has asked for the aggregate, the same weights are a new round.
        leaf.link(aggregation_id)
        assert leaf.upload(content).json()["data"]["file_id"] != first
        wait_for_aggregates(sandbox, 2)


def test_a_repeat_is_known_by_its_digest_before_its_contents_are_looked_at(
    sandbox: Sandbox, leaves, monkeypatch
) -> None:
    looked: list[str] = []
    real = service.check_contents
    monkeypatch.setattr(service, "check_contents", lambda parcel: looked.append(parcel.digest) or real(parcel))
    content = npz([np.array([1.0])])
    for _ in range(3):
        assert leaves[0].upload(content).status_code == 201
    assert len(looked) == 1


def test_repeats_that_come_at_the_same_time_count_once() -> None:
    with Sandbox(leaves=2) as sandbox:
        leaf = RawLeaf(sandbox)
        content = npz([np.random.default_rng(0).standard_normal(200_000)])
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: leaf.upload(content), range(8)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["data"]["file_id"] for answer in answers}) == 1
        assert len(sandbox.uploads) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([np.zeros((2, 3), "f4")], ["2 layers", "found 1"]),
        ([np.zeros((2, 3), "f4"), np.zeros(4, "f4")], ["layer_1", "float32[3]", "float32[4]"]),
        ([np.zeros((3, 2), "f4"), np.zeros(3, "f4")], ["layer_0", "float32[2, 3]", "float32[3, 2]"]),
        ([np.zeros((2, 3), "i4"), np.zeros(3, "f4")], ["layer_0", "int32"]),
    ],
)
def test_a_leaf_with_another_model_is_refused_by_name_and_the_others_go_on(
    sandbox: Sandbox, leaves, bad, words
) -> None:
    good = [np.ones((2, 3), "f4"), np.ones(3, "f4")]
    leaves[0].send(good)
    answer = leaves[1].upload(npz(bad))
    assert answer.status_code == 422
    for word in words:
        assert word in answer.json()["error"]
    assert len(sandbox.uploads) == 1
    leaves[1].send(good)
    leaves[2].send(good)
    assert leaves[0].download(wait_for_aggregates(sandbox, 1))[1].tolist() == [1.0] * 3


def test_every_float_keeps_its_dtype(sandbox: Sandbox, leaves) -> None:
    for leaf in leaves:
        leaf.send([np.ones(2, kind) for kind in ("f2", "f4", "f8")])
    layers = leaves[0].download(wait_for_aggregates(sandbox, 1))
    assert [layer.dtype.name for layer in layers] == ["float16", "float32", "float64"]


def test_ids_are_url_safe_and_all_different() -> None:
    with Sandbox(leaves=1) as sandbox:
        leaf = RawLeaf(sandbox)
        for number in range(5):
            leaf.send([np.array([float(number)])])
            wait_for_aggregates(sandbox, number + 1)
        ids = sandbox.aggregates
        assert len(set(ids)) == 5
        assert all(len(each) == 36 and set(each) <= set("0123456789abcdef-") for each in ids)
        assert [leaf.download(each)[0].tolist() for each in ids] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_a_new_run_starts_with_an_empty_round(sandbox: Sandbox, leaves) -> None:
    leaves[0].send([np.zeros(1)])
    sandbox.stop()
    sandbox.start()
    # Another model in the new run is nobody's fault.
    for leaf in leaves[1:]:
        leaf.send([np.ones((2, 2))])
    assert sandbox.aggregates == []
    leaves[0].send([np.ones((2, 2))])
    assert leaves[0].download(wait_for_aggregates(sandbox, 1))[0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_many_leaves_upload_at_once_and_one_aggregate_comes() -> None:
    with Sandbox(leaves=12) as sandbox:
        leaves = [RawLeaf(sandbox, index) for index in range(12)]
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda pair: pair[1].send([np.array([float(pair[0])])]), enumerate(leaves)))
        assert leaves[3].download(wait_for_aggregates(sandbox, 1))[0].tolist() == [5.5]
        assert len(sandbox.uploads) == 12


def test_the_own_aggregate_and_a_published_one_live_side_by_side(sandbox: Sandbox, leaves) -> None:
    leaves[0].send([np.zeros(1)])
    published = sandbox.publish([np.array([7.0])], "by-hand")
    leaves[1].send([np.zeros(1)])
    leaves[2].send([np.array([3.0])])
    assert leaves[0].download(wait_for_aggregates(sandbox, 2))[0].tolist() == [1.0]
    assert leaves[0].download(published)[0].tolist() == [7.0]
