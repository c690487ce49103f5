"""Whole rounds against a real branch: what they do, what becomes of them when something fails, and how they go on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ApiError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    LayoutError,
    RoundTimeoutError,
    RunBlockedError,
    UploadUncertainError,
    WeightingError,
)
from branchkey_integrations.gate import Gate
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import RoundOutcome
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import header, npy, zipped
from tests.support.stores import NumpyStore, RefusingStore, small_store

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, backoff_max_s=0.02, budget_s=2.0)
LOST = Answer(502, b"<html>", "text/html")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with connect(sandbox) as made:
        yield made


def connect(sandbox: Sandbox, index: int = 0, **options: Any) -> Client:
    return Client(sandbox.credentials[index].to_dict(), sandbox.url, **{"retry": QUICK, "timeout_s": 5, **options})


def engine_of(client: Client, **options: Any) -> RoundEngine:
    return RoundEngine(client, RoundOptions.of(**{"timeout_s": 10.0, **options}))


def step(engine: RoundEngine, store: NumpyStore, samples: float = 10, **more: Any) -> RoundOutcome:
    sent = engine.submit(store, samples=samples, **more)
    return engine.collect(store) if sent.status == "pending" else sent


def swallow(call: Any) -> Answer:
    """Take the update, and never make an aggregate of it."""
    call.read()
    return Answer.json({"data": {"file_id": f"file-{call.number}"}}, 201)


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
    assert custom == {"round": 1, "layout": store.layout().fingerprint}


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
            for run in range(200):
                if run % 10 == 0:  # one that lies there already
                    old = sandbox.publish([np.full((2, 3), -1, "f4"), np.zeros(3, "f4")])
                    _wait(lambda: not client.queue.empty())
                began = time.monotonic()
                outcome = step(engine, store)
                slowest = max(slowest, time.monotonic() - began)
                assert outcome.status == "applied"
                assert outcome.aggregation_id == expected[-1] != old
                assert store.arrays["weight"][0, 0] == run
        assert slowest < 1.0


def _wait(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.002)


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
        _wait(lambda: client.run_status == sandbox.run_status)
        for policy in ("raise", "keep_local"):
            engine = engine_of(client, on_error=policy)
            outcome = engine.submit(small_store(), samples=1)
            assert outcome.status == word
            assert not engine.pending
    assert sandbox.hits("upload") == 0
    sandbox.start()
    _wait(lambda: client.run_status == "start")
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
    _wait(lambda: client.run_status == "stop")
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
    _wait(lambda: not client.queue.empty())
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
        assert time.monotonic() - began < 0.5
        assert engine.pending
        assert engine.submit(store, samples=1).round == 2
    for value in (4, 5):
        newest = sandbox.publish([np.full((2, 3), value, "f4"), np.full(3, value, "f4")])
    _wait(lambda: sandbox.connected != [] and not client.queue.empty())
    outcome = _until_applied(engine, store)
    # Either the first or the second may have come by then; the newest is what stays.
    if outcome.aggregation_id != newest:
        outcome = _until_applied(engine, store)
    assert outcome.aggregation_id == newest
    assert store.arrays["weight"][0, 0] == 5.0


def _until_applied(engine: RoundEngine, store: NumpyStore) -> RoundOutcome:
    deadline = time.monotonic() + 5
    while True:
        outcome = engine.collect(store)
        if outcome.status == "applied":
            return outcome
        assert time.monotonic() < deadline


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
    assert time.monotonic() - began < 0.5


# --- errors and policies ---------------------------------------------------------------------------------------------------


def test_a_refused_upload_raises_or_is_skipped_with_one_warning(
    sandbox: Sandbox, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    strict, lenient = engine_of(client), engine_of(client, on_error="keep_local")
    with sandbox.intercept("upload", Answer.error(413, "too large")):
        with pytest.raises(ApiError, match="too large"):
            strict.submit(small_store(), samples=1)
        caplog.clear()
        outcome = lenient.submit(small_store(), samples=1)
    assert outcome.status == "skipped"
    assert "too large" in outcome.reason
    assert [record.levelname for record in caplog.records if record.name.endswith("rounds")] == ["WARNING"]
    assert not strict.pending
    assert not lenient.pending
    assert lenient.collect(small_store()).status == "skipped"
    assert step(lenient, small_store()).status == "applied"


def test_an_upload_whose_answer_was_lost_is_waited_for_and_never_sent_again(sandbox: Sandbox, client: Client) -> None:
    def stored(call: Any) -> Answer:
        call.proceed()
        return LOST

    strict, lenient, store = engine_of(client), engine_of(client, on_error="keep_local"), small_store()
    with sandbox.intercept("upload", stored):
        with pytest.raises(UploadUncertainError):
            strict.submit(store, samples=1)
        # It did arrive, and so does its aggregate; taken here, so that the next round cannot mistake it for its own.
        client.queue.get(timeout=10)
        sent = lenient.submit(small_store(2.0), samples=1)
    assert not strict.pending
    assert (sent.status, sent.upload_id) == ("pending", None)
    assert "may have been received" in sent.reason
    outcome = lenient.collect(store)
    assert outcome.status == "applied"
    assert store.arrays["weight"][0, 0] == 2.0
    assert sandbox.hits("upload") == 2
    assert len(sandbox.uploads) == 2


def test_a_download_that_fails_can_be_collected_again(sandbox: Sandbox, client: Client) -> None:
    for policy in ("raise", "keep_local"):
        engine, store = engine_of(client, on_error=policy), small_store(5.0)
        engine.submit(store, samples=1)
        store.arrays["weight"][...] = 0
        with sandbox.intercept("object", LOST):
            if policy == "raise":
                with pytest.raises(BranchKeyError, match="download of"):
                    engine.collect(store)
            else:
                assert engine.collect(store).status == "skipped"
        assert engine.pending
        assert store.writes == 0
        assert engine.collect(store).status == "applied"
        assert store.arrays["weight"][0, 0] == 5.0


BAD_AGGREGATES: dict[str, Any] = {
    "not an archive": b"<html>Sign in</html>",
    "a truncated archive": zipped({"layer_0.npy": npy(header(shape="(2, 3)"), bytes(24))})[:-30],
    "too few layers": [np.ones((2, 3), "f4")],
    "too many layers": [np.ones((2, 3), "f4"), np.ones(3, "f4"), np.ones(3, "f4")],
    "no layer": zipped({}),
    "a transposed layer": [np.ones((3, 2), "f4"), np.ones(3, "f4")],
    "a layer to broadcast": [np.ones((2, 3), "f4"), np.ones(1, "f4")],
    "NaN": [np.ones((2, 3), "f4"), np.array([1, np.nan, 1], "f4")],
    "infinity": [np.ones((2, 3), "f4"), np.array([1, np.inf, 1], "f4")],
    "a number too large": [np.ones((2, 3), "f4"), np.full(3, 1e300, "f8")],
    "complex numbers": zipped({
        "layer_0.npy": npy(header(shape="(2, 3)"), bytes(24)),
        "layer_1.npy": npy(header("'<c8'", "(3,)"), bytes(24)),
    }),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_AGGREGATES.values(), ids=BAD_AGGREGATES)
def test_an_aggregate_that_does_not_fit_is_rejected_and_the_model_stays(
    sandbox: Sandbox, client: Client, bad: Any
) -> None:
    def publish(call: Any) -> Answer:
        publisher = sandbox.publish_raw if isinstance(bad, bytes) else sandbox.publish
        publisher(bad)
        return swallow(call)

    for policy in ("raise", "keep_local"):
        engine, store = engine_of(client, on_error=policy), small_store(7.0)
        before = store.image
        with sandbox.intercept("upload", publish):
            engine.submit(store, samples=1)
        if policy == "raise":
            with pytest.raises(AggregateRejectedError) as caught:
                engine.collect(store)
            assert caught.value.aggregation_id == sandbox.aggregates[-1]
            assert sandbox.aggregates[-1] in str(caught.value)
        else:
            assert engine.collect(store).status == "rejected"
        outcome = engine.last_outcome
        assert outcome is not None
        assert (outcome.status, outcome.aggregation_id) == ("rejected", sandbox.aggregates[-1])
        assert store.image == before
        assert store.writes == 0
        assert engine.last_applied is None
        assert not engine.pending
        assert step(engine, store).status == "applied"


def test_a_store_that_finds_fault_while_writing_is_a_rejection(client: Client) -> None:
    engine = engine_of(client, on_error="keep_local")
    store = RefusingStore(weight=np.ones(2, "f4"))
    assert step(engine, store).status == "rejected"


def test_a_norm_out_of_proportion_is_rejected_against_the_last_good_one(sandbox: Sandbox, client: Client) -> None:
    engine = engine_of(client, on_error="keep_local", gate=Gate(max_norm_ratio=3))
    store = small_store(1.0)
    statuses = []
    # 8 is eight times the weights at the start, but within three times of the last good one by then.
    for factor in (4.0, 0.2, 2.5, 8.0, 7.0):
        arrays = [np.full((2, 3), factor, "f4"), np.full(3, factor / 2, "f4")]
        with sandbox.intercept("upload", lambda call, arrays=arrays: (sandbox.publish(arrays), swallow(call))[1]):
            statuses.append(step(engine, store).status)
    assert statuses == ["rejected", "rejected", "applied", "rejected", "applied"]


def test_a_drop_of_the_metric_puts_the_former_weights_back_bit_for_bit(sandbox: Sandbox, client: Client) -> None:
    store = small_store(1.0)
    store.arrays["weight"][0] = [-0.0, np.float32(1e-42), 3.0]
    scores: list[float] = []

    def metric() -> float:
        return scores.pop(0)

    for policy in ("raise", "keep_local"):
        for after in (0.4, float("nan")):
            engine = engine_of(client, on_error=policy, gate=Gate(max_metric_drop=0.05, metric=metric))
            before = store.image
            scores[:] = [0.9, after]
            with sandbox.intercept("upload", lambda call: (_publish_zeros(sandbox), swallow(call))[1]):
                engine.submit(store, samples=1)
            if policy == "raise":
                with pytest.raises(AggregateRejectedError, match="your metric"):
                    engine.collect(store)
            else:
                assert engine.collect(store).status == "rejected"
            assert store.image == before
            assert engine.last_applied is None
    scores[:] = [0.9, 0.86]
    with sandbox.intercept("upload", lambda call: (_publish_zeros(sandbox), swallow(call))[1]):
        assert step(engine, store).status == "applied"
    assert not store.arrays["weight"].any()


def _publish_zeros(sandbox: Sandbox) -> None:
    sandbox.publish([np.zeros((2, 3), "f4"), np.zeros(3, "f4")])


def test_a_metric_that_raises_puts_the_former_weights_back(sandbox: Sandbox, client: Client) -> None:
    calls: list[int] = []

    def metric() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("my metric")
        return 1.0

    engine, store = engine_of(client, gate=Gate(max_metric_drop=0.1, metric=metric)), small_store(4.0)
    before = store.image
    with sandbox.intercept("upload", lambda call: (_publish_zeros(sandbox), swallow(call))[1]):
        engine.submit(store, samples=1)
    with pytest.raises(ZeroDivisionError, match="my metric"):
        engine.collect(store)
    assert store.image == before


def test_a_closed_client_raises_under_both_policies(sandbox: Sandbox) -> None:
    for policy in ("raise", "keep_local"):
        with connect(sandbox) as client:
            engine, store = engine_of(client, on_error=policy), small_store()
            with sandbox.intercept("upload", swallow):
                engine.submit(store, samples=1)
        with pytest.raises(ClientClosedError):
            engine.collect(store)
        with pytest.raises(ClientClosedError):
            engine.submit(store, samples=1)


# --- resuming ----------------------------------------------------------------------------------------------------------------


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
        assert _until_applied(engine, store).aggregation_id == newer
        assert store.writes == 2


def test_a_state_of_another_leaf_or_branch_is_refused_by_name(sandbox: Sandbox, client: Client) -> None:
    engine = engine_of(client)
    state = engine.state_dict()
    for key in ("leaf_id", "branch_id"):
        with pytest.raises(ConfigurationError, match=key) as caught:
            engine.load_state_dict({**state, key: "another"})
        assert "another" in str(caught.value)
        assert state[key] in str(caught.value)


def test_a_resumed_leaf_with_another_model_is_refused_before_anything_is_sent(sandbox: Sandbox, client: Client) -> None:
    engine = engine_of(client)
    step(engine, small_store())
    state = engine.state_dict()
    resumed = engine_of(client)
    resumed.load_state_dict(state)
    before = sandbox.hits("upload")
    with pytest.raises(LayoutError, match="rounds before"):
        resumed.submit(NumpyStore(weight=np.ones((2, 3), "f4")), samples=1)
    assert sandbox.hits("upload") == before


def test_a_blocked_run_is_no_error_of_the_round(sandbox: Sandbox, client: Client) -> None:
    engine, store = engine_of(client), small_store()
    step(engine, store)
    sandbox.pause()
    _wait(lambda: client.run_status == "pause")
    with pytest.raises(RunBlockedError):
        client.upload(store.read(), 1.0)
    engine.submit(store, samples=1)
    assert [outcome.status for outcome in engine.history] == ["pending", "applied", "skipped"]
