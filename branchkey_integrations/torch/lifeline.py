"""The one thread through which rank 0 speaks to the other ranks while its main thread is at work.

Collectives must come in one order on all ranks, and none may be torn in two. Sent from a single thread they have an
order, and an interrupt (Ctrl-C), which Python raises in the main thread only, never falls between the announcement of a
collective and the collective itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


class RankLost(RuntimeError):
    """Another rank cannot be reached. No :class:`BranchKeyError`, so that no policy for errors swallows it."""


class Lifeline:
    """Give a sign of life at intervals while the block runs, and do what is asked for in between; then leave no thread.

    An interrupt while the block is left is raised when the thread has ended, which takes a collective's time at most.

    Args:
        beat: gives one sign of life; a RuntimeError means that another rank is gone.
        interval_s: seconds between two.
    """

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self.error: RuntimeError | None = None
        self._beat = beat
        self._interval_s = interval_s
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        # The current accelerator is a matter of each thread, and object broadcasts use the current one.
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.cuda.current_device() if initialized else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="branchkey-beats", daemon=True)

    def __enter__(self) -> Lifeline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        later: BaseException | None = None
        # Not is_alive(): up to Python 3.12 an interrupted join() takes the thread for one that has ended.
        while not self._over.is_set():
            try:
                # Asked for in each turn, since an interrupt may come before it; what is left over in the queue is nobody's.
                self._jobs.put(None)
                self._over.wait()
            except BaseException as interrupt:  # noqa: BLE001  raised below, when no thread speaks to the ranks any more
                later = interrupt
        self._thread.join()
        if later is not None:
            raise later

    def call(self, job: Callable[[], _T]) -> _T:
        """Do ``job`` in the thread, instead of a sign of life, and give its result or raise its error.

        Interrupted while waiting, the job is still done to its end before the block is left.

        Raises:
            RankLost: another rank is gone, now or before.
        """
        future: Future[_T] = Future()
        self._jobs.put((job, future))
        return future.result()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the thread silent while the block runs, so that the main thread can do collectives of its own."""
        silent, over = threading.Event(), threading.Event()

        def keep_silent() -> None:
            silent.set()
            over.wait()

        future: Future[None] = Future()
        self._jobs.put((keep_silent, future))
        try:
            silent.wait()
            yield
        finally:
            over.set()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            try:
                item = self._jobs.get(timeout=self._interval_s)
            except queue.Empty:
                self._give_sign()
                continue
            if item is None:
                return
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001  the main thread raises it
                if isinstance(error, RankLost):
                    self.error = error
                future.set_exception(error)

    def _give_sign(self) -> None:
        if self.error is not None:
            return
        try:
            self._beat()
        except RuntimeError as error:
            # A rank is gone; the main thread asks for this at intervals, and raises it.
            self.error = error
