"""One update after the other: what waits beside training, what takes its place, and who hears of its errors."""

from __future__ import annotations

import json
import threading
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import uploading
from branchkey_integrations.background import Background
from branchkey_integrations.client import Client
from branchkey_integrations.errors import ApiError, UnreachableError
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.offline import DOWN, ONCE, Held, leaf, waiting
from tests.support.rounds import wait
from tests.support.stores import NumpyStore, small_store

pytestmark = pytest.mark.usefixtures("late_updates_soon")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=1) as opened:
        yield opened


def refused(call: Any) -> Answer:
    call.read()
    return Answer.json({"error": "not this"}, 422)


@pytest.mark.parametrize("on_error", ["raise", "keep_local"])
def test_an_error_beside_training_is_not_forgotten_when_the_next_update_comes_first(
    sandbox: Sandbox, tmp_path: Path, on_error: str
) -> None:
    with leaf(sandbox, tmp_path, wait=False, on_error=on_error) as engine, sandbox.intercept("upload", refused):
        engine.submit(small_store(), samples=1)
        engine._uploader._thread.join()
        if on_error == "raise":
            with pytest.raises(ApiError, match="not this"):
                engine.submit(small_store(), samples=1)
        else:
            engine.submit(small_store(), samples=1)
            found = [(outcome.round, outcome.status) for outcome in engine.history]
            assert found == [(1, "pending"), (1, "skipped"), (2, "pending")]
            assert "not this" in engine.history[1].reason


@pytest.mark.parametrize("wait", [True, False])
def test_a_paused_run_skips_the_round_and_is_no_error(sandbox: Sandbox, tmp_path: Path, wait: bool) -> None:
    with leaf(sandbox, tmp_path, wait=wait, on_error="raise") as engine:
        sandbox.pause()
        outcome = engine.submit(small_store(), samples=1)
        if not wait:
            engine._uploader._thread.join()
            outcome = engine.collect(small_store())
        assert outcome.status == "skipped"
        assert "'pause'" in outcome.reason


def test_under_raise_nothing_waits_beside_training_either(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, wait=False, on_error="raise") as engine, sandbox.intercept("upload", DOWN):
        engine.submit(small_store(), samples=1)
        engine._uploader._thread.join(20)
        with pytest.raises(ApiError, match="away"):
            engine.collect(small_store())
    assert waiting(tmp_path) == []


def test_training_that_may_not_wait_does_not_wait_for_another_try_of_an_update(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    held = Held()
    with leaf(sandbox, tmp_path, wait=False) as engine:
        with sandbox.intercept("upload", DOWN) as met:
            engine.submit(small_store(2.0), samples=1)
            wait(lambda: met.count >= 2)
        with sandbox.intercept("upload", held) as met:
            wait(lambda: met.count >= 1)
            late = engine.submit(small_store(3.0), samples=1)
            assert (late.status, late.reason) == ("skipped", "the update before is still being sent")
            held.go.set()
            (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
    assert upload.layers[0][0, 0] == 2.0


def test_an_update_that_took_the_place_of_one_that_waited_is_sent_before_the_next(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    held = Held()
    with leaf(sandbox, tmp_path, wait=False) as engine:
        with sandbox.intercept("upload", DOWN) as met:
            engine.submit(small_store(2.0), samples=1)
            wait(lambda: met.count >= 2 and not engine._uploader.sends)
        with sandbox.intercept("upload", held):
            wait(lambda: engine.submit(small_store(3.0), samples=1).status == "pending")
            late = engine.submit(small_store(4.0), samples=1)
            held.go.set()
        assert (late.status, late.reason) == ("skipped", "the update before is still being sent")
        sandbox.wait_for(lambda: sandbox.uploads)
    assert sandbox.uploads[-1].layers[0][0, 0] == 3.0


def test_what_waits_is_kept_until_a_newer_update_is_there_to_be_sent(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path) as engine:
        with sandbox.intercept("upload", DOWN):
            engine.submit(small_store(2.0), samples=1)
            assert "weighting" in engine.submit(small_store(3.0), samples=0).reason
            assert waiting(tmp_path) == ["update.json", "update.npz"]
            assert engine.pending
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.layers[0][0, 0] == 2.0
        wait(lambda: engine.collect(small_store()).status == "applied")


def test_an_older_training_of_this_process_leaves_the_newer_ones_update_alone(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = sandbox.credentials[0].to_dict()
    options = RoundOptions.of(timeout_s=10.0, on_error="keep_local", journal=tmp_path)
    with Client(credentials, sandbox.url, retry=ONCE, timeout_s=5, output_dir=tmp_path / "out") as client:
        older, newer = RoundEngine(client, options), RoundEngine(client, options)
        with sandbox.intercept("upload", DOWN):
            monkeypatch.setattr(uploading, "FIRST_DELAY_S", 0.5)
            older.submit(small_store(2.0), samples=1)
            monkeypatch.setattr(uploading, "FIRST_DELAY_S", 1.5)
            assert newer.submit(small_store(3.0), samples=1).status == "skipped"
        older._uploader._thread.join(20)
        assert waiting(tmp_path) == ["update.json", "update.npz"]
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.layers[0][0, 0] == 3.0
        older.close()
        assert client.queue._observer is not None
        newer.close()
        assert client.queue._observer is None


def test_an_update_that_came_to_wait_beside_training_is_sent_by_the_next_process(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    with sandbox.intercept("upload", DOWN) as met, leaf(sandbox, tmp_path, wait=False) as engine:
        engine.submit(small_store(4.0), samples=1)
        wait(lambda: met.count >= 2)
        state = engine.state_dict()
    with leaf(sandbox, tmp_path, wait=False) as engine:
        engine.load_state_dict(state)
        (upload,) = sandbox.wait_for(lambda: sandbox.uploads)
        assert upload.layers[0][0, 0] == 4.0


def test_half_an_archive_of_a_killed_process_goes_with_the_next_update(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.intercept("upload", DOWN), leaf(sandbox, tmp_path) as engine:
        engine.submit(small_store(), samples=1)
        (path,) = (tmp_path / "spool").rglob("update.npz")
        (path.parent / ".update.npz.0123456789ab.part").write_bytes(b"half")
        engine.submit(small_store(), samples=1)
    assert waiting(tmp_path) == ["update.json", "update.npz"]


def test_a_training_that_goes_on_after_closing_sends_its_next_round(sandbox: Sandbox, tmp_path: Path) -> None:
    with leaf(sandbox, tmp_path, wait=False) as engine:
        engine.submit(small_store(2.0), samples=1)
        engine.close()
        assert len(sandbox.uploads) == 1
        again = engine.submit(small_store(3.0), samples=1)
        assert (again.round, again.reason) == (2, "")
        sandbox.wait_for(lambda: len(sandbox.uploads) == 2)


def test_an_aggregate_that_could_not_be_had_is_loaded_after_the_next_update_too(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    store, held = small_store(2.0), Held()
    with leaf(sandbox, tmp_path, wait=False) as engine:
        engine.submit(store, samples=1)
        with sandbox.intercept("download", DOWN):
            wait(lambda: engine.collect(store).aggregation_id is not None)
        assert engine.history[-1].status == "skipped"
        with sandbox.intercept("upload", held):
            engine.submit(store, samples=1)
            outcome = engine.collect(store)
            held.go.set()
            engine.close()
        assert (outcome.status, outcome.aggregation_id) == ("applied", sandbox.aggregates[0])


class WatchedStore(NumpyStore):
    """Know whether copies of the model that were given away are still held by anybody."""

    def __init__(self, **arrays: np.ndarray) -> None:
        super().__init__(**arrays)
        self.copies: list[weakref.ref[np.ndarray]] = []

    def read(self) -> list[np.ndarray]:
        found = super().read()
        self.copies += [weakref.ref(array) for array in found]
        return found

    @property
    def held(self) -> int:
        return sum(copy() is not None for copy in self.copies)


def test_while_an_update_waits_on_the_disk_no_copy_of_the_model_is_held_in_memory(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    store, go = WatchedStore(weight=np.ones((2, 3), "f4"), bias=np.ones(3, "f4")), threading.Event()

    def away(call: Any) -> Answer:
        assert go.wait(20)
        return DOWN

    def waits(number: int) -> bool:
        return any(json.loads(path.read_text())["round"] == number for path in tmp_path.rglob("update.json"))

    with leaf(sandbox, tmp_path, wait=False) as engine, sandbox.intercept("upload", away) as met:
        engine.submit(store, samples=1)
        wait(lambda: met.count >= 1)
        assert store.held == 2
        go.set()
        wait(lambda: waits(1))
        wait(lambda: store.held == 0)
        wait(lambda: engine.submit(store, samples=1).status == "pending")
        wait(lambda: waits(engine.round))
        wait(lambda: store.held == 0)
        assert engine._uploader._thread.busy


@pytest.mark.parametrize("options", [{"journal": False}, {"on_error": "raise"}])
def test_an_error_that_nobody_has_heard_of_yet_holds_no_copy_of_the_model(
    sandbox: Sandbox, tmp_path: Path, options: dict[str, Any]
) -> None:
    store = WatchedStore(weight=np.ones((2, 3), "f4"), bias=np.ones(3, "f4"))
    with leaf(sandbox, tmp_path, wait=False, **options) as engine, sandbox.intercept("upload", DOWN):
        engine.submit(store, samples=1)
        engine._uploader._thread.join(20)
        assert len(store.copies) == 2
        wait(lambda: store.held == 0)
        error = engine._uploader._thread._error
        assert isinstance(error, ApiError)
        # Where it came from is still told.
        assert [entry.name for entry in traceback.extract_tb(error.__traceback__)][-1] != "_run"


def test_an_error_holds_nothing_of_the_calls_that_led_to_its_cause() -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def inner() -> None:
        copy = np.ones(3)
        held.append(weakref.ref(copy))
        raise OSError(copy.size)

    def work(stop: threading.Event) -> None:
        try:
            inner()
        except OSError as error:
            raise UnreachableError(what="platform") from error

    background: Background[None] = Background("test")
    background.start(work)
    background.join()
    assert [copy() for copy in held] == [None]
    with pytest.raises(UnreachableError) as caught:
        background.take()
    assert isinstance(caught.value.__cause__, OSError)
