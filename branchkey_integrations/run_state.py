"""What a client knows of the run, and waiting until it takes updates."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from branchkey_integrations.api import Api
from branchkey_integrations.errors import BranchKeyError, RunBlockedError

logger = logging.getLogger("branchkey_integrations.client")

#: The word by which a run takes updates; any other blocks them (measured on the official clients).
STARTED = "start"
STOPPED = "stop"


class RunState:
    """Hold the run's status and number; told by notifications, and asked for where a notification may have been lost.

    Raises:
        ApiError, TransportError: the platform could not be asked.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._changed = threading.Event()
        self._number_stale = False
        details = api.run_details()
        self.status, self._number = details.status, details.number

    @property
    def number(self) -> int:
        """The run's number; asked for again after a start was announced."""
        if self._number_stale:
            try:
                self._ask()
            except BranchKeyError as error:
                logger.warning("the run's number is not known anew: %s", error)
        return self._number

    def told(self, status: str) -> None:
        """Take in a notification; makes no request and never blocks."""
        self.status = status
        # A start makes a new number; asking for it here would block the thread that listens.
        self._number_stale = self._number_stale or status == STARTED
        self._changed.set()

    def is_started(self) -> bool:
        """Ask the platform whether the run takes updates."""
        self._ask()
        return self.status == STARTED

    def wake(self) -> None:
        """Make a waiting :meth:`require_started` look again."""
        self._changed.set()

    def require_started(self, wait: bool, interval_s: float, require_open: Callable[[], None]) -> None:
        """Return when the run takes updates.

        Args:
            wait: whether to wait for it; the platform is asked every ``interval_s`` seconds.
            interval_s: seconds between two questions.
            require_open: raises when the client was closed.

        Raises:
            RunBlockedError: the run is not started, and ``wait`` is False.
        """
        shown = None
        while True:
            require_open()
            if self.status == STARTED:
                return
            self._changed.clear()
            try:
                self._ask()
            except BranchKeyError as error:
                if not wait:
                    raise
                require_open()
                logger.warning("the run's status is not known: %s", error)
            if self.status == STARTED:
                return
            if not wait:
                raise RunBlockedError(
                    what="run",
                    expected=f"status {STARTED!r}",
                    found=repr(self.status),
                    fix="Start the run on the platform, or pass wait_for_run=True",
                    run_status=self.status,
                )
            if shown != self.status:
                shown = self.status
                logger.warning("the run's status is %r; waiting until it is started", shown)
            self._changed.wait(interval_s)

    def _ask(self) -> None:
        # Cleared before the question: a start that is announced meanwhile must make the number stale again.
        self._number_stale = False
        try:
            details = self._api.run_details()
        except BranchKeyError:
            self._number_stale = True
            raise
        self.status, self._number = details.status, details.number
