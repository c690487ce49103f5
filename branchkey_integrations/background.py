"""Do one piece of work at a time in a thread that can be stopped and that gives way to training."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")

#: How much nicer than the thread that started it, of 19; Linux gives each thread a niceness of its own.
_NICENESS = 10


class Background(Generic[Result]):
    """Run work in a daemon thread; its result, or its error, is taken by the thread that asked for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Tell whether work is being done now."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[threading.Event], Result]) -> None:
        """Begin ``work``; it gets an event that is set when it shall end. What was not taken is forgotten."""
        self.stop()
        self._stop = threading.Event()
        self._result = self._error = None
        self._thread = threading.Thread(target=self._run, args=(work, self._stop), name=self._name, daemon=True)
        self._thread.start()

    def take(self) -> Result | None:
        """Give the result once, if the work is over; None if it goes on, was stopped, or was none.

        Raises:
            BaseException: what the work raised.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        error, result = self._error, self._result
        self._error = self._result = None
        if error is not None:
            raise error
        return result

    def stop(self, timeout_s: float | None = None) -> None:
        """Ask the work to end, and wait until it has; longest ``timeout_s`` seconds, None: as long as it takes."""
        self._stop.set()
        self.join(timeout_s)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the work is over, without asking it to end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, work: Callable[[threading.Event], Result], stop: threading.Event) -> None:
        # Elsewhere the number of a thread may be that of a stranger's process.
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                own = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS))
        try:
            self._result = work(stop)
        except BaseException as error:  # noqa: BLE001  raised where it is taken
            self._error = error
            _let_go(error)


def _let_go(error: BaseException) -> None:
    """Free what the calls that failed held: an error that nobody has taken yet shall not keep a copy of a model."""
    links: list[BaseException | None] = [error]
    for link in links:
        if link is not None:
            traceback.clear_frames(link.__traceback__)
            links += [found for found in (link.__cause__, link.__context__) if found not in links]
