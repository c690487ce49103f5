"""Updates and the branch's runs: what was made in one run is not counted in the next one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations.journal import Journal
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox
from tests.support.offline import DOWN, leaf, waiting
from tests.support.rounds import step, wait
from tests.support.stores import small_store

pytestmark = pytest.mark.usefixtures("late_updates_soon")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


def new_run(sandbox: Sandbox) -> None:
    sandbox.stop()
    sandbox.start()


def deaf(engine: RoundEngine) -> None:
    """Let nothing be heard of the run, as when its news come while there is no link."""
    client: Any = engine.client
    client._run.told = lambda status: None


@pytest.mark.parametrize("heard", [True, False])
def test_an_update_that_waited_through_the_end_of_its_run_is_dropped_and_that_is_said(
    sandbox: Sandbox, tmp_path: Path, heard: bool
) -> None:
    with leaf(sandbox, tmp_path) as engine:
        if not heard:
            deaf(engine)
        with sandbox.intercept("upload", DOWN) as met:
            engine.submit(small_store(2.0), samples=1)
            wait(lambda: met.count >= 2)
            new_run(sandbox)
        wait(lambda: waiting(tmp_path) == [])
        # What became of it comes first; it takes no place of the next round's outcome.
        outcome = step(engine, small_store(3.0))
        dropped = [each for each in engine.history if "update of round 1" in each.reason]
        assert [(each.round, each.status) for each in dropped] == [(1, "skipped")]
        assert "expected run 1 of the branch, in which it was made, found run 2" in dropped[0].reason
        assert "It is dropped" in dropped[0].reason
        assert (outcome.round, outcome.status) == (2, "applied")
    assert [upload.layers[0][0, 0] for upload in sandbox.uploads] == [3.0]


def test_who_collects_hears_that_an_update_was_dropped_also_under_raise(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, wait=False, on_error="raise", journal=False) as engine:
        client: Any = engine.client
        client.wait_for_run = True
        client.run_check_interval_s = 0.02
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        assert engine.submit(small_store(2.0), samples=1).status == "pending"
        new_run(sandbox)
        engine._uploader._thread.join(10)
        outcome = engine.collect(small_store())
        assert (outcome.status, outcome.round) == ("skipped", 1)
        assert "found run 2" in outcome.reason
        assert not engine.pending
    assert sandbox.uploads == []


def test_an_update_of_a_paused_run_counts_when_the_run_goes_on(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, wait=False) as engine:
        sandbox.pause()
        wait(lambda: engine.client.run_status == "pause")
        engine.submit(small_store(2.0), samples=1)
        wait(lambda: waiting(tmp_path) == ["update.json", "update.npz"])
        sandbox.start()
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.layers[0][0, 0] == 2.0


def test_an_update_made_before_a_run_counts_in_it(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.stop()
    with leaf(sandbox, tmp_path, wait=False) as engine:
        client: Any = engine.client
        client.wait_for_run = True
        client.run_check_interval_s = 0.02
        assert client.run_status == "stop"
        engine.submit(small_store(2.0), samples=1)
        sandbox.start()
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.layers[0][0, 0] == 2.0
        wait(lambda: engine.collect(small_store()).status == "applied")


def test_an_update_that_waited_for_a_process_that_starts_in_the_next_run_is_not_sent(
    sandbox: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(small_store(2.0), samples=1)
        state = json.loads(json.dumps(engine.state_dict()))
    new_run(sandbox)
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(state)
        assert not engine.pending
        assert not engine._uploader._thread.busy
        assert step(engine, small_store(3.0)).status == "applied"
    assert [upload.layers[0][0, 0] for upload in sandbox.uploads] == [3.0]
    said = [record.getMessage() for record in caplog.records if "out of date" in record.getMessage()]
    assert len(said) == 1
    assert "expected run 1 of the branch, in which it was made, found run 2" in said[0]


def test_an_upload_that_waited_for_a_run_is_noted_as_of_that_run(sandbox: Sandbox, tmp_path: Path) -> None:
    store = small_store(2.0)
    with leaf(sandbox, tmp_path) as engine:
        client: Any = engine.client
        client.wait_for_run = True
        client.run_check_interval_s = 0.02
        state = engine.state_dict()
        sandbox.pause()
        wait(lambda: client.run_status == "pause")
        require_started = client._run.require_started

        def blocked(*values: Any) -> None:
            new_run(sandbox)
            require_started(*values)

        client._run.require_started = blocked
        # Training waits in this call: the model is what it is when the run begins, so it counts there.
        assert engine.submit(store, samples=1).status == "pending"
        sandbox.wait_for(lambda: sandbox.uploads)
        identity = (client.leaf_id, client.branch_id)
    journal = Journal(str(tmp_path), *identity, 2)
    assert journal.is_current
    assert [noted.round for noted in journal.rounds] == [1]
    journal.close()
    # A process that was killed after it and starts in that run does not send the round once more.
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(state)
        assert "not sent again" in engine.submit(store, samples=1).reason
    assert sandbox.hits("upload") == 1


def test_what_another_run_noted_of_a_round_does_not_keep_it_from_being_sent(sandbox: Sandbox, tmp_path: Path) -> None:
    store = small_store()
    with leaf(sandbox, tmp_path) as engine:
        start = engine.state_dict()
        step(engine, store)
    with leaf(sandbox, tmp_path) as engine:
        engine.load_state_dict(start)
        client: Any = engine.client
        new_run(sandbox)
        wait(lambda: client.run_number == 2)
        outcome = step(engine, store)
        assert (outcome.round, outcome.status) == (1, "applied")
        # Closed between two fits, and a run later gone on with.
        engine.close()
        new_run(sandbox)
        wait(lambda: client.run_number == 3)
        assert step(engine, store).status == "applied"
        engine.close()
        journal = Journal(str(tmp_path), client.leaf_id, client.branch_id, 3)
        assert [(noted.round, noted.closed) for noted in journal.rounds] == [(2, "applied")]
        journal.close()
    assert sandbox.hits("upload") == 3
