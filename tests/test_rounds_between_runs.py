"""A round belongs to the run that it was sent in, and to the training that sent it; nothing waits for what cannot come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import uploading
from branchkey_integrations.errors import ClientClosedError, JournalError, RoundTimeoutError
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox
from tests.support.rounds import connect, engine_of, lost_answer, step, wait
from tests.support.stores import small_store

OLD = [np.full((2, 3), 9, "f4"), np.full(3, 9, "f4")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    # The other leaf never sends: aggregates come where a test publishes them.
    with Sandbox(leaves=2) as opened:
        yield opened


def state_of(engine: RoundEngine) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(engine.state_dict()))
    return state


def new_run(sandbox: Sandbox) -> None:
    sandbox.stop()
    sandbox.start()


@pytest.mark.parametrize("noted", [True, False])
def test_a_checkpoint_of_a_run_that_is_over_is_not_waited_for(sandbox: Sandbox, tmp_path: Path, noted: bool) -> None:
    journal = tmp_path if noted else False
    with connect(sandbox) as client:
        engine = engine_of(client, journal=journal)
        engine.submit(small_store(), samples=1)
        state = state_of(engine)
        assert state["pending"]["run"] == client.run_number
        engine.close()
    new_run(sandbox)
    with connect(sandbox) as client:
        engine = engine_of(client, journal=journal)
        engine.load_state_dict(state)
        assert (engine.pending, engine.round) == (False, 1)
        sent = engine.submit(small_store(2.0), samples=1)
        assert (sent.status, sent.round) == ("pending", 2)
        engine.close()
    assert [upload.layers[0][0, 0] for upload in sandbox.uploads] == [1.0, 2.0]


def test_the_same_run_is_waited_for_after_a_restart(sandbox: Sandbox) -> None:
    with connect(sandbox) as client:
        engine = engine_of(client)
        engine.submit(small_store(), samples=1)
        state = state_of(engine)
    with connect(sandbox) as client:
        engine = engine_of(client)
        engine.load_state_dict(state)
        assert engine.pending
        identifier = sandbox.publish(OLD)
        assert engine.collect(small_store()).aggregation_id == identifier


def test_a_wait_ends_when_another_run_begins(sandbox: Sandbox) -> None:
    with connect(sandbox, run_check_interval_s=0.05) as client:
        engine = engine_of(client, timeout_s=60)
        engine.submit(small_store(), samples=1)
        # What is said of the end and of the beginning gets lost, as during a reconnect.
        told: Any = client._run
        told.told = lambda status: None
        new_run(sandbox)
        outcome = engine.collect(small_store())
    assert (outcome.status, outcome.reason) == ("skipped", "the run that it was sent in is over")
    assert not engine.pending


def _interrupted_at(client: Any, monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    def upload(file: Any, info: Any, name: str, metadata: Any, note: Any = None) -> str:
        for each in steps:
            note(each)
        raise KeyboardInterrupt

    monkeypatch.setattr(client._api, "upload", upload)


@pytest.mark.parametrize(
    ("steps", "pending"),
    [((), False), (("sending",), False), (("sending", "posted"), True), (("sending", "posted", "sending"), False)],
)
def test_an_interrupt_leaves_a_round_open_only_where_the_platform_may_have_all_of_it(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[str, ...], pending: bool
) -> None:
    with connect(sandbox) as client:
        engine = engine_of(client, journal=tmp_path, timeout_s=0.2)
        engine.submit(small_store(), samples=1)
        sandbox.publish(OLD)
        assert engine.collect(small_store()).status == "applied"
        with monkeypatch.context() as patched:
            _interrupted_at(client, patched, *steps)
            with pytest.raises(KeyboardInterrupt):
                engine.submit(small_store(), samples=1)
        state = state_of(engine)
        assert (engine.pending, state["pending"] is not None) == (pending, pending)
        engine.close()
    with connect(sandbox) as client:
        engine = engine_of(client, journal=tmp_path, timeout_s=0.2)
        engine.load_state_dict(state)
        assert engine.pending is pending
        if pending:
            with pytest.raises(RoundTimeoutError):
                engine.collect(small_store())
        assert engine.submit(small_store(3.0), samples=1).status == "pending"
        engine.close()


@pytest.mark.parametrize("noted", [True, False])
def test_what_a_closed_training_has_waiting_for_the_run_does_not_go_out_with_the_next(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noted: bool
) -> None:
    monkeypatch.setattr(uploading, "_CLOSING_S", 1000.0)  # it is not sent, so nothing is waited for
    monkeypatch.setattr(uploading, "_FAREWELL_S", 0.05)
    with connect(sandbox, wait_for_run=True, run_check_interval_s=0.1) as client:
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        first, second = (engine_of(client, wait=False, journal=tmp_path if noted else False) for _ in range(2))
        first.submit(small_store(2.0), samples=1)
        first.close()
        assert first._uploader._thread.busy
        second.submit(small_store(3.0), samples=1)
        sandbox.start()
        second._uploader._thread.join(20)
        first._uploader._thread.join(20)
        with pytest.raises(ClientClosedError, match=r"update of round 1\. Its training was closed"):
            first._uploader.take()
        assert [upload.layers[0][0, 0] for upload in sandbox.uploads] == [3.0]
        second.close()


def test_nothing_is_sent_that_a_closed_journal_does_not_learn_of(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "_CLOSING_S", 0.05)
    with connect(sandbox) as client:
        engine = engine_of(client, wait=False, journal=tmp_path)
        begun, go, upload = threading.Event(), threading.Event(), client._api.upload

        def slow(*args: Any) -> str:
            begun.set()
            assert go.wait(20)
            return upload(*args)

        monkeypatch.setattr(client._api, "upload", slow)
        engine.submit(small_store(), samples=1)
        assert begun.wait(20)
        engine.close()
        go.set()
        engine._uploader._thread.join(20)
        with pytest.raises(JournalError, match="closed meanwhile"):
            engine._uploader.take()
        assert sandbox.uploads == []


def test_an_aggregate_that_came_before_the_update_could_leave_is_no_answer_to_it(sandbox: Sandbox) -> None:
    store = small_store()
    with connect(sandbox, wait_for_run=True, run_check_interval_s=0.1) as client:
        engine = engine_of(client)
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        sender = threading.Thread(target=lambda: engine.submit(store, samples=1))
        sender.start()
        wait(lambda: sandbox.hits("run") >= 2)
        sandbox.publish(OLD)
        wait(lambda: not client.queue.empty())
        sandbox.start()
        sender.join(20)
        right = sandbox.publish([array * 5 for array in store.read()])
        outcome = engine.collect(store)
        assert (outcome.status, outcome.aggregation_id, store.arrays["weight"][0, 0]) == ("applied", right, 5.0)


def test_an_aggregate_that_is_sent_again_after_a_restart_is_still_unread(sandbox: Sandbox, tmp_path: Path) -> None:
    store = small_store()
    with connect(sandbox) as client:
        engine = engine_of(client, journal=tmp_path, wait=False)
        engine.submit(store, samples=1)
        engine._uploader._thread.join()
        sandbox.publish(store.read())
        wait(lambda: engine.collect(store).status == "applied")
        state = state_of(engine)
        identifier = sandbox.publish(OLD)
        wait(lambda: not client.queue.empty())
        engine.close()
    with connect(sandbox) as client:
        engine = engine_of(client, journal=tmp_path, wait=False)
        client.queue.put(identifier)
        engine.load_state_dict(state)
        outcome = engine.collect(store)
        assert (outcome.status, outcome.aggregation_id) == ("applied", identifier)
        engine.close()


def test_going_back_to_a_checkpoint_gives_up_what_is_being_sent(sandbox: Sandbox) -> None:
    store = small_store()
    with connect(sandbox, wait_for_run=True, run_check_interval_s=0.1) as client:
        engine = engine_of(client, wait=False)
        state = state_of(engine)
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        engine.submit(small_store(2.0), samples=1)
        engine.load_state_dict(state)
        sandbox.start()
        wait(lambda: client.run_status == "start")
        assert (engine.round, engine.pending, engine.collect(store).status) == (0, False, "skipped")
        assert step(engine, small_store(3.0)).round == 1
        engine._uploader._thread.join(20)
        assert [upload.layers[0][0, 0] for upload in sandbox.uploads] == [3.0]
        engine.close()


def test_a_journal_stays_where_it_is_when_the_script_changes_its_folder(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with connect(sandbox) as client:
        engine = engine_of(client, journal="notes")
        engine.submit(small_store(), samples=1)
        monkeypatch.chdir(tmp_path / "elsewhere")
        new_run(sandbox)
        wait(lambda: client.run_number == 2)
        assert engine.submit(small_store(), samples=1).status == "pending"
        engine.close()
    assert [path.suffix for path in (tmp_path / "notes").iterdir()] == [".jsonl"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_update_whose_answer_is_lost_counts_in_the_run_that_it_left_into(sandbox: Sandbox) -> None:
    store = small_store()
    with connect(sandbox, wait_for_run=True, run_check_interval_s=0.1) as client:
        engine = engine_of(client, on_error="keep_local")
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        with sandbox.intercept("upload", lost_answer):
            sender = threading.Thread(target=lambda: engine.submit(store, samples=1))
            sender.start()
            wait(lambda: sandbox.hits("run") >= 2)
            sandbox.publish(OLD)
            wait(lambda: not client.queue.empty())
            new_run(sandbox)
            sender.join(20)
        assert (engine.history[-1].status, state_of(engine)["pending"]["run"]) == ("pending", 2)
        right = sandbox.publish([array * 5 for array in store.read()])
        outcome = engine.collect(store)
        assert (outcome.status, outcome.aggregation_id, store.arrays["weight"][0, 0]) == ("applied", right, 5.0)
