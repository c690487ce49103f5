"""What a client knows of the run, and waiting until it takes updates."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from branchkey_integrations.api import Api
from branchkey_integrations.errors import BranchKeyError, RunBlockedError

logger = logging.getLogger("branchkey_integrations.client")

#: The word by which a run takes updates; any other blocks them (measured on the official clients).
STARTED = "start"
STOPPED = "stop"
#: Words by which a run is under way: an update made meanwhile belongs to it.
IN_A_RUN = (STARTED, "pause")
#: Shortest and longest time between two questions whether a run is stopped, as a notification says, in seconds.
_LEAST_S = 1.0
_MOST_S = 30.0
#: Answers to the contrary after which such a notification counts as an old one; they take half a minute.
_DENIALS = 6


@dataclass
class _Doubt:
    """A stop that was announced and not confirmed, and how often the platform was asked about it."""

    questions: int = 0
    denials: int = 0

    @property
    def pause_s(self) -> float:
        """Shortest time since the last question before the next one, in seconds."""
        return min(_LEAST_S * 2.0 ** max(0, min(self.questions, 60) - 1), _MOST_S)


class RunState:
    """Hold the run's status and number; told by notifications, and asked for where a notification may have been lost.

    Notifications carry no run number, come again after a reconnect, and may overtake each other. A start or a pause is
    believed as it comes: the platform refuses an update that the run does not take. A stop ends a training for good, so
    it counts when the platform confirms it; where it cannot be asked, the status before stands and the question is
    repeated. An answer of the platform never takes the place of a start or pause that was announced after the question.

    Raises:
        ApiError, TransportError: the platform could not be asked.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._changed = threading.Event()
        self._lock = threading.Lock()
        self._number_stale = False
        self._doubt: _Doubt | None = None
        self._tellings = 0
        self._asked_at = float("-inf")
        details = api.run_details()
        #: Last known status; reading it makes no request.
        self.known = details.status
        self._number = details.number

    @property
    def status(self) -> str:
        """The run's status; one request is made when a stop was announced that the platform has not confirmed."""
        if self._claim_question():
            try:
                self._ask(patient=False)
            except BranchKeyError as error:
                logger.info("it is not known whether the run was stopped: %s", error)
        return self.known

    @property
    def number(self) -> int:
        """The run's number; asked for again after a start was announced."""
        if self._number_stale:
            try:
                self._ask()
            except BranchKeyError as error:
                logger.warning("the run's number is not known anew: %s", error)
        return self._number

    def ask_number(self) -> int:
        """Ask the platform for the run's number, once: it may have changed while no notification could come."""
        self._ask(patient=False)
        return self._number

    def told(self, status: str) -> None:
        """Take in a notification; makes no request and never blocks."""
        with self._lock:
            if status != STOPPED:
                self.known, self._doubt = status, None
                self._tellings += 1
            elif self.known != STOPPED:
                self._doubt = _Doubt()
            # A start makes a new number; asking for it here would block the thread that listens.
            self._number_stale = self._number_stale or status == STARTED
        self._changed.set()

    def is_started(self) -> bool:
        """Ask the platform whether the run takes updates."""
        self._ask()
        return self.known == STARTED

    def watch(self, interval_s: float, require_open: Callable[[], None]) -> Callable[[], None]:
        """Give what a wait for something else calls in each turn.

        It raises what ``require_open`` raises, and asks for the status every ``interval_s`` seconds from now on: a stop
        that was announced while no connection stood may never come again.
        """
        asked_at = time.monotonic()

        def look() -> None:
            nonlocal asked_at
            require_open()
            if time.monotonic() - asked_at < interval_s:
                return
            try:
                self._ask(patient=False)
            except BranchKeyError as error:
                require_open()
                logger.info("the run's status is not known: %s", error)
            # From the answer on, so that a platform that takes long to answer is not asked all the time.
            asked_at = time.monotonic()

        return look

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
            if self.known == STARTED and self._doubt is None:
                return
            self._changed.clear()
            try:
                self._ask()
            except BranchKeyError as error:
                if not wait:
                    raise
                require_open()
                logger.warning("the run's status is not known: %s", error)
            if self.known == STARTED:
                return
            if not wait:
                raise RunBlockedError(
                    what="run",
                    expected=f"status {STARTED!r}",
                    found=repr(self.known),
                    fix="Start the run on the platform, or pass wait_for_run=True",
                    run_status=self.known,
                )
            if shown != self.known:
                shown = self.known
                logger.warning("the run's status is %r; waiting until it is started", shown)
            self._changed.wait(interval_s)

    def _claim_question(self) -> bool:
        """Tell whether it is time to ask about an announced stop; of several threads one is told so."""
        with self._lock:
            now = time.monotonic()
            if self._doubt is None or now - self._asked_at < self._doubt.pause_s:
                return False
            self._asked_at = now
            return True

    def _ask(self, *, patient: bool = True) -> None:
        with self._lock:
            doubt, tellings = self._doubt, self._tellings
            if doubt is not None:
                doubt.questions += 1
            # Cleared before the question: a start that is announced meanwhile must make the number stale again.
            self._number_stale = False
            self._asked_at = time.monotonic()
        try:
            details = self._api.run_details(patient=patient)
        except BranchKeyError:
            with self._lock:
                self._number_stale = True
            raise
        with self._lock:
            self._number = details.number
            if tellings == self._tellings:
                self.known = details.status
            if doubt is not None and doubt is self._doubt:
                self._weigh(doubt, details.status)

    def _weigh(self, doubt: _Doubt, answer: str) -> None:
        """Settle a doubt by an answer; a contrary one is asked for again, since what answers may lag behind what announces."""
        if answer != STOPPED:
            doubt.denials += 1
        if answer == STOPPED or doubt.denials >= _DENIALS:
            self._doubt = None
        if doubt.denials == 1:
            logger.warning("a notification says that the run was stopped, and the platform that it is not: %r", answer)
