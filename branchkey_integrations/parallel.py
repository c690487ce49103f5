"""Share work on layers among the processor's cores, where it is large enough to be worth threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    stopped = threading.Event()

    def guarded(index: int) -> _T | None:
        if stopped.is_set():
            return None
        try:
            return work(index)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(count, "branchkey-layers") as pool:
        futures = {index: pool.submit(guarded, index) for index in order}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            # Also when an interrupt ends the waiting: what runs goes on to the end of its layer, the rest is not begun.
            if not all(future.done() for future in futures.values()):
                stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return [cast(_T, future.result()) for _, future in sorted(futures.items()) if not future.cancelled()]
