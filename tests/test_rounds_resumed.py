"""Rounds that go on in another process, from a state that a checkpoint held."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.errors import (
    ConfigurationError,
    LayoutError,
    RunBlockedError,
)
from branchkey_integrations.sandbox import Sandbox
from tests.support.rounds import connect, engine_of, step, swallow, until_applied, wait
from tests.support.stores import NumpyStore, small_store


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with connect(sandbox) as made:
        yield made


def test_the_state_is_of_plain_types_and_holds_no_secret(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store()
    step(engine, store)
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
    state = engine.state_dict()
    text = json.dumps(state)
    assert json.loads(text) == state
    assert sandbox.credentials[0].session_token not in text
    assert state["round"] == 2
    assert state["last_applied"] == sandbox.aggregates[0]
    assert state["pending"]["round"] == 2
    assert type(state["norm"]) is float


def test_a_resumed_leaf_loads_the_aggregate_it_was_waiting_for_and_sends_nothing(sandbox: Sandbox) -> None:
    store = small_store(6.0)
    with connect(sandbox) as client:
        engine = engine_of(client)
        engine.submit(store, samples=1)
        state = json.loads(json.dumps(engine.state_dict()))
        sandbox.wait_for(lambda: sandbox.aggregates)
    store.arrays["weight"][...] = 0
    with connect(sandbox) as client:
        engine = engine_of(client)
        engine.load_state_dict(state)
        assert engine.pending
        outcome = engine.collect(store)
        assert (outcome.status, outcome.round) == ("applied", 1)
        assert outcome.upload_id == sandbox.uploads[0].file_id
        assert sandbox.hits("upload") == 1
        assert store.arrays["weight"][0, 0] == 6.0
        assert step(engine, store).round == 2


def test_an_update_has_a_name_of_its_own_that_a_resumed_leaf_gives_it_again(sandbox: Sandbox) -> None:
    with connect(sandbox) as client:
        engine = engine_of(client)
        state = json.loads(json.dumps(engine.state_dict()))
        step(engine, small_store(1.0))
        step(engine, small_store(2.0))
    with connect(sandbox) as client:
        engine = engine_of(client)
        engine.load_state_dict(state)
        step(engine, small_store(3.0))
        step(engine_of(client), small_store(4.0))
    names = [upload.metadata["custom"]["update_id"] for upload in sandbox.uploads]
    assert names[0] == names[2]
    assert len({*names}) == 3


def test_a_resumed_leaf_does_not_apply_the_last_aggregate_again(sandbox: Sandbox) -> None:
    store = small_store()
    with connect(sandbox) as client:
        engine = engine_of(client)
        applied = step(engine, store).aggregation_id
        state = engine.state_dict()
    assert applied is not None
    with connect(sandbox) as client:
        engine = engine_of(client, wait=False)
        engine.load_state_dict(state)
        told = json.dumps({"message_type": "aggregation_status", "body": {"aggregation_id": applied}})
        sandbox.notify(told)
        newer = sandbox.publish([np.full((2, 3), 8, "f4"), np.full(3, 8, "f4")])  # behind it in the same channel
        assert until_applied(engine, store).aggregation_id == newer
        assert store.writes == 2


def test_a_state_of_another_leaf_or_branch_is_refused_by_name(sandbox: Sandbox, client: Client) -> None:
    engine = engine_of(client)
    state = engine.state_dict()
    for key in ("leaf_id", "branch_id"):
        with pytest.raises(ConfigurationError, match=key) as caught:
            engine.load_state_dict({**state, key: "another"})
        assert "another" in str(caught.value)
        assert state[key] in str(caught.value)


@pytest.mark.parametrize(
    ("most", "found"),
    [(5_000, r"layer_1 was bias float32\[3\], is bias float32\[4\]"), (1, "another list of 2 layers")],
)
def test_a_resumed_leaf_with_another_model_is_refused_with_the_difference_before_anything_is_sent(
    sandbox: Sandbox, client: Client, monkeypatch: pytest.MonkeyPatch, most: int, found: str
) -> None:
    # A model of very many layers keeps its fingerprint alone in a checkpoint.
    monkeypatch.setattr("branchkey_integrations.parameters._MOST_IN_STATE", most)
    engine = engine_of(client)
    step(engine, small_store())
    state = json.loads(json.dumps(engine.state_dict()))
    resumed = engine_of(client)
    resumed.load_state_dict(state)
    before = sandbox.hits("upload")
    with pytest.raises(LayoutError, match=found):
        resumed.submit(NumpyStore(weight=np.ones((2, 3), "f4"), bias=np.ones(4, "f4")), samples=1)
    assert sandbox.hits("upload") == before


def test_a_blocked_run_is_no_error_of_the_round(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store()
    step(engine, store)
    sandbox.pause()
    wait(lambda: client.run_status == "pause")
    with pytest.raises(RunBlockedError):
        client.upload(store.read(), 1.0)
    engine.submit(store, samples=1)
    assert [outcome.status for outcome in engine.history] == ["pending", "applied", "skipped"]
