"""What both listeners share: the thread, the start barrier, the pace of reconnecting, and what a bad message gets."""

from __future__ import annotations

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    AuthenticationError,
    BranchKeyError,
    ClientClosedError,
    ConfigurationError,
    NotificationError,
    TLSError,
    UnreachableError,
    shown,
)
from branchkey_integrations.events import Notification, UnknownNotification, parse_notification

logger = logging.getLogger("branchkey_integrations.listeners")

OnEvent = Callable[[Notification], None]
OnFailure = Callable[["BranchKeyError | None"], None]

#: Longest that ``close`` takes, in seconds; each state of a listener can be left in less.
CLOSE_S = 1.9
#: Shortest pause before a reconnect, in seconds, whatever the retry policy says: a server that hangs up at once would
#: otherwise be asked for hundreds of tickets a second, as measured on official clients.
_LEAST_PAUSE_S = 0.1
#: A connection that lasted this long, in seconds, was a good one: the next outage starts from the shortest pause again.
_STEADY_S = 10.0
#: Refusals in a row before the caller is told. One alone is normal while a broker or a platform restarts.
_REFUSALS_TOLD = 2


class LostError(Exception):
    """Internal: a connection ended that had been good; its text says how, without secrets."""


def pause_s(policy: RetryPolicy, failures: int) -> float:
    """Give the pause before the next try, in seconds, after ``failures`` (from 1) failures in a row."""
    # The exponent is capped because 2**1024 overflows a float.
    longest = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** min(failures - 1, 60))
    return max(_LEAST_PAUSE_S, longest * (1.0 - policy.jitter * random.random()))  # noqa: S311 - spreads load, guards nothing


def is_refusal(error: BranchKeyError) -> bool:
    """Tell whether the other side said no, so that waiting alone will hardly help."""
    return isinstance(error, (NotificationError, AuthenticationError, TLSError, ConfigurationError))


class ThreadedListener(ABC):
    """Run :meth:`_listen` in a thread, again and again, until :meth:`close`.

    Args:
        on_event: called in the listener's thread with each well-formed notification of a known type; must not block.
        on_failure: called in that thread with an error when reconnecting is refused, and with None when it is well again.
        retry: the pace of reconnecting (``backoff_s``, ``backoff_max_s``, ``jitter``); it never gives up.
    """

    name: str

    def __init__(self, on_event: OnEvent, on_failure: OnFailure, retry: RetryPolicy | None) -> None:
        self._on_event = on_event
        self._on_failure = on_failure
        self._retry = retry or RetryPolicy()
        #: One event is both stop flag and sleep.
        self._stop = threading.Event()
        self._settled = threading.Event()
        self._first_error: BaseException | None = None
        self._ready_once = False
        self._ready_at: float | None = None
        self._refusals = 0
        self._told = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._interrupt: Callable[[], None] | None = None

    @abstractmethod
    def _listen(self) -> None:
        """Connect, call :meth:`_ready`, deliver until the connection ends or the stop flag is set.

        Raises:
            BranchKeyError: it could not be opened.
            LostError: it was open and has ended.
        """

    @property
    @abstractmethod
    def _peer(self) -> str:
        """Host and port for messages."""

    def start(self, timeout_s: float) -> None:
        """Begin to listen, and return when what lay there already has been delivered.

        Args:
            timeout_s: longest wait for that, in seconds.

        Raises:
            NotificationError: the login or the queue was refused, or it took longer than ``timeout_s``.
            UnreachableError: host or port do not answer.
            TLSError: the certificate or the handshake was refused.
        """
        with self._lock:
            if self._stop.is_set():
                raise ClientClosedError(
                    what=f"{self.name} listener", expected="an open one", found="a closed one", fix="Make a new one"
                )
            if self._thread is None:
                # A daemon, so that a script that forgets to close can still end.
                self._thread = threading.Thread(target=self._run, name=f"branchkey-{self.name}", daemon=True)
                self._thread.start()
        settled = self._settled.wait(timeout_s)
        error = self._first_error
        if error is None and settled and self._ready_once:
            return
        closed = self._stop.is_set()
        self.close()
        if error is not None:
            raise error
        if closed:
            raise ClientClosedError(what=f"{self.name} listener", fix="It was closed while it started")
        raise NotificationError(
            what=f"notifications from {self._peer}",
            expected=f"a listener that is ready within {timeout_s:g} s",
            found="one still on its way",
            fix="Check host and port, and that no firewall swallows the connection",
        )

    def close(self) -> None:
        """Stop within 2 seconds in every state; safe to call twice, and from any thread."""
        deadline = time.monotonic() + CLOSE_S
        self._stop.set()
        self._settled.set()
        with self._lock:
            thread, interrupt = self._thread, self._interrupt
        if interrupt is not None:
            interrupt()
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                # Only name resolution, and the ticket's own HTTP call, cannot be cut short; both have deadlines.
                logger.warning("%s listener: its thread ends when %s answers or times out", self.name, self._peer)

    @property
    def alive(self) -> bool:
        """Whether the listener is at work: listening, or on its way back after an outage."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._stop.is_set()

    @property
    def connected(self) -> bool:
        """Whether notifications can arrive right now."""
        return self._ready_at is not None

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._listen()
                reason: object = "it ended"
            except LostError as error:
                reason = error
                if not self._ready_once:
                    self._first_error = UnreachableError(
                        what=f"notifications from {self._peer}", expected="a connection that holds", found=str(error)
                    )
            except BranchKeyError as error:
                reason = error
                self._refused(error)
            except Exception as error:
                # A fault of ours must not silence a leaf: report it, and try again.
                logger.exception("%s listener failed", self.name)
                reason = self._fault(error)
                self._refused(reason)
            lasted_s = self._ended()
            if self._stop.is_set():
                return
            if not self._ready_once:
                self._settled.set()
                return
            failures = 1 if lasted_s > _STEADY_S else failures + 1
            pause = pause_s(self._retry, failures)
            # One warning an outage; an overnight one must not fill the log.
            level = logging.WARNING if failures == 1 else logging.INFO
            found = shown(str(reason.found or reason if isinstance(reason, BranchKeyError) else reason))
            logger.log(
                level, "%s: no notifications from %s (%s); trying again in %.1f s", self.name, self._peer, found, pause
            )
            self._stop.wait(pause)

    def _ended(self) -> float:
        began, self._ready_at = self._ready_at, None
        return 0.0 if began is None else time.monotonic() - began

    def _fault(self, error: Exception) -> NotificationError:
        return NotificationError(
            what=f"{self.name} listener", expected="a working listener", found=type(error).__name__, fix="Report it"
        )

    def _refused(self, error: BranchKeyError) -> None:
        if self._stop.is_set():
            return
        if not self._ready_once:
            self._first_error = error
            return
        self._refusals = self._refusals + 1 if is_refusal(error) else 0
        if self._refusals == _REFUSALS_TOLD:
            self._told = True
            self._on_failure(error)

    def _ready(self) -> None:
        """Note that the connection stands and what lay there was delivered."""
        self._ready_at = time.monotonic()
        self._refusals = 0
        if self._told:
            self._told = False
            self._on_failure(None)
        if self._ready_once:
            logger.info("%s: notifications come again from %s", self.name, self._peer)
        self._ready_once = True
        self._settled.set()

    def _interruptible(self, interrupt: Callable[[], None] | None) -> None:
        """Register what :meth:`close` calls, from its own thread, to end what this thread does now."""
        with self._lock:
            self._interrupt = interrupt
        # close() may have come between the caller's last look and this line.
        if interrupt is not None and self._stop.is_set():
            interrupt()

    def _deliver(self, raw: bytes | str) -> None:
        """Parse one message and hand it on; a bad one gets one warning, and nothing is ever raised."""
        try:
            event = parse_notification(raw)
        except NotificationError as error:
            logger.warning("%s: %s", self.name, error)
            return
        if isinstance(event, UnknownNotification):
            logger.info("%s: ignored a notification of unknown type %a", self.name, event.message_type)
            return
        try:
            self._on_event(event)
        except Exception:
            logger.exception("%s: handling of a notification failed", self.name)
