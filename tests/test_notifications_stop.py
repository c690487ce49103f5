"""A stop ends a training for good, so it counts when the platform says so too: notifications come late, twice, or never."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from branchkey_integrations import run_state, waiting
from branchkey_integrations.api import RunDetails
from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import RoundTimeoutError, RunBlockedError, UnreachableError
from branchkey_integrations.run_state import RunState
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.rounds import connect, engine_of, swallow
from tests.support.stores import small_store

STOP = json.dumps({"message_type": "run_status", "body": {"run_status": "stop"}})
START = json.dumps({"message_type": "run_status", "body": {"run_status": "start"}})
DOWN = Answer(503, b"<html>", "text/html")


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a wait look around more often than twice a second."""
    monkeypatch.setattr(waiting, "_SLICE_S", 0.02)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as made:
        yield made


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with connect(sandbox) as made:
        yield made


class Told:
    """Know when a client has taken a notification in."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: list[str] = []
        told = client._run.told

        def note(status: str) -> None:
            told(status)
            self.words.append(status)

        monkeypatch.setattr(client._run, "told", note)


@pytest.fixture
def told(client: Client, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(client, monkeypatch)


# --- whole rounds -------------------------------------------------------------------------------------------------------


def test_a_stop_of_an_earlier_run_does_not_end_a_leaf_that_waits(sandbox: Sandbox, client: Client, told: Told) -> None:
    engine, store = engine_of(client), small_store()
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
    sandbox.notify(STOP)
    waiter = threading.Thread(target=engine.collect, args=(store,))
    waiter.start()
    # The wait has asked, and goes on.
    sandbox.wait_for(lambda: told.words == ["stop"] and sandbox.hits("run") >= 2)
    newest = sandbox.publish(store.read())
    waiter.join(5)
    assert engine.last_outcome is not None
    assert (engine.last_outcome.status, engine.last_outcome.aggregation_id) == ("applied", newest)


def test_a_stop_of_an_earlier_run_does_not_keep_a_leaf_from_sending(
    sandbox: Sandbox, client: Client, told: Told
) -> None:
    sandbox.notify(STOP)
    sandbox.wait_for(lambda: told.words == ["stop"])
    outcome = engine_of(client).submit(small_store(), samples=1)
    assert (outcome.status, outcome.upload_id) == ("pending", sandbox.uploads[0].file_id)


def test_a_stop_ends_a_wait_however_late_the_platform_knows_of_it(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "_LEAST_S", 0.05)
    engine, store = engine_of(client, timeout_s=20), small_store()
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
    # A replica that lags behind: it says that the run goes on.
    with sandbox.intercept("run", _says("start"), times=1):
        sandbox.stop()
        assert engine.collect(store).status == "stopped"


def test_a_stop_is_not_believed_while_the_platform_cannot_be_asked_and_is_when_it_can(
    sandbox: Sandbox, client: Client, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "_LEAST_S", 0.05)
    engine, store = engine_of(client, timeout_s=20), small_store()
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
    waiter = threading.Thread(target=engine.collect, args=(store,))
    with sandbox.intercept("run", DOWN) as down:
        sandbox.stop()
        waiter.start()
        sandbox.wait_for(lambda: down.count >= 2)
        assert waiter.is_alive()
    waiter.join(5)
    assert engine.last_outcome is not None
    assert engine.last_outcome.status == "stopped"


def test_a_stop_that_nobody_announced_is_found_by_asking(sandbox: Sandbox) -> None:
    with connect(sandbox, run_check_interval_s=0.1) as client:
        engine, store = engine_of(client, timeout_s=20), small_store()
        with sandbox.intercept("upload", swallow):
            engine.submit(store, samples=1)
        with sandbox.intercept("run", _says("stop")):
            assert engine.collect(store).status == "stopped"


def test_a_start_that_comes_again_behind_the_stop_does_not_keep_a_leaf_waiting(sandbox: Sandbox) -> None:
    with connect(sandbox, run_check_interval_s=0.1) as client:
        engine, store = engine_of(client, timeout_s=20), small_store()
        with sandbox.intercept("upload", swallow):
            engine.submit(store, samples=1)
        sandbox.stop()
        sandbox.notify(START)
        assert engine.collect(store).status == "stopped"


def test_a_wait_without_length_asks_nothing(sandbox: Sandbox, client: Client) -> None:
    before = sandbox.hits("run")
    for _ in range(3):
        with pytest.raises(RoundTimeoutError):
            client.wait_for_aggregation(0)
    assert sandbox.hits("run") == before


def test_a_platform_that_is_away_does_not_hold_up_a_wait(sandbox: Sandbox) -> None:
    # A request that is repeated at all would wait for half a minute before.
    patient = RetryPolicy(backoff_s=30, jitter=0)
    with (
        connect(sandbox, run_check_interval_s=0.05, retry=patient) as client,
        sandbox.intercept("run", DOWN) as down,
    ):
        taken: list[str] = []
        waiter = threading.Thread(target=lambda: taken.append(client.wait_for_aggregation(10)))
        waiter.start()
        sandbox.wait_for(lambda: down.count >= 2)
        newest = sandbox.publish([*small_store().read()])
        waiter.join(5)
        assert taken == [newest]


# --- the state alone -------------------------------------------------------------------------------------------------------


def _says(status: str) -> Any:
    return lambda _call: Answer.json({"data": {"run_status": status, "run_number": 1}})


class Platform:
    """Answer what the script says, and let things happen while the question is on its way."""

    def __init__(self, *script: Any) -> None:
        self.script = [RunDetails("start", 1), *script]
        self.asked: list[bool] = []

    def run_details(self, *, patient: bool = True) -> RunDetails:
        self.asked.append(patient)
        # The last one is for ever.
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        found = step() if callable(step) else step
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, RunDetails)
        return found


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(run_state, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def state_of(platform: Platform) -> RunState:
    api: Any = platform
    return RunState(api)


def test_each_word_is_taken_as_it_deserves() -> None:
    platform = Platform(RunDetails("stop", 1))
    state = state_of(platform)
    state.told("pause")
    assert state.status == "pause"
    state.told("start")
    assert state.status == "start"
    state.told("a word of the future")
    assert state.status == "a word of the future"
    assert platform.asked == [True]
    state.told("stop")
    assert state.known == "a word of the future"
    assert state.status == "stop"
    # Asked once, without patience; and what is confirmed is not asked for again, also when it is announced again.
    state.told("stop")
    assert state.status == "stop"
    assert platform.asked == [True, False]


def test_a_start_behind_a_stop_ends_the_doubt() -> None:
    platform = Platform(RunDetails("stop", 1))
    state = state_of(platform)
    state.told("stop")
    state.told("start")
    assert state.status == "start"
    assert platform.asked == [True]


def test_a_contrary_answer_is_asked_for_again_in_growing_steps_and_then_believed(clock: Clock) -> None:
    platform = Platform(RunDetails("start", 1))
    state = state_of(platform)
    began = clock.now
    state.told("stop")
    asked_after = []
    for _ in range(2000):
        before = len(platform.asked)
        assert state.status == "start"
        if len(platform.asked) > before:
            asked_after.append(clock.now - began)
        clock.now += 0.125
    assert asked_after == [0, 1, 3, 7, 15, 31]


def test_failing_questions_are_paced_and_never_given_up(clock: Clock) -> None:
    platform = Platform(UnreachableError(what="run details"))
    state = state_of(platform)
    state.told("stop")
    asked_at = []
    for _ in range(2000):
        before = len(platform.asked)
        assert state.status == "start"
        if len(platform.asked) > before:
            asked_at.append(clock.now - 100.0)
        clock.now += 0.125
    assert asked_at == [0, 1, 3, 7, 15, 31, 61, 91, 121, 151, 181, 211, 241]
    platform.script = [RunDetails("stop", 1)]
    clock.now += 30
    assert state.status == "stop"


def test_a_flood_of_stops_is_no_flood_of_questions(clock: Clock) -> None:
    platform = Platform(RunDetails("start", 1))
    state = state_of(platform)
    for _ in range(1000):
        state.told("stop")
        assert state.status == "start"
    assert len(platform.asked) == 2
    clock.now += 1
    assert state.status == "start"
    assert len(platform.asked) == 3


def test_an_answer_does_not_undo_what_was_announced_after_the_question() -> None:
    platform = Platform()
    state = state_of(platform)

    def starts_meanwhile() -> RunDetails:
        state.told("start")
        return RunDetails("pause", 1)

    state.told("pause")
    platform.script = [starts_meanwhile]
    assert state.is_started()
    # The number may be that of the run before.
    platform.script = [RunDetails("start", 2)]
    assert state.number == 2


def test_a_stop_that_is_announced_during_a_question_is_asked_for_again(clock: Clock) -> None:
    platform = Platform()
    state = state_of(platform)

    def stops_meanwhile() -> RunDetails:
        state.told("stop")
        return RunDetails("start", 1)

    platform.script = [stops_meanwhile, RunDetails("stop", 1)]
    assert state.is_started()
    assert state.status == "start"
    clock.now += 1
    assert state.status == "stop"


def test_an_upload_after_an_announced_stop_asks_with_patience_and_obeys() -> None:
    platform = Platform(RunDetails("stop", 1))
    state = state_of(platform)
    state.told("stop")
    with pytest.raises(RunBlockedError) as caught:
        state.require_started(False, 1, lambda: None)
    assert caught.value.run_status == "stop"
    assert platform.asked == [True, True]


def test_a_status_that_is_only_shown_makes_no_request(client: Client, sandbox: Sandbox, told: Told) -> None:
    sandbox.notify(STOP)
    sandbox.wait_for(lambda: told.words == ["stop"])
    before = sandbox.hits("run")
    assert "run='start'" in repr(client)
    assert sandbox.hits("run") == before
