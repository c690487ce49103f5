"""Rounds without a link, and rounds beside training: what waits, what is sent, and what is never sent twice."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.background import Background
from branchkey_integrations.errors import ApiError, UnreachableError
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.offline import DOWN, Held, leaf, waiting
from tests.support.rounds import lost_answer, swallow, wait
from tests.support.stores import small_store

pytestmark = pytest.mark.usefixtures("late_updates_soon")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


def test_an_update_waits_on_the_disk_and_is_sent_and_answered_when_the_link_is_back(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    store = small_store(3.0)
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", DOWN) as met:
            outcome = engine.submit(store, samples=7, metrics={"loss": 0.5})
            assert outcome.status == "skipped"
            assert "it waits on the disk until the platform can be reached" in outcome.reason
            assert "503" in outcome.reason
            assert engine.pending
            # Training goes on: nothing is waited for.
            again = engine.collect(store)
            assert (again.status, again.waited_s) == ("skipped", 0.0)
            wait(lambda: met.count >= 3)
            assert sandbox.uploads == []
            assert waiting(tmp_path) == ["metrics.jsonl", "update.json", "update.npz"]
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        wait(lambda: engine.collect(store).status == "applied")
        assert engine.history[-1].upload_id == upload.file_id
        assert engine.history[-1].uploaded_bytes == upload.size_bytes
        assert (upload.weighting, upload.metadata["custom"]["round"]) == (7, 1)
        np.testing.assert_array_equal(upload.layers[0], store.arrays["weight"])
        assert [json.loads(each["data"]) for each in sandbox.metrics] == [{"loss": 0.5}]
        assert waiting(tmp_path) == []
        assert not engine.pending


def test_only_the_newest_update_is_sent_and_metrics_of_all_rounds(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", DOWN):
            for number in range(1, 4):
                engine.submit(small_store(float(number)), samples=number, metrics={"round": number})
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.metadata["custom"]["round"] == 3
        assert upload.layers[0][0, 0] == 3.0
        sandbox.wait_for(lambda: len(sandbox.metrics) == 3)
        assert [json.loads(each["data"])["round"] for each in sandbox.metrics] == [1, 2, 3]
        wait(lambda: engine.collect(small_store()).status == "applied")
        assert len(sandbox.uploads) == 1


def test_what_was_announced_before_an_update_could_be_sent_is_not_its_answer(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, timeout_s=0.05) as engine:
        with sandbox.intercept("upload", DOWN):
            engine.submit(small_store(2.0), samples=1)
            sandbox.publish(small_store(9.0).read())
            client: Any = engine.client
            wait(lambda: not client.queue.empty())
        with sandbox.intercept("upload", swallow):
            wait(lambda: waiting(tmp_path) == [])
            engine._uploader._thread.join(20)
        store = small_store()
        assert engine.collect(store).status == "timeout"
        assert store.writes == 0


def test_a_newer_update_takes_the_place_of_the_one_that_waits(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", DOWN):
            engine.submit(small_store(1.0), samples=1)
        sandbox.pause()
        wait(lambda: engine.client.run_status == "pause")
        sandbox.start()
        wait(lambda: engine.client.run_status == "start")
        engine.submit(small_store(2.0), samples=1)
        assert not engine._uploader._thread.busy
        assert engine.collect(small_store()).status == "applied"
        values = [upload.layers[0][0, 0] for upload in sandbox.uploads]
        assert values[-1] == 2.0
        assert len(values) == len(set(values))
        assert waiting(tmp_path) == []


def test_an_update_that_waited_when_the_process_ended_is_sent_by_the_next_one(sandbox: Sandbox, tmp_path: Path) -> None:
    store = small_store(4.0)
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(store, samples=1)
        state = json.loads(json.dumps(engine.state_dict()))
    assert waiting(tmp_path) == ["update.json", "update.npz"]
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(state)
        assert engine.pending
        sandbox.wait_for(lambda: sandbox.uploads)
        wait(lambda: engine.collect(store).status == "applied")
    assert [upload.metadata["custom"]["round"] for upload in sandbox.uploads] == [1]


def test_a_checkpoint_does_not_take_up_the_update_of_another_round(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN):
        with leaf(sandbox, tmp_path) as engine:
            engine.submit(small_store(1.0), samples=1)
            state = engine.state_dict()
            engine.submit(small_store(2.0), samples=1)
        with leaf(sandbox, tmp_path) as engine:
            engine.load_state_dict(state)
            assert not engine.pending
            assert not engine._uploader._thread.busy


def test_a_checkpoint_does_not_take_up_an_update_of_other_layers(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN):
        with leaf(sandbox, tmp_path) as engine:
            engine.submit(small_store(1.0), samples=1)
            state = engine.state_dict()
        with leaf(sandbox, tmp_path) as engine:
            engine.load_state_dict({**state, "layout": "of another model", "layers": None})
            assert not engine.pending
            assert not engine._uploader._thread.busy


def test_a_checkpoint_whose_update_is_gone_waits_for_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(small_store(), samples=1)
        state = engine.state_dict()
    assert waiting(tmp_path) == ["update.json", "update.npz"]
    for path in (tmp_path / "spool").rglob("update.*"):
        path.unlink()
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(state)
        assert not engine.pending


@pytest.mark.parametrize("options", [{"spool_bytes": 0}, {"spool_bytes": 20}, {"journal": False}])
def test_without_a_place_or_beyond_its_limit_the_round_is_skipped_as_ever(
    sandbox: Sandbox, tmp_path: Path, options: dict[str, Any]
) -> None:
    with leaf(sandbox, tmp_path, **options) as engine:
        with sandbox.intercept("upload", DOWN):
            outcome = engine.submit(small_store(), samples=1)
        assert outcome.status == "skipped"
        assert "waits" not in outcome.reason
        assert not engine.pending
        assert engine.submit(small_store(2.0), samples=1).status == "pending"
    assert len(sandbox.uploads) == 1


def test_what_the_platform_refuses_for_good_does_not_wait(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", Answer.json({"error": "not this"}, 422)):
            engine.submit(small_store(), samples=1)
        assert not engine.pending
        assert waiting(tmp_path) == []


def test_an_upload_whose_answer_was_lost_does_not_wait_to_be_sent_again(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", lost_answer):
            assert engine.submit(small_store(), samples=1).status == "pending"
        assert waiting(tmp_path) == []
        assert engine.collect(small_store()).status == "applied"
        assert sandbox.hits("upload") == 1


@pytest.mark.parametrize("beside", [False, True])
def test_an_update_that_may_have_been_received_is_not_sent_by_the_next_process(
    sandbox: Sandbox, tmp_path: Path, beside: bool
) -> None:
    store = small_store()
    with leaf(sandbox, tmp_path, wait=not beside) as engine, sandbox.intercept("upload", lost_answer):
        start = engine.state_dict()
        engine.submit(store, samples=1)
        engine._uploader._thread.join(20)
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(start)
        again = engine.submit(store, samples=1)
        assert (again.status, again.upload_id) == ("pending", None)
        assert "may have been received before the restart; not sent again" in again.reason
        assert engine.collect(store).aggregation_id == sandbox.aggregates[0]
    assert sandbox.hits("upload") == 1


def test_an_update_that_waited_and_may_have_been_received_is_not_sent_again_and_is_answered(
    sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", DOWN):
            engine.submit(small_store(), samples=1)
        with sandbox.intercept("upload", lost_answer) as met:
            wait(lambda: waiting(tmp_path) == [])
            engine._uploader._thread.join(20)
        assert met.count == 1
        outcome = engine.collect(small_store())
        assert "may have been received" in caplog.text
        assert (outcome.status, outcome.aggregation_id) == ("applied", sandbox.aggregates[0])
        assert len(sandbox.uploads) == 1


def test_under_raise_nothing_waits(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, on_error="raise") as engine, sandbox.intercept("upload", DOWN):
        with pytest.raises(ApiError, match="away"):
            engine.submit(small_store(), samples=1)
        assert waiting(tmp_path) == []


def test_a_platform_that_went_away_altogether_is_waited_for(tmp_path: Path) -> None:
    with Sandbox(leaves=1, directory=tmp_path / "branch") as first, leaf(first, tmp_path) as engine:
        port = int(first.url.rsplit(":", 1)[1])
        first.close()
        outcome = engine.submit(small_store(6.0), samples=1)
        assert outcome.status == "skipped"
        assert "waits on the disk" in outcome.reason
        with Sandbox(leaves=1, directory=tmp_path / "branch", port=port) as second:
            second.wait_for(lambda: second.uploads)
            wait(lambda: engine.collect(small_store()).status == "applied")
            assert second.uploads[0].layers[0][0, 0] == 6.0


def test_closing_ends_the_thread_and_leaves_the_update_for_the_next_process(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(small_store(), samples=1)
        names = {thread.name for thread in threading.enumerate()}
        assert "branchkey-upload" in names
        engine.close()
        assert "branchkey-upload" not in {thread.name for thread in threading.enumerate()}
    assert waiting(tmp_path) == ["update.json", "update.npz"]


# --- beside training -----------------------------------------------------------------------------------------------------


def test_without_waiting_an_update_is_sent_beside_training_as_it_was(sandbox: Sandbox, tmp_path: Path) -> None:
    held, store = Held(), small_store(2.0)
    with leaf(sandbox, tmp_path, wait=False) as engine, sandbox.intercept("upload", held):
        assert engine.submit(store, samples=1, metrics={"loss": 1.0}).status == "pending"
        store.arrays["weight"] += 100  # training goes on
        assert engine.collect(store).status == "pending"
        late = engine.submit(store, samples=1)
        assert late.status == "skipped"
        assert "still being sent" in late.reason
        held.go.set()
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        wait(lambda: engine.collect(store).status == "applied")
    assert upload.layers[0][0, 0] == 2.0
    assert store.arrays["weight"][0, 0] == 2.0
    assert len(sandbox.metrics) == 1


def test_closing_lets_an_update_that_is_being_sent_arrive(sandbox: Sandbox, tmp_path: Path) -> None:
    held = Held()
    with sandbox.intercept("upload", held), leaf(sandbox, tmp_path, wait=False) as engine:
        engine.submit(small_store(2.0), samples=1)
        threading.Timer(0.2, held.go.set).start()
        engine.close()
        assert len(sandbox.uploads) == 1


@pytest.mark.parametrize("on_error", ["raise", "keep_local"])
def test_what_goes_wrong_beside_training_follows_the_policy(sandbox: Sandbox, tmp_path: Path, on_error: str) -> None:
    refused = Answer.json({"error": "not this"}, 422)
    with leaf(sandbox, tmp_path, wait=False, on_error=on_error) as engine, sandbox.intercept("upload", refused):
        engine.submit(small_store(), samples=1)
        engine._uploader._thread.join()
        if on_error == "raise":
            with pytest.raises(ApiError, match="not this"):
                engine.collect(small_store())
        else:
            assert "not this" in engine.collect(small_store()).reason
        assert not engine.pending


def test_beside_training_an_update_waits_for_the_link_too(sandbox: Sandbox, tmp_path: Path) -> None:
    store = small_store(5.0)
    with leaf(sandbox, tmp_path, wait=False) as engine:
        with sandbox.intercept("upload", DOWN) as met:
            engine.submit(store, samples=1, metrics={"loss": 0.5})
            wait(lambda: met.count >= 2)
            assert engine.collect(store).status == "pending"
        sandbox.wait_for(lambda: sandbox.uploads)
        wait(lambda: engine.collect(store).status == "applied")
        wait(lambda: waiting(tmp_path) == [])
        assert len(sandbox.metrics) == 1


def test_background_work_hands_over_results_and_errors_once() -> None:
    background: Background[int] = Background("test")
    assert background.take() is None
    background.start(lambda stop: 3)
    background.join()
    assert (background.take(), background.take()) == (3, None)

    def fails(stop: threading.Event) -> int:
        raise UnreachableError(what="x")

    background.start(fails)
    background.join()
    with pytest.raises(UnreachableError):
        background.take()
    assert background.take() is None
    background.start(lambda stop: int(stop.wait(20)))
    assert background.busy
    background.stop()
    assert not background.busy
    assert background.take() == 1


def test_background_work_gives_way_to_training() -> None:
    background: Background[int] = Background("test")
    background.start(lambda stop: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    background.join()
    assert background.take() == min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + 10)


def test_a_spooled_archive_is_readable_by_numpy_and_private(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(small_store(3.0), samples=2)
    (path,) = (tmp_path / "spool").rglob("update.npz")
    with np.load(io.BytesIO(path.read_bytes())) as archive:
        np.testing.assert_array_equal(archive["layer_0"], np.full((2, 3), 3.0, "f4"))
        assert archive["weighting"] == [2.0]
    assert path.parent.stat().st_mode & 0o077 == 0
    about = json.loads((path.parent / "update.json").read_text())
    assert sandbox.credentials[0].to_dict()["session_token"] not in json.dumps(about)
