"""The open WebSockets: each has an outbox of its own, so that a slow leaf holds up nobody and fills no memory."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Union

from branchkey_integrations.sandbox.answer import reset, transport_of

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

Text = Union[str, bytes]
_AGGREGATE, _STATUS = "aggregation_status", "run_status"
#: Raw texts that may wait for one slow leaf. They come from tests only.
_MOST_RAW = 10_000


def aggregate_message(aggregation_id: str) -> str:
    """Word the notification of an aggregate."""
    return json.dumps({"message_type": _AGGREGATE, "body": {"aggregation_id": aggregation_id}})


def status_message(run_status: str) -> str:
    """Word the notification of a run status."""
    return json.dumps({"message_type": _STATUS, "body": {"run_status": run_status}})


class Connection:
    """One WebSocket: what waits to be sent, at most the newest message of each type, and the raw ones in order."""

    def __init__(self, leaf_id: str, websocket: WebSocket) -> None:
        self.leaf_id = leaf_id
        self.since = 0
        self.websocket = websocket
        self._waiting: OrderedDict[str, Text] = OrderedDict()
        self._wake = asyncio.Event()
        self._raw = 0

    def put(self, text: Text, kind: str | None = None) -> None:
        """Queue a message; one of a known ``kind`` takes the place of an older one that was not sent yet."""
        if kind is None:
            self._raw += 1
            kind = f"raw {self._raw}"
            if len(self._waiting) >= _MOST_RAW:
                self._waiting.popitem(last=False)
        self._waiting.pop(kind, None)
        self._waiting[kind] = text
        self._wake.set()

    def drop(self) -> None:
        """Reset the connection."""
        reset(transport_of(self.websocket.scope))

    def catch_up(self, run_status: str | None, aggregation_id: str | None, number: int) -> None:
        """Queue what the leaf missed; announcements up to ``number`` are covered by it."""
        self.since = number
        if run_status is not None:
            self.put(status_message(run_status), _STATUS)
        if aggregation_id is not None:
            self.put(aggregate_message(aggregation_id), _AGGREGATE)

    async def send_for_ever(self) -> None:
        """Send what is queued, as fast as the other side takes it."""
        while True:
            await self._wake.wait()
            while self._waiting:
                _, text = self._waiting.popitem(last=False)
                await (self.websocket.send_bytes(text) if isinstance(text, bytes) else self.websocket.send_text(text))
            self._wake.clear()


def deliver(connection: Connection, text: Text, kind: str) -> bool:
    """Queue a notification for one WebSocket; tells whether it is certain that it goes out."""
    connection.put(text, kind)
    return True


class Hub:
    """Know the open WebSockets. All methods are for the server's event loop only.

    ``deliver`` passes each notification on to each of them; faults on purpose take its place.
    """

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self.deliver: Callable[[Connection, Text, str], bool] = deliver

    @property
    def leaf_ids(self) -> list[str]:
        """The leaves of the open WebSockets, one entry a WebSocket."""
        return [connection.leaf_id for connection in self._connections]

    def add(self, connection: Connection) -> None:
        """Take a WebSocket in."""
        self._connections.append(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a WebSocket."""
        self._connections.remove(connection)

    def announce_aggregate(self, aggregation_id: str, number: int) -> None:
        """Tell all about an aggregate. ``number`` counts announcements, so that nobody hears twice what it caught up with."""
        for connection in self._connections:
            if number > connection.since:
                self.deliver(connection, aggregate_message(aggregation_id), _AGGREGATE)

    def announce_status(self, run_status: str, number: int) -> list[str]:
        """Tell all about the run status, and give the leaves that were told."""
        told = []
        for connection in self._connections:
            # Who came after the announcement has caught up with it.
            if number <= connection.since or self.deliver(connection, status_message(run_status), _STATUS):
                told.append(connection.leaf_id)
        return told

    def announce_raw(self, text: Text) -> None:
        """Send any text to all; bytes go as a binary frame."""
        for connection in self._connections:
            connection.put(text)

    async def disconnect(self, code: int | None, leaf_id: str | None = None) -> int:
        """Close the WebSockets of all leaves, or of one, with a close code; None resets the connections."""
        chosen = [each for each in self._connections if leaf_id in (None, each.leaf_id)]
        for connection in chosen:
            if code is None:
                connection.drop()
            else:
                await connection.websocket.close(code)
        return len(chosen)
