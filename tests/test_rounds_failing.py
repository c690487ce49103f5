"""Rounds in which something goes wrong: what is refused, what is kept, and what the policies make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ApiError,
    ArchiveError,
    BranchKeyError,
    ClientClosedError,
    RoundTimeoutError,
    UploadUncertainError,
)
from branchkey_integrations.gate import Gate
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.archives import header, npy, zipped
from tests.support.rounds import LOST, connect, engine_of, lost_answer, step, swallow
from tests.support.stores import RefusingStore, small_store


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with connect(sandbox) as made:
        yield made


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
    strict, lenient, store = engine_of(client), engine_of(client, on_error="keep_local"), small_store()
    with sandbox.intercept("upload", lost_answer):
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


def test_a_long_wait_says_once_what_it_waits_for(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("branchkey_integrations.waiting._QUIET_S", 0.0)
    with pytest.raises(RoundTimeoutError):
        client.wait_for_aggregation(1.2)
    said = [record.getMessage() for record in caplog.records if "still waiting" in record.getMessage()]
    assert said == ["still waiting for an aggregate (up to 1.2 s); other leaves may not have sent their updates yet"]


def test_a_round_without_an_answer_says_which_and_what_can_be_done(client: Client, sandbox: Sandbox) -> None:
    engine, store = engine_of(client, timeout_s=0.05), small_store()
    with sandbox.intercept("upload", swallow):
        for number in (1, 2):
            engine.submit(store, samples=1)
            with pytest.raises(RoundTimeoutError) as caught:
                engine.collect(store)
            assert str(caught.value) == (
                f"aggregate of round {number}: expected one within 0.05 s, found none. Other leaves may be missing; raise "
                "timeout_s, or train on with wait=False or on_error='keep_local'"
            )


def test_a_leaf_that_waits_without_rounds_is_told_of_the_option_that_it_has(client: Client) -> None:
    with pytest.raises(RoundTimeoutError) as caught:
        client.wait_for_aggregation(0.01)
    assert "aggregate: expected one within 0.01 s" in str(caught.value)
    assert caught.value.fix == "Other leaves may be missing; wait longer, with a higher timeout_s"


@pytest.mark.parametrize("beside", [False, True])
def test_weights_that_must_not_leave_are_named_as_the_model_names_them(
    client: Client, sandbox: Sandbox, beside: bool
) -> None:
    engine, store = engine_of(client, wait=not beside), small_store()
    store.arrays["bias"][1] = np.nan
    if beside:
        engine.submit(store, samples=1)
        engine._uploader._thread.join(20)
    half: Callable[[], Any] = (lambda: engine.collect(store)) if beside else lambda: engine.submit(store, samples=1)
    with pytest.raises(ArchiveError, match=r"layer_1 \(bias\): expected finite numbers") as caught:
        half()
    assert caught.value.what == "layer_1 (bias)"
    assert sandbox.hits("upload") == 0
