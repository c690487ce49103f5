"""Faults of notifications, of aggregates, and of the broker that carries the former."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np

from branchkey_integrations.sandbox.chaos import Dice
from branchkey_integrations.sandbox.hub import Connection, Text
from branchkey_integrations.sandbox.roster import Roster

_log = logging.getLogger("branchkey_integrations.sandbox")
_BROKER = "broker"

Array = np.ndarray[Any, Any]
Send = Callable[[Text], None]


class Courier:
    """Carry notifications badly. All methods are for the server's event loop only."""

    def __init__(self, dice: Dice, roster: Roster) -> None:
        self._dice = dice
        self._roster = roster
        self._held: dict[object, tuple[Send, Text]] = {}

    def deliver(self, connection: Connection, text: Text, kind: str) -> bool:
        """Pass a notification on to one WebSocket; tells whether it is certain that the leaf gets it.

        What is not certain comes again when the leaf connects anew.
        """
        who = self._roster.place_of(connection.leaf_id)

        def send() -> bool:
            if self._dice.throw("lost", who) is not None:
                connection.drop()
                return False
            if self._meddle(connection, connection.put, text, who):
                return False
            connection.put(text, kind)
            return True

        return self._overtaking(connection, send)

    def publish(self, send: Send, text: Text) -> None:
        """Pass a notification on to the broker, which hands it to all leaves."""

        def now() -> bool:
            if not self._meddle(_BROKER, send, text, _BROKER):
                send(text)
            return True

        self._overtaking(_BROKER, now)

    def _overtaking(self, way: object, send: Callable[[], bool]) -> bool:
        held = self._held.pop(way, None)
        sent = send()
        if held is not None:
            held[0](held[1])
        return sent

    def _meddle(self, way: object, send: Send, text: Text, who: str) -> bool:
        """Send a notification once more, late or not yet; tells whether it is seen to."""
        loop, longest = asyncio.get_running_loop(), self._dice.chaos.delay_s
        how = self._dice.throw("duplicated", who)
        if how is not None:
            loop.call_later(how * longest, send, text)
        if self._dice.throw("reordered", who) is not None:
            mine = self._held[way] = (send, text)
            loop.call_later(longest, self._release, way, mine)
            return True
        how = self._dice.throw("delayed", who)
        if how is not None:
            loop.call_later(how * longest, send, text)
        return how is not None

    def _release(self, way: object, mine: tuple[Send, Text]) -> None:
        # A leaf that waits for this very notification would hold up the one that could overtake it.
        if self._held.get(way) is mine:
            del self._held[way]
            mine[0](mine[1])


class Poisoned(Sequence[Array]):
    """Give the layers of another sequence, and in one of them a NaN.

    Args:
        layers: the sound ones.
        choices: positions of the layers that can hold a NaN and are not empty; at least one.
        how: a number from 0 to 1 that says where the NaN goes.
    """

    def __init__(self, layers: Sequence[Array], choices: Sequence[int], how: float) -> None:
        self._layers = layers
        self._where = choices[int(how * len(choices))]
        self._how = how

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        layer = self._layers[index]
        if index == self._where:
            layer = np.array(layer)
            layer.reshape(-1)[int(self._how * layer.size)] = np.nan
        return layer


class BrokerKiller:
    """Kill the private broker behind a notification, and bring it back with its leaves.

    Args:
        restart: kills the broker, starts it again and makes good what a young broker has not written to disk; may take
            seconds.
    """

    def __init__(self, dice: Dice, restart: Callable[[], None]) -> None:
        self._dice = dice
        self._restart = restart
        # One thread: a second kill waits until the first is over.
        self._thread = ThreadPoolExecutor(1, "branchkey-sandbox-chaos")

    def after_notification(self) -> None:
        """Kill the broker now and then; returns at once."""
        if self._dice.throw("broker_kills") is not None:
            self._thread.submit(self._kill)

    def _kill(self) -> None:
        try:
            self._restart()
        except Exception:  # noqa: BLE001 - in a thread of its own; logged with its traceback
            _log.exception("The broker was killed on purpose and did not come back")

    def close(self) -> None:
        """Wait until the broker is up again (seconds), and kill it no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)
