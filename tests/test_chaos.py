"""Faults on purpose: each kind does what it says, the same seed does it again, and what is stored stays sound."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import requests
from websockets.exceptions import ConnectionClosedError

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.sandbox import Answer, Chaos, Sandbox
from branchkey_integrations.sandbox.chaos import KINDS, Dice, table
from branchkey_integrations.sandbox.chaos_news import Courier
from branchkey_integrations.sandbox.roster import Roster
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, aggregate_ready, layers_of, npz, received, run_is

CONTENT = npz([np.arange(600.0), np.array([1, 2])])


def only(**faults: Any) -> Chaos:
    return Chaos(**faults)


def falls(chaos: Chaos, kind: str, who: str, count: int) -> list[bool]:
    dice = Dice(chaos)
    return [dice.throw(kind, who) is not None for _ in range(count)]


def seed_of(kind: str, who: str, wanted: list[bool], **more: Any) -> Chaos:
    """Find a seed by which a kind that is even odds falls as wanted."""
    candidates = (Chaos(seed=seed, **{kind: 0.5}, **more) for seed in range(1000))
    return next(chaos for chaos in candidates if falls(chaos, kind, who, len(wanted)) == wanted)


# --- the value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "what"),
    [
        ({"lost": 1.1}, "chaos lost"),
        ({"nan": -0.1}, "chaos nan"),
        ({"corrupt": float("nan")}, "chaos corrupt"),
        ({"refused": True}, "chaos refused"),
        ({"delayed": "often"}, "chaos delayed"),
        ({"seed": 1.5}, "chaos seed"),
        ({"delay_s": -1}, "chaos delay_s"),
    ],
)
def test_a_wrong_probability_is_named(faults: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Chaos(**faults)
    assert caught.value.what == what


def test_a_chaos_is_a_value() -> None:
    chaos = Chaos.mix(0.2, seed=3)
    assert chaos == pickle.loads(pickle.dumps(chaos)) == Chaos.mix(0.2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chaos.lost = 1.0  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="chaos: expected a Chaos or None, found float"):
        Sandbox(chaos=0.2)  # type: ignore[arg-type]


def test_a_mix_has_all_kinds_and_none_above_its_level() -> None:
    chaos = Chaos.mix(0.2)
    shares = {kind: chaos.probability(kind) for kind in KINDS}
    assert all(0 < share <= 0.2 for share in shares.values())
    assert (shares["delayed"], shares["refused"], shares["nan"], shares["broker_kills"]) == pytest.approx(
        (0.2, 0.1, 0.02, 0.01)
    )
    assert Chaos.mix(0.0) == Chaos()
    with pytest.raises(ConfigurationError, match="chaos level: expected a probability from 0 to 1, found 2"):
        Chaos.mix(2)


# --- the dice -----------------------------------------------------------------------------------------------------------


def test_the_dice_fall_alike_for_a_seed_and_otherwise_for_another() -> None:
    chaos = Chaos(seed=5, lost=0.3, refused=0.3)
    first = falls(chaos, "lost", "0", 200)
    assert first == falls(chaos, "lost", "0", 200)
    assert 30 < sum(first) < 90
    for other in (
        falls(Chaos(seed=6, lost=0.3), "lost", "0", 200),
        falls(chaos, "lost", "1", 200),
        falls(chaos, "refused", "0", 200),
    ):
        assert other != first
    # A number, so that another machine or Python that falls otherwise is noticed.
    assert [index for index, hit in enumerate(first[:20]) if hit] == FALLEN


FALLEN = [2, 3, 9, 13, 18]


def test_who_comes_first_changes_nothing() -> None:
    chaos = Chaos(seed=1, lost=0.5)
    alone = falls(chaos, "lost", "0", 100)
    dice = Dice(chaos)
    mine: list[bool] = []
    ended = threading.Event()

    def others() -> None:
        while not ended.is_set():
            dice.throw("lost", "1")
            dice.throw("nan", "0")

    thread = threading.Thread(target=others)
    thread.start()
    try:
        mine = [dice.throw("lost", "0") is not None for _ in range(100)]
    finally:
        ended.set()
        thread.join()
    assert mine == alone


def test_never_is_never_always_is_always_and_all_is_counted() -> None:
    dice = Dice(Chaos(lost=1.0, nan=0.0))
    hows = [dice.throw("lost") for _ in range(50)]
    assert all(how is not None and 0 <= how < 1 for how in hows)
    assert len(set(hows)) == 50
    assert [dice.throw("nan") for _ in range(50)] == [None] * 50
    assert {kind: count for kind, count in dice.done.items() if count} == {"lost": 50}
    assert (dice.chances["lost"], dice.chances["nan"], dice.chances["corrupt"]) == (50, 50, 0)
    assert table(dice)[0].split()[:4] == ["lost", "50", "of", "50"]
    assert [line.split()[0] for line in table(dice)] == list(KINDS)


# --- requests -----------------------------------------------------------------------------------------------------------


def test_a_refused_upload_was_not_taken_and_its_status_says_so() -> None:
    with Sandbox(chaos=only(refused=1.0)) as sandbox:
        answers = [RawLeaf(sandbox).upload(CONTENT) for _ in range(12)]
        assert {answer.status_code for answer in answers} <= {408, 425, 429, 503}
        assert {answer.headers["retry-after"] for answer in answers} == {"0"}
        assert sandbox.uploads == []
        statuses = {RawLeaf(sandbox).run().status_code for _ in range(12)}
        assert statuses & {500, 502, 504}
        assert sandbox.chaos_report["refused"] == 24


def test_an_unanswered_upload_was_counted_and_a_repeat_of_it_is_not() -> None:
    seen: set[object] = set()
    with Sandbox(leaves=2, chaos=only(unanswered=1.0)) as sandbox:
        leaf = RawLeaf(sandbox)
        for number in range(16):
            try:
                seen.add(leaf.upload(npz([np.full(3, number)])).status_code)
            except requests.exceptions.ConnectionError:
                seen.add("reset")
        assert [upload.layers[0][0] for upload in sandbox.uploads] == list(range(16))
        assert seen == {500, 502, 504, "reset"}
        assert sandbox.chaos_report["unanswered"] == 16
        assert leaf.run().status_code == 200
    with Sandbox(leaves=2, chaos=seed_of("unanswered", "0", [True, False])) as sandbox:
        with contextlib.suppress(requests.exceptions.ConnectionError):
            assert RawLeaf(sandbox).upload(CONTENT).status_code >= 500
        repeat = RawLeaf(sandbox).upload(CONTENT)
        assert (repeat.status_code, [upload.file_id for upload in sandbox.uploads]) == (
            201,
            [repeat.json()["data"]["file_id"]],
        )


def test_an_answer_breaks_off_after_the_work_was_done() -> None:
    with Sandbox(leaves=2, chaos=only(cut_answers=1.0)) as sandbox:
        leaf = RawLeaf(sandbox)
        for _ in range(3):
            with pytest.raises(requests.exceptions.RequestException):
                leaf.upload(CONTENT).json()
            with pytest.raises(requests.exceptions.RequestException):
                leaf.run().json()
        (upload,) = sandbox.uploads
        assert (upload.size_bytes, sandbox.chaos_report["cut_answers"]) == (len(CONTENT), 6)


def test_aggregates_break_off_or_change_on_the_wire_and_the_stored_one_is_sound() -> None:
    arrays = [np.arange(600.0), np.arange(7)]
    with Sandbox(chaos=seed_of("cut_downloads", "", [True, False], corrupt=1.0)) as sandbox:
        leaf = RawLeaf(sandbox)
        identifier = sandbox.publish(arrays)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            requests.get(leaf.link(identifier), timeout=TIMEOUT_S)
        changed = requests.get(leaf.link(identifier), timeout=TIMEOUT_S).content
        with open(f"{sandbox.directory}/aggregates/{identifier}.npz", "rb") as file:
            stored = file.read()
        differing = [index for index, pair in enumerate(zip(changed, stored)) if pair[0] != pair[1]]
        assert len(changed) == len(stored)
        assert (len(differing), differing[-1] - differing[0]) == (16, 15)
        assert all(np.array_equal(*pair) for pair in zip(layers_of(stored), arrays))
        assert {kind: count for kind, count in sandbox.chaos_report.items() if count} == {
            "cut_downloads": 1,
            "corrupt": 1,
        }


def test_one_value_of_a_poisoned_aggregate_is_nan_for_all_leaves_and_the_next_one_is_sound() -> None:
    with Sandbox(chaos=seed_of("nan", "", [True, False])) as sandbox:
        leaf = RawLeaf(sandbox)
        found = []
        for value in (1.0, 2.0):
            leaf.send([np.full(5, value), np.array([3, 4]), np.zeros((0, 2))])
            identifier = sandbox.wait_for(lambda n=int(value): sandbox.aggregates[n - 1 :], TIMEOUT_S)[0]
            found.append(leaf.download(identifier))
            assert np.array_equal(found[-1][0], sandbox.aggregate(identifier)[0], equal_nan=True)
        assert [int(np.isnan(layers[0]).sum()) for layers in found] == [1, 0]
        assert found[0][1].tolist() == [3, 4]
        assert set(found[0][0][~np.isnan(found[0][0])]) == {1.0}
        assert found[1][0].tolist() == [2.0] * 5


def test_a_handler_of_a_test_stands_outside_of_the_faults() -> None:
    seen = []

    def watch(call: Any) -> Answer:
        answer = call.proceed()
        seen.append(answer.status)
        return Answer.json({"data": {}})

    with Sandbox(chaos=only(refused=1.0)) as sandbox, sandbox.intercept("run", watch):
        assert RawLeaf(sandbox).run().status_code == 200
    assert len(seen) == 1
    assert seen[0] >= 400


# --- notifications ------------------------------------------------------------------------------------------------------


def test_a_lost_notification_costs_the_connection_and_comes_at_the_next_one() -> None:
    with Sandbox(chaos=only(lost=1.0)) as sandbox:
        leaf = RawLeaf(sandbox)
        with leaf.connected() as websocket:
            sandbox.wait_for(lambda: sandbox.connected)
            identifier = sandbox.publish([np.zeros(2)])
            with pytest.raises(ConnectionClosedError):
                websocket.recv(timeout=TIMEOUT_S)
        with leaf.connected() as websocket:
            assert received(websocket) == aggregate_ready(identifier)
            sandbox.pause()
            with pytest.raises(ConnectionClosedError):
                websocket.recv(timeout=TIMEOUT_S)
        with leaf.connected() as websocket:
            assert [received(websocket), received(websocket)] == [run_is("pause"), aggregate_ready(identifier)]
        assert sandbox.chaos_report["lost"] == 2


def heard(chaos: Chaos, announce: list[str], count: int) -> list[str]:
    """Announce aggregates to a connected leaf and give the ids of the next ``count`` notifications."""
    with Sandbox(chaos=chaos) as sandbox, RawLeaf(sandbox).connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        for identifier in announce:
            sandbox.publish([np.zeros(1)], identifier)
        found = [received(websocket)["body"]["aggregation_id"] for _ in range(count)]
        sandbox.notify('"end"')
        assert json.loads(websocket.recv(timeout=TIMEOUT_S)) == "end"
        return found


def test_a_duplicate_comes_twice() -> None:
    assert heard(only(duplicated=1.0, delay_s=0.01), ["a"], 2) == ["a", "a"]


def test_a_late_one_comes_once() -> None:
    assert heard(only(delayed=1.0, delay_s=0.05), ["a"], 1) == ["a"]


def test_one_that_is_held_back_is_overtaken_by_the_next() -> None:
    assert heard(seed_of("reordered", "0", [True, False], delay_s=60.0), ["a", "b"], 2) == ["b", "a"]


def test_one_that_nobody_overtakes_comes_all_the_same() -> None:
    assert heard(only(reordered=1.0, delay_s=0.05), ["a"], 1) == ["a"]


def test_what_goes_to_a_broker_is_doubled_and_overtaken_but_never_lost() -> None:
    async def scene(chaos: Chaos, texts: str, count: int) -> list[str]:
        sent: list[Any] = []
        enough = asyncio.Event()

        def send(text: Any) -> None:
            sent.append(text)
            if len(sent) == count:
                enough.set()

        courier = Courier(Dice(chaos), Roster())
        for text in texts:
            courier.publish(send, text)
        await asyncio.wait_for(enough.wait(), TIMEOUT_S)
        return sent

    assert asyncio.run(scene(only(lost=1.0), "abc", 3)) == ["a", "b", "c"]
    assert sorted(asyncio.run(scene(only(duplicated=1.0, delay_s=0.01), "ab", 4))) == ["a", "a", "b", "b"]
    overtaken = seed_of("reordered", "broker", [True, False, False], delay_s=60.0)
    assert asyncio.run(scene(overtaken, "abc", 3)) == ["b", "a", "c"]


# --- all of it ----------------------------------------------------------------------------------------------------------


def outcome_of(seed: int) -> tuple[list[object], dict[str, int]]:
    seen: list[object] = []
    with Sandbox(chaos=Chaos.mix(0.6, seed, delay_s=0.0)) as sandbox:
        leaf = RawLeaf(sandbox)
        for number in range(10):
            for attempt in (leaf.run, lambda n=number: leaf.upload(npz([np.full(3, n)]))):
                try:
                    seen.append(attempt().status_code)
                except requests.exceptions.RequestException as error:
                    seen.append(type(error).__name__)
        sandbox.wait_for(lambda: len(sandbox.aggregates) == len(sandbox.uploads), TIMEOUT_S)
        return seen, sandbox.chaos_report


def test_the_same_seed_brings_the_same_faults() -> None:
    first = outcome_of(1)
    assert first == outcome_of(1)
    assert first != outcome_of(2)
    assert sum(first[1].values()) > 3


def test_without_chaos_nothing_happens() -> None:
    with Sandbox() as sandbox:
        RawLeaf(sandbox).send([np.zeros(2)])
        assert set(sandbox.chaos_report.values()) == {0}
        assert list(sandbox.chaos_report) == list(KINDS)
