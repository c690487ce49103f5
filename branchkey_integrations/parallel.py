"""Share work on layers among the processor's cores, where it is large enough to be worth threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar, cast

#: Below this a second thread costs more than it saves (measured: a third of the time more for 60,000 parameters).
WORTH_BYTES = 8 * 1024 * 1024
#: Each thread holds a few hundred kilobytes; beyond four they wait for memory and for each other.
MOST_THREADS = 4

_T = TypeVar("_T")


def cores() -> int:
    """Count the cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _begun(pool: ThreadPoolExecutor, task: Callable[[], None], count: int) -> list[Future[None]]:
    """Begin a task in several threads, or do it here where no thread can be begun any more."""
    begun = []
    try:
        for _ in range(count):
            begun.append(pool.submit(task))
    except RuntimeError:
        # The main thread has ended while another one goes on training: Python begins no threads from then on.
        task()
    return begun


def over_layers(sizes: Sequence[int], work: Callable[[int], _T], *, alone: bool = False) -> list[_T]:
    """Call ``work(index)`` for each layer and give the results in order; no thread is left when this returns or raises.

    Args:
        sizes: bytes of each layer; the largest are begun first, so that none is left over at the end.
        work: spends its time in calls that release the interpreter lock; safe to call from several threads at a time.
        alone: stay in this thread.

    Raises:
        BaseException: what ``work`` raised, for the first layer where several did; no further layer is begun.
    """
    count = min(cores(), MOST_THREADS, len(sizes))
    if alone or count < 2 or sum(sizes) < WORTH_BYTES:
        return [work(index) for index in range(len(sizes))]
    # One task a thread and not one a layer: of small layers there may be tens of thousands.
    order = iter(sorted(range(len(sizes)), key=lambda index: -sizes[index]))
    results: list[_T | None] = [None] * len(sizes)
    failed: dict[int, BaseException] = {}
    turn = threading.Lock()
    stopped = threading.Event()

    def take_turns() -> None:
        while not stopped.is_set():
            with turn:
                index = next(order, None)
            if index is None:
                return
            try:
                results[index] = work(index)
            except BaseException as error:  # noqa: BLE001  raised in the caller's thread
                failed[index] = error
                stopped.set()

    with ThreadPoolExecutor(count, "branchkey-layers") as pool:
        try:
            wait(_begun(pool, take_turns, count))
        finally:
            # Also when an interrupt ends the waiting: what runs goes on to the end of its layer, the rest is not begun.
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        raise failed[min(failed)]
    return cast("list[_T]", results)
