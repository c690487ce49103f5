"""What the platform tells a leaf: parsing notifications, and the mailbox they wait in.

Message shapes are those measured on the official clients; both transports carry the same JSON text:

    {"message_type": "aggregation_status", "body": {"aggregation_id": "<id>"}}
    {"message_type": "run_status",         "body": {"run_status": "start" | "pause" | "stop"}}
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

from branchkey_integrations.errors import BranchKeyError, NotificationError

#: A notification is two short strings; anything larger is junk and is not even decoded.
MAX_NOTIFICATION_BYTES = 64 * 1024
_MAX_ID_LENGTH = 256
_SHOWN_BYTES = 120
#: Ids remembered to recognise a repeat. Older ones are so far back that no broker still holds them.
_SEEN_IDS = 65_536


@dataclass(frozen=True)
class AggregateReady:
    """An aggregate can be downloaded under ``aggregation_id``."""

    aggregation_id: str


@dataclass(frozen=True)
class RunStatusChanged:
    """The run was started, paused or stopped; ``run_status`` is the platform's word for it."""

    run_status: str


@dataclass(frozen=True)
class UnknownNotification:
    """A well-formed message of a type this version does not know; to be settled and ignored."""

    message_type: str


Notification = Union[AggregateReady, RunStatusChanged, UnknownNotification]


def check_aggregation_id(value: object) -> str:
    """Return the id if it can safely become a file name and a path segment.

    Raises:
        NotificationError: not a string, empty, too long, or with characters beyond letters, digits, ``.``, ``_``, ``-``.
    """
    if (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_ID_LENGTH
        and value.isascii()
        and value[0] != "."
        and all(character.isalnum() or character in "._-" for character in value)
    ):
        return value
    raise NotificationError(
        what="aggregation id",
        expected="letters, digits, dots, underscores and dashes, the first no dot",
        found=repr(value)[:_SHOWN_BYTES],
        fix="Use the id as the platform gave it",
    )


def parse_notification(raw: bytes | str) -> Notification:
    """Parse one message body.

    Raises:
        NotificationError: the message is malformed; it names why and shows at most 120 bytes of it.
    """
    size = len(raw)
    if isinstance(raw, str) and size <= MAX_NOTIFICATION_BYTES:
        size = len(raw.encode("utf-8", "surrogatepass"))
    shown = repr(raw[:_SHOWN_BYTES])[:_SHOWN_BYTES]

    def malformed(expected: str) -> NotificationError:
        return NotificationError(what="notification", expected=expected, found=shown, fix="It is ignored")

    if size > MAX_NOTIFICATION_BYTES:
        raise malformed(f"at most {MAX_NOTIFICATION_BYTES} bytes, not {size}")
    try:
        message = json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw)
    except (ValueError, RecursionError):
        raise malformed("JSON in UTF-8") from None
    if not isinstance(message, dict):
        raise malformed("a JSON object")
    kind = message.get("message_type")
    if not isinstance(kind, str):
        raise malformed("a message_type")
    if kind not in ("aggregation_status", "run_status"):
        return UnknownNotification(kind[:_SHOWN_BYTES])
    body = message.get("body")
    if not isinstance(body, dict):
        raise malformed("a body that is an object")
    if kind == "run_status":
        status = body.get("run_status")
        if not isinstance(status, str) or not status or len(status) > _MAX_ID_LENGTH:
            raise malformed("a run_status")
        return RunStatusChanged(status)
    try:
        return AggregateReady(check_aggregation_id(body.get("aggregation_id")))
    except NotificationError:
        raise malformed("an aggregation_id that can be a file name") from None


class Mailbox:
    """Keep the newest aggregation id; a sender never waits, a reader may.

    Only the newest id counts, since a newer aggregate replaces an older one. Each id is delivered once: repeats, and ids
    older than the newest one seen, are dropped. A *mark* is a moment in the order of arrival; :meth:`wait_newer` with a
    mark taken before an upload cannot return what lay there before, and cannot miss what came before the upload's answer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._arrivals = 0
        self._newest: str | None = None
        self._failure: BranchKeyError | None = None
        self._observer: Callable[[str], None] | None = None

    def observe(self, observer: Callable[[str], None] | None) -> None:
        """Call ``observer`` with each new id before a reader can take it, in the sender's thread; None ends it.

        An id that waits already is passed on at once. The observer must not raise.
        """
        with self._changed:
            self._observer = observer
            waiting = self._newest
        if observer is not None and waiting is not None:
            observer(waiting)

    def unobserve(self, observer: Callable[[str], None]) -> None:
        """End what :meth:`observe` began, unless somebody else observes by now."""
        with self._changed:
            if self._observer is observer:
                self._observer = None

    def put(self, aggregation_id: str) -> bool:
        """Leave an id; returns False when it is a repeat."""
        with self._changed:
            if aggregation_id in self._seen:
                return False
            self._remember(aggregation_id)
            observer = self._observer
        if observer is not None:
            # Not under the lock: it writes to a disk, and readers must go on meanwhile.
            observer(aggregation_id)
        with self._changed:
            self._arrivals += 1
            self._newest = aggregation_id
            self._changed.notify_all()
            return True

    def forget_before(self, aggregation_id: str) -> None:
        """Count an id as seen, so that a repeat of it (after a restart, say) is not taken for news."""
        with self._changed:
            self._remember(aggregation_id)
            if self._newest == aggregation_id:
                self._newest = None

    def mark(self) -> int:
        """Give the present moment in the order of arrival."""
        with self._changed:
            return self._arrivals

    def wait_newer(self, mark: int, timeout_s: float | None) -> str | None:
        """Take the newest id that arrived after ``mark``; None when none came within ``timeout_s`` (None: wait for ever).

        Raises:
            BranchKeyError: what :meth:`fail` was given, when nothing newer is there.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._newest is not None and self._arrivals > mark:
                    return self._take()
                if self._failure is not None:
                    raise self._failure
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                self._changed.wait(remaining)

    def fail(self, error: BranchKeyError | None) -> None:
        """Wake all readers with an error, or clear it with None. Ids that came before it are still handed out."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def get(self, block: bool = True, timeout: float | None = None) -> str:
        """Take the newest id, as :meth:`queue.Queue.get` does.

        Raises:
            queue.Empty: none is there (``block=False``) or none came within ``timeout`` seconds.
        """
        if timeout is not None and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        found = self.wait_newer(-1, timeout if block else 0)
        if found is None:
            raise queue.Empty
        return found

    def get_nowait(self) -> str:
        """Take the newest id or raise :class:`queue.Empty`."""
        return self.get(block=False)

    def empty(self) -> bool:
        """Tell whether no id waits."""
        with self._changed:
            return self._newest is None

    @property
    def newest(self) -> str | None:
        """The id that waits; None if there is none."""
        with self._changed:
            return self._newest

    def qsize(self) -> int:
        """Give the number of ids that wait: 0 or 1."""
        return 0 if self.empty() else 1

    def _remember(self, aggregation_id: str) -> None:
        self._seen[aggregation_id] = None
        if len(self._seen) > _SEEN_IDS:
            self._seen.popitem(last=False)

    def _take(self) -> str:
        taken = self._newest
        assert taken is not None
        self._newest = None
        return taken
