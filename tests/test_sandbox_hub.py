"""The outbox of each WebSocket: the newest of each kind, in the order of its coming, and nothing twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from branchkey_integrations.sandbox.hub import Connection, Hub


class Socket:
    """A WebSocket that writes down what is sent, and takes nothing before it is let."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.open = asyncio.Event()

    async def send_text(self, text: str) -> None:
        await self.open.wait()
        self.sent.append(text)

    send_bytes = send_text  # type: ignore[assignment]


def sent_after(fill: Callable[[Hub, Connection], None]) -> list[Any]:
    """Let ``fill`` queue things for a leaf that takes nothing yet, then let it read, and give what it read."""

    async def scene() -> list[Any]:
        hub, socket = Hub(), Socket()
        connection = Connection("leaf", socket)  # type: ignore[arg-type]
        hub.add(connection)
        sending = asyncio.ensure_future(connection.send_for_ever())
        fill(hub, connection)
        socket.open.set()
        for _ in range(50):
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return [next(iter(json.loads(text)["body"].values())) if "body" in str(text) else text for text in socket.sent]

    return asyncio.run(scene())


def test_a_slow_leaf_hears_the_newest_aggregate_and_the_newest_status_only() -> None:
    def fill(hub: Hub, connection: Connection) -> None:
        for number in range(1, 1001):
            hub.announce_aggregate(f"a{number}", number)
            hub.announce_status("pause" if number % 2 else "start", number)

    assert sent_after(fill) == ["a1000", "start"]


def test_what_is_newest_stands_where_it_came() -> None:
    def fill(hub: Hub, connection: Connection) -> None:
        hub.announce_status("pause", 1)
        hub.announce_aggregate("a1", 2)
        hub.announce_raw("raw")
        hub.announce_status("start", 3)

    assert sent_after(fill) == ["a1", "raw", "start"]


def test_what_a_leaf_caught_up_with_is_not_announced_to_it_again() -> None:
    def fill(hub: Hub, connection: Connection) -> None:
        connection.catch_up("pause", "a7", 7)
        hub.announce_raw("between")
        hub.announce_status("pause", 6)
        hub.announce_aggregate("a7", 7)

    assert sent_after(fill) == ["pause", "a7", "between"]


def test_what_comes_after_the_catching_up_is_announced() -> None:
    def fill(hub: Hub, connection: Connection) -> None:
        connection.catch_up(None, "a7", 7)
        hub.announce_raw("between")
        hub.announce_aggregate("a8", 8)

    assert sent_after(fill) == ["between", "a8"]


def test_the_same_aggregate_can_be_announced_again() -> None:
    def fill(hub: Hub, connection: Connection) -> None:
        connection.catch_up(None, "a7", 7)
        hub.announce_raw("between")
        hub.announce_aggregate("a7", 8)

    assert sent_after(fill) == ["between", "a7"]


def test_raw_texts_for_a_leaf_that_never_reads_are_bounded_and_the_newest_stay(monkeypatch) -> None:
    monkeypatch.setattr("branchkey_integrations.sandbox.hub._MOST_RAW", 3)

    def fill(hub: Hub, connection: Connection) -> None:
        for number in range(10):
            hub.announce_raw(str(number))

    assert sent_after(fill) == ["7", "8", "9"]
