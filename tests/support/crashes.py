"""A leaf that dies at a chosen step, of all the steps there are: each line of its journal, each request, each half-loaded layer."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from branchkey_integrations.client import Client
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.events import Mailbox
from branchkey_integrations.journal import Journal
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.transport import Transport
from tests.support.stores import NumpyStore

QUICK = RetryPolicy(attempts=3, backoff_s=0.01, backoff_max_s=0.02, budget_s=2.0)


class Killed(BaseException):
    """Stands for a kill: nothing of ours handles it."""


class Steps:
    """Count the steps of a life, and end it at the one with number ``last``; None: never.

    Where nothing is done between the end of a step and the start of the next one, there is one place to die, not two.
    """

    def __init__(self, last: int | None = None, die: Callable[[], None] | None = None) -> None:
        self.names: list[str] = []
        self.dead = False
        self._last, self._die = last, die
        self._lock = threading.Lock()

    def here(self, name: str) -> bool:
        """Tell whether the process dies here; a dead one does nothing any more."""
        with self._lock:
            if not self.dead:
                self.names.append(name)
                self.dead = len(self.names) - 1 == self._last
                if self.dead and self._die is not None:
                    self._die()
            return self.dead

    def pass_by(self, name: str) -> None:
        if self.here(name):
            raise Killed


class HalvesStore(NumpyStore):
    """Die in the middle of and after loading an aggregate."""

    def __init__(self, steps: Steps, **arrays: np.ndarray) -> None:
        super().__init__(**arrays)
        self._steps = steps

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        new = [np.array(arrays[index]) for index in range(len(self.arrays))]
        for index, (each, array) in enumerate(zip(self.arrays.values(), new)):
            each[...] = array
            self._steps.pass_by(f"layer {index} loaded")
        self.writes += 1


@contextmanager
def watched(steps: Steps) -> Iterator[None]:
    """Let journal, requests and mailbox of this process go through ``steps``."""
    note, begin, call, fetch, wait = (
        Journal._note,
        Journal._write_anew,
        Transport.call,
        Transport.fetch,
        Mailbox.wait_newer,
    )

    def noted(self: Journal, line: Any) -> None:
        event = line["event"]
        mine = threading.current_thread().name == "leaf"

        # In the thread that listens nobody raises: a dead process just does nothing any more.
        def leave(name: str) -> bool:
            if mine:
                steps.pass_by(name)
            return steps.here(name) if not mine else False

        if event == "announced" and leave("before announced"):
            return
        with self._lock:
            # Half a line is the last that a dead process writes.
            died = not steps.dead and steps.here(f"half of {event}")
            if died and not self._file.closed:
                self._file.write(json.dumps(line).encode()[:20])
                self._file.close()
        if steps.dead:
            leave("")
            return
        note(self, line)
        leave(f"after {event}")

    def anew(self: Journal, lines: Any) -> None:
        replace = os.replace

        def replaced(*paths: Any) -> None:
            steps.pass_by("in the middle of begin")
            replace(*paths)

        with mock.patch("os.replace", replaced):
            begin(self, lines)
        steps.pass_by("after begin")

    def called(self: Transport, action: str, *values: Any, **options: Any) -> Any:
        if threading.current_thread().name != "leaf":
            return call(self, action, *values, **options)
        if action == "upload":
            steps.pass_by("before upload is asked for")
        answer = call(self, action, *values, **options)
        steps.pass_by(f"after {action.split()[0]} is answered")
        return answer

    def fetched(self: Transport, *values: Any, **options: Any) -> int:
        length = fetch(self, *values, **options)
        steps.pass_by("after the download")
        return length

    def waited(self: Mailbox, mark: int, timeout_s: float | None) -> str | None:
        found = wait(self, mark, timeout_s)
        # What the thread that listens left behind when it died, no dead process takes.
        if steps.dead:
            raise Killed
        return found

    with (
        mock.patch.object(Journal, "_note", noted),
        mock.patch.object(Journal, "_write_anew", anew),
        mock.patch.object(Transport, "call", called),
        mock.patch.object(Transport, "fetch", fetched),
        mock.patch.object(Mailbox, "wait_newer", waited),
        mock.patch("branchkey_integrations.waiting._SLICE_S", 0.02),
    ):
        yield


def life(credentials: dict[str, str], url: str, folder: Path, rounds: int, steps: Steps, **options: Any) -> NumpyStore:
    """Train from the last checkpoint, if there is one, to the end, as one process does; give the model."""
    checkpoint = folder / "checkpoint.npz"
    store = HalvesStore(steps, weight=np.full((2, 3), 1.0, "f4"), bias=np.full(3, 0.5, "f4"))
    epoch, state = 0, None
    if checkpoint.exists():
        with np.load(checkpoint) as found:
            for name, array in store.arrays.items():
                array[...] = found[name]
            epoch, state = int(found["epoch"]), json.loads(str(found["state"]))
    with watched(steps), Client(credentials, url, retry=QUICK, timeout_s=5, quarantine_dir=False) as client:
        engine = RoundEngine(client, RoundOptions.of(**{"timeout_s": 20.0, "journal": folder / "journal", **options}))
        try:
            if state is not None:
                engine.load_state_dict(state)
                if engine.pending:
                    engine.collect(store)
            while epoch < rounds:
                for array in store.arrays.values():
                    array += np.float32(epoch + 1)
                engine.submit(store, samples=10)
                epoch += 1
                saved: dict[str, Any] = {**store.arrays, "epoch": epoch, "state": json.dumps(engine.state_dict())}
                np.savez(folder / "part.npz", **saved)
                os.rename(folder / "part.npz", checkpoint)
                steps.pass_by("after the checkpoint")
                engine.collect(store)
        except BranchKeyError as error:
            # What a thread says that another one killed in the middle of a step, it does not live to say.
            if steps.dead:
                raise Killed from error
            raise
        finally:
            engine.close()
    if steps.dead:
        raise Killed
    return store


def in_a_thread(work: Callable[[], NumpyStore]) -> NumpyStore | None:
    """Do it in a thread that is named as the leaf's; None: it died."""
    found: list[NumpyStore | BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  raised below
            found.append(error)

    thread = threading.Thread(target=run, name="leaf")
    thread.start()
    thread.join(60)
    (result,) = found
    if isinstance(result, Killed):
        return None
    if isinstance(result, BaseException):
        raise result
    return result


def process(credentials: dict[str, str], url: str, folder: str, rounds: int, last: int | None) -> None:
    """Live in a process of its own, and die by SIGKILL; leave the weights of a life that came to its end."""
    threading.current_thread().name = "leaf"
    steps = Steps(last, lambda: os.kill(os.getpid(), signal.SIGKILL))
    store = life(credentials, url, Path(folder), rounds, steps)
    (Path(folder) / "weights").write_bytes(store.image)
