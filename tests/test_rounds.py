"""Whole rounds against a real branch: what they do, and what becomes of them when nothing comes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.errors import (
    BranchKeyError,
    ConfigurationError,
    LayoutError,
    RoundTimeoutError,
    WeightingError,
)
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import RoundOutcome
from branchkey_integrations.sandbox import Answer, Sandbox
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


# --- the good round ------------------------------------------------------------------------------------------------------


def test_a_round_applies_the_aggregate_and_says_what_it_moved(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store(3.0)
    before = store.image
    sent = engine.submit(store, samples=7)
    (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
    assert (sent.status, sent.round, sent.upload_id) == ("pending", 1, upload.file_id)
    assert sent.uploaded_bytes == upload.size_bytes
    assert engine.pending
    outcome = engine.collect(store)
    assert (outcome.status, outcome.round, outcome.upload_id) == ("applied", 1, upload.file_id)
    assert [outcome.aggregation_id] == sandbox.aggregates
    assert outcome.downloaded_bytes > 0
    assert 0 <= outcome.waited_s < 10
    assert outcome.reason == ""
    assert not engine.pending
    assert engine.last_applied == outcome.aggregation_id
    assert engine.history == [sent, outcome]
    assert engine.last_outcome is outcome
    assert store.image == before  # one leaf: the mean of one
    assert store.writes == 1
    assert upload.weighting == 7.0
    custom = upload.metadata["custom"]
    name = f"{engine.state_dict()['lineage']}-1"
    assert custom == {"round": 1, "layout": store.layout().fingerprint, "update_id": name}


def test_three_leaves_hold_the_same_weighted_mean_bit_for_bit_after_each_of_three_rounds() -> None:
    with Sandbox(leaves=3) as sandbox:
        random = np.random.default_rng(5)
        stores = [
            NumpyStore(a=random.normal(size=(17, 5)).astype("f4"), b=random.normal(size=9).astype("f4"))
            for _ in range(3)
        ]
        samples = [1.0, 10.0, 1e3]
        clients = [connect(sandbox, index) for index in range(3)]
        try:
            engines = [engine_of(client, timeout_s=30.0) for client in clients]
            for number in range(1, 4):
                for store in stores:
                    for array in store.arrays.values():
                        array += random.normal(size=array.shape).astype("f4")
                total = sum(samples)
                wanted = [
                    (
                        sum(w * arrays[i].astype("f8") for w, arrays in zip(samples, map(NumpyStore.read, stores)))
                        / total
                    )
                    for i in range(2)
                ]
                outcomes: dict[int, RoundOutcome] = {}

                def run(index: int, outcomes: dict[int, RoundOutcome] = outcomes) -> None:
                    outcomes[index] = step(engines[index], stores[index], samples[index])

                threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(3)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(40)
                assert [outcomes[index].status for index in range(3)] == ["applied"] * 3
                assert {outcome.round for outcome in outcomes.values()} == {number}
                assert len({store.image for store in stores}) == 1
                for got, exact in zip(stores[0].arrays.values(), wanted):
                    np.testing.assert_array_max_ulp(got, exact.astype("f4"), maxulp=1)
                    assert (got == exact.astype("f4")).mean() > 0.99
        finally:
            for client in clients:
                client.close()
        assert len(sandbox.aggregates) == 3


def test_the_answer_that_comes_before_the_wait_is_never_missed_and_an_old_one_never_taken() -> None:
    with Sandbox(leaves=1) as sandbox, connect(sandbox) as client:
        store = small_store()
        engine = engine_of(client, timeout_s=5.0, report_metrics=False)
        expected = []

        def publish_then_answer(call: Any) -> Answer:
            call.read()
            expected.append(sandbox.publish([np.full((2, 3), len(expected), "f4"), np.zeros(3, "f4")]))
            return Answer.json({"data": {"file_id": "f"}}, 201)

        slowest = 0.0
        with sandbox.intercept("upload", publish_then_answer):
            for run in range(60):
                if run % 10 == 0:  # one that lies there already
                    old = sandbox.publish([np.full((2, 3), -1, "f4"), np.zeros(3, "f4")])
                    wait(lambda: not client.queue.empty())
                began = time.monotonic()
                outcome = step(engine, store)
                slowest = max(slowest, time.monotonic() - began)
                assert outcome.status == "applied"
                assert outcome.aggregation_id == expected[-1] != old
                assert store.arrays["weight"][0, 0] == run
        assert slowest < 5.0


# --- weighting and metrics -------------------------------------------------------------------------------------------------


def test_the_weighting_comes_from_samples_a_number_or_the_users_function(sandbox: Sandbox, client: Client) -> None:
    ways: list[tuple[Any, float]] = [("samples", 12.0), (2.5, 2.5), (lambda metrics: metrics["loss"] * 2, 0.5)]
    for weighting, _ in ways:
        engine = engine_of(client, weighting=weighting)
        assert step(engine, small_store(), 12, metrics={"loss": 0.25}).status == "applied"
    assert [upload.weighting for upload in sandbox.uploads] == [wanted for _, wanted in ways]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_weighting_that_makes_no_sense_never_leaves(sandbox: Sandbox, client: Client, bad: float) -> None:
    for options in ({"weighting": lambda _: bad}, {"weighting": "samples"}):
        with pytest.raises(WeightingError):
            engine_of(client, **options).submit(small_store(), samples=bad)
        lenient = engine_of(client, on_error="keep_local", **options)
        outcome = lenient.submit(small_store(), samples=bad)
        assert outcome.status == "skipped"
        assert "finite number above zero" in outcome.reason
        assert not lenient.pending
    assert sandbox.hits("upload") == 0


def test_samples_that_nobody_counted_are_asked_for_under_both_policies(sandbox: Sandbox, client: Client) -> None:
    for policy in ("raise", "keep_local"):
        with pytest.raises(ConfigurationError, match="samples"):
            engine_of(client, on_error=policy).submit(small_store())
    assert sandbox.hits("upload") == 0


def test_metrics_are_about_the_aggregate_that_was_trained_on(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store()
    first = step(engine, store, metrics={"loss": np.float32(0.5), "nan": float("nan"), "name": "x"})
    step(engine, store, metrics={"loss": 0.25})
    told = [(each["mode"], each["aggregation_id"], json.loads(each["data"])) for each in sandbox.metrics]
    assert told == [
        ("non-federated", "", {"loss": 0.5}),
        ("train", first.aggregation_id, {"loss": 0.25}),
    ]


def test_metrics_stay_here_when_nobody_wants_them_reported(sandbox: Sandbox, client: Client) -> None:
    assert step(engine_of(client, report_metrics=False), small_store(), metrics={"loss": 1.0}).status == "applied"
    assert step(engine_of(client), small_store(2.0)).status == "applied"
    assert sandbox.hits("metrics") == 0


def test_a_platform_that_refuses_metrics_costs_no_round(
    sandbox: Sandbox, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with sandbox.intercept("metrics", Answer.error(404, "no such route")):
        outcome = step(engine_of(client), small_store(), metrics={"loss": 1.0})
    assert outcome.status == "applied"
    assert [record.levelname for record in caplog.records if "metrics were not taken" in record.message] == ["WARNING"]


# --- what is refused before it leaves ------------------------------------------------------------------------------------


def test_a_changed_layout_is_refused_before_anything_is_sent(sandbox: Sandbox, client: Client) -> None:
    changes: list[NumpyStore] = [
        NumpyStore(weight=np.ones((2, 3), "f4")),
        NumpyStore(weight=np.ones((3, 2), "f4"), bias=np.ones(3, "f4")),
        NumpyStore(weight=np.ones((2, 3), "f8"), bias=np.ones(3, "f4")),
        NumpyStore(kernel=np.ones((2, 3), "f4"), bias=np.ones(3, "f4")),
        NumpyStore(bias=np.ones(3, "f4"), weight=np.ones((2, 3), "f4")),
    ]
    strict, lenient = engine_of(client), engine_of(client, on_error="keep_local")
    step(strict, small_store())
    step(lenient, small_store(2.0))
    before = sandbox.hits("upload")
    for changed in changes:
        with pytest.raises(LayoutError, match="layout of the model"):
            strict.submit(changed, samples=1)
        outcome = lenient.submit(changed, samples=1)
        assert outcome.status == "skipped"
        assert "layout of the model" in outcome.reason
        assert not lenient.pending
    assert sandbox.hits("upload") == before
    assert step(strict, small_store(3.0)).status == "applied"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_diverged_never_leave(sandbox: Sandbox, client: Client, bad: float) -> None:
    store = small_store()
    store.arrays["bias"][1] = bad
    with pytest.raises(BranchKeyError, match="layer_1"):
        engine_of(client).submit(store, samples=1)
    assert engine_of(client, on_error="keep_local").submit(store, samples=1).status == "skipped"
    assert sandbox.hits("upload") == 0


# --- a run that does not take updates ---------------------------------------------------------------------------------------


def test_a_paused_run_skips_and_a_stopped_one_says_so(sandbox: Sandbox, client: Client) -> None:
    for control, word in ((sandbox.pause, "skipped"), (sandbox.stop, "stopped")):
        control()
        wait(lambda: client.run_status == sandbox.run_status)
        for policy in ("raise", "keep_local"):
            engine = engine_of(client, on_error=policy)
            outcome = engine.submit(small_store(), samples=1)
            assert outcome.status == word
            assert not engine.pending
    assert sandbox.hits("upload") == 0
    sandbox.start()
    wait(lambda: client.run_status == "start")
    assert step(engine_of(client), small_store()).status == "applied"


def test_a_run_that_stops_during_the_wait_ends_it(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client, timeout_s=None), small_store()
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
    sandbox.stop()
    began = time.monotonic()
    outcome = engine.collect(store)
    assert (outcome.status, outcome.round) == ("stopped", 1)
    assert time.monotonic() - began < 3
    assert not engine.pending


def test_an_aggregate_announced_just_before_the_stop_is_still_applied(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store()
    engine.submit(store, samples=1)
    sandbox.wait_for(lambda: sandbox.aggregates)
    sandbox.stop()
    wait(lambda: client.run_status == "stop")
    assert engine.collect(store).status == "applied"


# --- nothing comes --------------------------------------------------------------------------------------------------------


def test_a_round_without_an_answer_raises_or_keeps_the_local_weights(sandbox: Sandbox, client: Client) -> None:
    for policy in ("raise", "keep_local"):
        engine, store = engine_of(client, on_error=policy, timeout_s=0.2), small_store()
        before = store.image
        with sandbox.intercept("upload", swallow):
            engine.submit(store, samples=1)
            if policy == "raise":
                with pytest.raises(RoundTimeoutError, match=r"within 0\.2 s"):
                    engine.collect(store)
            else:
                assert engine.collect(store).status == "timeout"
        outcome = engine.last_outcome
        assert outcome is not None
        assert (outcome.status, outcome.round, outcome.upload_id) == ("timeout", 1, "file-1")
        assert 0.2 <= outcome.waited_s < 2
        assert "local weights are kept" in outcome.reason
        assert store.image == before
        assert store.writes == 0
        assert not engine.pending


def test_the_late_answer_to_a_round_that_timed_out_is_not_taken_for_the_next_one(
    sandbox: Sandbox, client: Client
) -> None:
    engine, store = engine_of(client, on_error="keep_local", timeout_s=0.1), small_store()
    with sandbox.intercept("upload", swallow):
        assert step(engine, store).status == "timeout"
    late = sandbox.publish([np.full((2, 3), 9, "f4"), np.full(3, 9, "f4")])
    wait(lambda: not client.queue.empty())
    engine.options = RoundOptions(timeout_s=5.0)
    outcome = step(engine, store)
    assert outcome.status == "applied"
    assert outcome.aggregation_id == sandbox.aggregates[-1] != late
    assert store.arrays["weight"][0, 0] == 1.0


def test_without_waiting_the_newest_aggregate_is_taken_when_it_has_come(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client, wait=False), small_store()
    assert engine.collect(store).status == "skipped"
    with sandbox.intercept("upload", swallow):
        assert engine.submit(store, samples=1).status == "pending"
        began = time.monotonic()
        assert engine.collect(store).status == "pending"
        assert time.monotonic() - began < 5
        assert engine.pending
        wait(lambda: engine.collect(store).upload_id == "file-1")
        assert engine.submit(store, samples=1).round == 2
        wait(lambda: engine.collect(store).upload_id == "file-2")
    for value in (4, 5):
        newest = sandbox.publish([np.full((2, 3), value, "f4"), np.full(3, value, "f4")])
    wait(lambda: sandbox.connected != [] and not client.queue.empty())
    outcome = until_applied(engine, store)
    # Either the first or the second may have come by then; the newest is what stays.
    if outcome.aggregation_id != newest:
        outcome = until_applied(engine, store)
    assert outcome.aggregation_id == newest
    assert store.arrays["weight"][0, 0] == 5.0


def test_a_repeated_announcement_is_not_applied_twice(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client, timeout_s=0.3, on_error="keep_local"), small_store()
    applied = step(engine, store).aggregation_id
    assert applied is not None
    told = json.dumps({"message_type": "aggregation_status", "body": {"aggregation_id": applied}})
    with sandbox.intercept("upload", swallow):
        engine.submit(store, samples=1)
        for _ in range(3):
            sandbox.notify(told)
        assert engine.collect(store).status == "timeout"
    assert store.writes == 1


def test_collecting_without_having_sent_does_nothing(client: Client) -> None:
    engine, store = engine_of(client), small_store()
    began = time.monotonic()
    assert engine.collect(store).status == "skipped"
    assert time.monotonic() - began < 5
