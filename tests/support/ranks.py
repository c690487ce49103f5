"""Two real processes of one distributed job, kept for several tests, since starting them takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """What a function did on one rank: its value, or its error and traceback; seconds it took."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    seconds: float = 0.0


class Ranks:
    """Run functions of a test module on every rank of a gloo group, one thread each.

    Args:
        folder: where the ranks meet.
        size: number of ranks.
    """

    def __init__(self, folder: Path, size: int = 2) -> None:
        self._folder = folder
        self._size = size
        self._runs = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self._size):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, rank, self._size, str(self._folder)), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        group_timeout_s: float = 30.0,
        deadline_s: float = 100.0,
    ) -> list[Answer]:
        """Call ``function(rank, *args)`` on each rank inside a fresh process group; return the answers by rank.

        A rank that dies answers with EOFError, one that hangs past ``deadline_s`` with TimeoutError.
        """
        self._runs += 1
        store = self._folder / f"group-{self._runs}"
        for pipe in self._pipes:
            pipe.send((function, args, str(store), group_timeout_s))
        deadline = time.monotonic() + deadline_s
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                answers.append(Answer(error=TimeoutError(f"no answer within {deadline_s} s")))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError as error:
                answers.append(Answer(error=error))
        return answers

    def values(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Do as :meth:`run`, and demand that no rank failed."""
        answers = self.run(function, *args, **options)
        for rank, answer in enumerate(answers):
            assert answer.error is None, f"rank {rank}: {answer.error!r}\n{answer.traceback}"
        return [answer.value for answer in answers]


def _serve(pipe: Connection, rank: int, size: int, folder: str) -> None:
    # A shell that started the tests in the background has switched it off, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)  # where clients leave what they refuse
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"
    import datetime

    import torch
    import torch.distributed as dist

    from tests.support import network

    network.install()
    torch.set_num_threads(1)
    while True:
        try:
            function, args, store, timeout_s = pipe.recv()
        except EOFError:
            # Taking the interpreter apart with torch inside takes seconds, and nothing here is worth saving.
            os._exit(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        started = time.monotonic()
        answer = Answer()
        try:
            answer.value = function(rank, *args)
        except BaseException as error:  # noqa: BLE001  the test judges it
            answer.error, answer.traceback = error, traceback.format_exc()
        answer.seconds = time.monotonic() - started
        if dist.is_initialized():
            dist.destroy_process_group()
        try:
            pipe.send(answer)
        except (TypeError, AttributeError) as error:
            pipe.send(Answer(error=RuntimeError(f"the answer does not pickle: {error}"), traceback=answer.traceback))
