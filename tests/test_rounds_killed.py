"""A process that dies and is started again, with and without a checkpoint: what it takes up, and what it does not."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import ApiError, JournalError, RoundTimeoutError
from branchkey_integrations.journal import Journal
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.rounds import swallow
from tests.support.stores import NumpyStore, small_store

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, backoff_max_s=0.02, budget_s=2.0)
ROUNDS = 3


class Killed(BaseException):
    """Stands for a kill: nothing of ours handles it."""


class Training:
    """A leaf whose training is a fixed sum, with a checkpoint after each upload, as Lightning makes it."""

    def __init__(self, sandbox: Sandbox, index: int, folder: Path | None) -> None:
        self.sandbox, self.index, self.folder = sandbox, index, folder
        self.checkpoint: tuple[int, dict[str, np.ndarray], dict[str, Any] | None] = (
            0,
            copy.deepcopy(small_store(float(index)).arrays),
            None,
        )

    def run(self, rounds: int = ROUNDS, **options: Any) -> NumpyStore:
        """Train from the last checkpoint to the end, as one process."""
        epoch, arrays, state = self.checkpoint
        store = NumpyStore(**copy.deepcopy(arrays))
        with self.engine(**options) as engine:
            if state is not None:
                engine.load_state_dict(json.loads(json.dumps(state)))
                if engine.pending:
                    engine.collect(store)
            while epoch < rounds:
                for array in store.arrays.values():
                    array += np.float32(0.5 + self.index) * (epoch + 1)
                engine.submit(store, samples=10 + self.index)
                epoch += 1
                self.checkpoint = (epoch, copy.deepcopy(store.arrays), engine.state_dict())
                engine.collect(store)
        return store

    @contextmanager
    def engine(self, **options: Any) -> Iterator[RoundEngine]:
        credentials = self.sandbox.credentials[self.index].to_dict()
        with Client(credentials, self.sandbox.url, retry=QUICK, timeout_s=5, quarantine_dir=False) as client:
            given = {"timeout_s": 20.0, "journal": str(self.folder) if self.folder else False, **options}
            engine = RoundEngine(client, RoundOptions.of(**given))
            try:
                yield engine
            finally:
                engine.close()


@contextmanager
def federation(folder: Path) -> Iterator[tuple[Sandbox, Training, Callable[[], NumpyStore]]]:
    """A branch of two leaves: one to be killed, and one that goes through all rounds in a thread."""
    with Sandbox(leaves=2) as sandbox:
        found: list[NumpyStore] = []
        other = threading.Thread(target=lambda: found.append(Training(sandbox, 1, None).run()))
        other.start()

        def finished() -> NumpyStore:
            other.join(30)
            return found[0]

        yield sandbox, Training(sandbox, 0, folder), finished
        other.join(30)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with federation(tmp_path_factory.mktemp("undisturbed")) as (_, training, finished):
        image = training.run().image
        assert finished().image == image
    return image


def killing(monkeypatch: pytest.MonkeyPatch, step: str, number: int, before: bool) -> None:
    """Die just before or after the given step of the given round is noted, once."""
    original = getattr(Journal, step)
    armed = [True]

    def noted(self: Journal, found: int, *values: Any) -> None:
        now = armed[0] and found == number
        if now and before:
            armed[0] = False
            raise Killed
        original(self, found, *values)
        if now:
            armed[0] = False
            raise Killed

    monkeypatch.setattr(Journal, step, noted)


def test_a_repeated_round_makes_no_request_for_an_upload(tmp_path: Path, undisturbed: bytes) -> None:
    with federation(tmp_path) as (sandbox, training, finished):
        start = training.checkpoint
        training.run()
        finished()
        hits = sandbox.hits("upload")
        training.checkpoint = start  # an old checkpoint: all rounds were made already
        with training.engine() as engine:
            state = engine.state_dict()
        training.checkpoint = (0, start[1], {**state, "round": 0, "pending": None, "last_applied": None})
        assert training.run().image == undisturbed
        assert sandbox.hits("upload") == hits


def test_an_archive_whose_last_bytes_may_have_gone_out_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sandbox(leaves=1) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        killing(monkeypatch, "posted", 1, before=False)
        with pytest.raises(Killed):
            training.run(1)
        hits = sandbox.hits("upload")
        with training.engine(timeout_s=0.1, on_error="keep_local") as engine:
            sent = engine.submit(small_store(), samples=1)
            assert sent.status == "pending"
            assert "may have been received before the restart" in sent.reason
            assert engine.collect(small_store()).status == "timeout"
            assert sandbox.hits("upload") == hits
            # The next round goes out as ever.
            assert engine.submit(small_store(2.0), samples=1).upload_id == sandbox.uploads[-1].file_id


def test_a_script_started_anew_does_not_send_while_its_last_update_waits_for_an_aggregate(tmp_path: Path) -> None:
    with Sandbox(leaves=2) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        with training.engine() as engine:
            first = engine.submit(small_store(4.0), samples=1)
        # No checkpoint: round 1 once more, with other weights.
        store = small_store(9.0)
        with training.engine() as engine, Training(sandbox, 1, None).engine() as other:
            again = engine.submit(store, samples=1)
            assert (again.round, again.upload_id) == (1, first.upload_id)
            assert "not sent again" in again.reason
            other.submit(small_store(6.0), samples=1)
            assert engine.collect(store).status == "applied"
            assert store.arrays["weight"][0, 0] == 5.0
            assert engine.submit(store, samples=1).upload_id != first.upload_id
        assert [upload.leaf_id for upload in sandbox.uploads].count(sandbox.credentials[0].id) == 2


def test_a_script_started_anew_after_its_round_was_over_sends(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        for count in (1, 2):
            Training(sandbox, 0, tmp_path).run(1)
            assert len(sandbox.uploads) == count


def test_an_aggregate_that_was_heard_but_not_loaded_is_loaded_after_the_restart(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        store = small_store(4.0)
        with training.engine() as engine:
            engine.submit(store, samples=1)
            state = engine.state_dict()  # before the aggregate is heard of
            sandbox.wait_for(lambda: sandbox.aggregates)
            queue = engine.client.queue  # type: ignore[attr-defined]
            _wait(lambda: not queue.empty())
        store.arrays["weight"][...] = 0
        sandbox.notify(json.dumps({"message_type": "run_status", "body": {"run_status": "start"}}))
        with training.engine(timeout_s=0.2) as engine:
            engine.load_state_dict(state)
            outcome = engine.collect(store)
        assert (outcome.status, outcome.aggregation_id) == ("applied", sandbox.aggregates[0])
        assert store.arrays["weight"][0, 0] == 4.0


def test_a_refused_upload_is_sent_again_after_the_restart(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        with sandbox.intercept("upload", _refuse), training.engine() as engine, pytest.raises(ApiError):
            engine.submit(small_store(), samples=1)
        with training.engine() as engine:
            assert engine.submit(small_store(), samples=1).upload_id == sandbox.uploads[0].file_id


def test_what_another_run_noted_is_not_taken_up(tmp_path: Path) -> None:
    with Sandbox(leaves=2) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        with training.engine() as engine:
            engine.submit(small_store(), samples=1)
        sandbox.stop()
        sandbox.start()
        with training.engine() as engine:
            again = engine.submit(small_store(3.0), samples=1)
            assert again.upload_id == sandbox.uploads[-1].file_id
            assert again.reason == ""


def test_a_journal_that_cannot_be_written_keeps_the_update_at_home(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise JournalError(what="journal", expected="a file that can be written", found="No space left on device")

    with Sandbox(leaves=1) as sandbox:
        monkeypatch.setattr(Journal, "sending", full)
        with Training(sandbox, 0, tmp_path).engine(on_error="keep_local") as engine:
            outcome = engine.submit(small_store(), samples=1)
        assert outcome.status == "skipped"
        assert "No space left" in outcome.reason
        assert sandbox.uploads == []


def test_without_a_journal_no_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Sandbox(leaves=1) as sandbox:
        Training(sandbox, 0, None).run(1)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_holds_no_secret(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        Training(sandbox, 0, tmp_path).run(1)
        (file,) = tmp_path.iterdir()
        text = file.read_text()
        assert sandbox.credentials[0].to_dict()["session_token"] not in text
        events = [json.loads(line)["event"] for line in text.splitlines()]
        # The aggregate may be announced before the upload is answered.
        assert [event for event in events if event != "announced"] == ["begin", "sending", "posted", "sent", "closed"]
        assert events.count("announced") == 1


def _refuse(call: Any) -> Answer:
    call.read()
    return Answer.json({"error": "not today"}, 400)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_a_timeout_before_the_kill_is_waited_for_again(tmp_path: Path) -> None:
    with Sandbox(leaves=2) as sandbox:
        training = Training(sandbox, 0, tmp_path)
        with pytest.raises(RoundTimeoutError):
            training.run(1, timeout_s=0.05)
        with Training(sandbox, 1, None).engine() as other:
            other.submit(small_store(6.0), samples=10)
            assert training.run(1).arrays["weight"][0, 0] == 3.25
        assert [upload.leaf_id for upload in sandbox.uploads].count(sandbox.credentials[0].id) == 1


def test_a_journal_that_could_not_be_begun_is_not_taken_for_that_of_this_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Sandbox(leaves=1) as sandbox:
        Training(sandbox, 0, tmp_path).run(3)
        with Training(sandbox, 0, tmp_path).engine(on_error="keep_local") as engine:
            with monkeypatch.context() as once:
                once.setattr("os.fsync", full)
                assert "No space left" in engine.submit(small_store(), samples=1).reason
            store = small_store(500.0)
            again = engine.submit(store, samples=1)
            assert (again.round, again.status, again.reason) == (2, "pending", "")
            assert engine.collect(store).status == "applied"
            assert store.arrays["weight"][0, 0] == 500.0
            assert (
                f'"announced","aggregation_id":"{sandbox.aggregates[-1]}"' in next(tmp_path.glob("*.jsonl")).read_text()
            )
        assert len(sandbox.uploads) == 4


def test_rounds_after_the_run_was_started_anew_are_known_as_that_runs(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        training, store = Training(sandbox, 0, tmp_path), small_store(1.0)
        with training.engine() as engine:
            engine.submit(store, samples=1)
            engine.collect(store)
            state = engine.state_dict()
            sandbox.stop()
            sandbox.start()
            _wait(lambda: engine.client.run_number == 2)  # type: ignore[attr-defined]
            sent = engine.submit(store, samples=1)
        with training.engine() as engine:
            engine.load_state_dict(state)
            again = engine.submit(store, samples=1)
            assert (again.upload_id, "not sent again" in again.reason) == (sent.upload_id, True)
        assert sandbox.hits("upload") == 2


def test_an_unread_aggregate_does_not_take_the_place_of_a_newer_one(tmp_path: Path) -> None:
    with Sandbox(leaves=1) as sandbox:
        training, store = Training(sandbox, 0, tmp_path), small_store(1.0)
        with training.engine() as engine:
            engine.submit(store, samples=1)
            engine.collect(store)
            state = engine.state_dict()
            client: Any = engine.client
            identity = (client.leaf_id, client.branch_id, client.run_number)
        older = sandbox.publish([array * 7 for array in store.arrays.values()])
        journal = Journal(str(tmp_path), *identity)
        journal.announced(older)
        journal.close()
        with training.engine(wait=False) as engine:
            newer = sandbox.publish([array * 9 for array in store.arrays.values()])
            queue = engine.client.queue  # type: ignore[attr-defined]
            _wait(lambda: queue._newest == newer)
            queue._seen.pop(older, None)  # as from a broker that heard that it had arrived
            engine.load_state_dict(state)
            assert engine.collect(store).aggregation_id == newer
            assert queue.empty()


def test_an_open_round_of_a_checkpoint_is_noted_where_no_journal_knew_of_it(tmp_path: Path) -> None:
    with Sandbox(leaves=2) as sandbox:
        with Training(sandbox, 0, None).engine() as engine:
            sent = engine.submit(small_store(4.0), samples=1)
            state = json.loads(json.dumps(engine.state_dict()))
        training = Training(sandbox, 0, tmp_path)
        with training.engine() as engine:
            engine.load_state_dict(state)
            heard = sandbox.publish(small_store().read())
            _wait(lambda: heard in (tmp_path / f"{engine.client.leaf_id}.jsonl").read_text())
        # Killed once more, and started without the checkpoint: the journal alone knows by now.
        with training.engine() as engine:
            again = engine.submit(small_store(9.0), samples=1)
        assert (again.round, again.upload_id) == (1, sent.upload_id)
        assert again.uploaded_bytes == sent.uploaded_bytes > 0
        assert "sent before the restart" in again.reason
        assert sandbox.hits("upload") == 1


def test_an_aggregate_that_was_refused_before_the_kill_is_not_fetched_again(tmp_path: Path) -> None:
    def poisoned(call: Any) -> Answer:
        sandbox.publish([np.full((2, 3), np.nan, "f4"), np.ones(3, "f4")])
        return swallow(call)

    with Sandbox(leaves=1) as sandbox:
        training, store = Training(sandbox, 0, tmp_path), small_store()
        with training.engine(on_error="keep_local") as engine:
            before = engine.state_dict()
            with sandbox.intercept("upload", poisoned):
                engine.submit(store, samples=1)
                sent = engine.state_dict()
                assert engine.collect(store).status == "rejected"
        hits = sandbox.hits("download")
        with training.engine(on_error="keep_local") as engine:
            engine.load_state_dict(sent)
            assert not engine.pending
        with training.engine(on_error="keep_local") as engine:
            engine.load_state_dict(before)
            again = engine.submit(store, samples=1)
            assert again.status == "rejected"
            assert f"aggregate {sandbox.aggregates[0]} was refused before the restart" in again.reason
            assert not engine.pending
        assert sandbox.hits("download") == hits
        assert store.writes == 0
