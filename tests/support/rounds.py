"""A real branch, its clients and engines, for tests of whole rounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import BranchKeyError, ClientClosedError
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.outcome import RoundOutcome
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.stores import NumpyStore

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, backoff_max_s=0.02, budget_s=2.0)
LOST = Answer(502, b"<html>", "text/html")


def connect(sandbox: Sandbox, index: int = 0, **options: Any) -> Client:
    given = {"retry": QUICK, "timeout_s": 5, **options}
    return Client(sandbox.credentials[index].to_dict(), sandbox.url, quarantine_dir=False, **given)


def engine_of(client: Client, **options: Any) -> RoundEngine:
    return RoundEngine(client, RoundOptions.of(**{"timeout_s": 10.0, **options}))


def step(engine: RoundEngine, store: NumpyStore, samples: float = 10, **more: Any) -> RoundOutcome:
    sent = engine.submit(store, samples=samples, **more)
    return engine.collect(store) if sent.status == "pending" else sent


def lost_answer(call: Any) -> Answer:
    """Take the update, and let the answer get lost."""
    call.proceed()
    return LOST


def swallow(call: Any) -> Answer:
    """Take the update, and never make an aggregate of it."""
    call.read()
    return Answer.json({"data": {"file_id": f"file-{call.number}"}}, 201)


def wait(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.002)


def until_applied(engine: RoundEngine, store: NumpyStore) -> RoundOutcome:
    deadline = time.monotonic() + 5
    while True:
        outcome = engine.collect(store)
        if outcome.status == "applied":
            return outcome
        assert time.monotonic() < deadline


def assert_ends_at_once(client: Client, call: Callable[[], Any], waits: Callable[[], Any]) -> None:
    """Close the client while another thread waits in ``call``, and demand that it learns so at once."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BranchKeyError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait(waits)
    began = time.monotonic()
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began < 2.5
    assert [type(error) for error in caught] == [ClientClosedError]
