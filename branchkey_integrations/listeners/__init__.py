"""Notification channels: AMQP and WebSocket behind one interface.

A listener owns one thread. It hands every well-formed notification to ``on_event`` in that thread, comes back by itself
after an outage, and tells ``on_failure`` when it is refused for long (an error) and when it is well again (None).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from branchkey_integrations.redaction import Secret

__all__ = ["Listener", "Ticket"]


@dataclass(frozen=True)
class Ticket:
    """Permit one WebSocket connection; both ids come from ``POST /api/v1/ws/ticket``."""

    ticket_id: str = field(repr=False)
    request_id: str

    def __post_init__(self) -> None:
        # Whoever holds both can listen in the leaf's place, until they are used.
        object.__setattr__(self, "ticket_id", Secret(self.ticket_id))


class Listener(Protocol):
    """What both channels offer; ``name`` is ``"amqp"`` or ``"websocket"``."""

    name: str

    def start(self, timeout_s: float) -> None:
        """Begin to listen; returns when what lay there was delivered, or raises and leaves nothing running."""

    def close(self) -> None:
        """Stop within 2 seconds in every state. May be called twice, and from any thread."""

    @property
    def alive(self) -> bool:
        """Whether the listener is at work: listening, or on its way back after an outage."""
