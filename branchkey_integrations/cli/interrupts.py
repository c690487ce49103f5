"""Turn Ctrl-C and SIGTERM into an exception that comes when it can do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The process was told to end; ``signal`` is the number of the signal that said so."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = int(number)


class Interrupts:
    """Raise :class:`Interrupted` in the main thread on SIGINT and SIGTERM, for the length of the ``with`` block.

    Outside the main thread nothing is installed, since only the main thread may.
    """

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}
        self._held = 0
        self._waiting: int | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _arrive(self, number: int, _frame: FrameType | None) -> None:
        if self._held:
            self._waiting = number
            return
        raise Interrupted(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the exception back until the block ends, so that what was just started can be written down."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._waiting is not None and not self._held:
            number, self._waiting = self._waiting, None
            raise Interrupted(number)

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignore signals for a clean-up that ends by itself within seconds: an impatient second Ctrl-C spoils nothing.

        A handler does it, since SIG_IGN would be inherited by the processes that the clean-up starts.
        """
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._waiting = None
