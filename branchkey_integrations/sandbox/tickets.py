"""Permissions that run out: tickets for one WebSocket connection, signed links to stored objects."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

GOOD, DENIED, EXPIRED = "good", "denied", "expired"
_MOST_TICKETS = 10_000


@dataclass(frozen=True)
class IssuedTicket:
    """Allow ``leaf_id`` one WebSocket connection; both ids are URL-safe, since clients do not quote them."""

    leaf_id: str = field(repr=False)
    ticket_id: str = field(repr=False)
    request_id: str
    expires_at: float


class TicketOffice:
    """Issue tickets and take each back once.

    Args:
        lifetime_s: seconds until an unused ticket is worthless.
        clock: seconds since the epoch.
    """

    def __init__(self, lifetime_s: float, clock: Callable[[], float] = time.time) -> None:
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._lock = threading.Lock()
        self._issued: dict[str, IssuedTicket] = {}

    def issue(self, leaf_id: str) -> IssuedTicket:
        """Give out a new ticket."""
        now = self._clock()
        ticket = IssuedTicket(leaf_id, secrets.token_urlsafe(24), secrets.token_hex(16), now + self._lifetime_s)
        with self._lock:
            self._issued = {key: old for key, old in self._issued.items() if old.expires_at > now}
            # A client that collects tickets without using them must not fill the memory; the oldest go first.
            for key in list(self._issued)[: max(0, len(self._issued) - _MOST_TICKETS + 1)]:
                del self._issued[key]
            self._issued[ticket.ticket_id] = ticket
        return ticket

    def redeem(self, ticket_id: str, request_id: str) -> str | None:
        """Take a ticket back and give its leaf; None when it is unknown, used, expired or of another request."""
        with self._lock:
            ticket = self._issued.pop(ticket_id, None)
        if ticket is None or ticket.expires_at <= self._clock():
            return None
        same = hmac.compare_digest(ticket.request_id.encode(), request_id.encode("utf-8", "surrogatepass"))
        return ticket.leaf_id if same else None


class LinkSigner:
    """Sign links to stored objects, so that who has one needs no other permission, for a while.

    Args:
        lifetime_s: seconds until a link is worthless.
        clock: seconds since the epoch.
    """

    def __init__(self, lifetime_s: float, clock: Callable[[], float] = time.time) -> None:
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._key = secrets.token_bytes(32)

    def query(self, object_id: str) -> str:
        """Give the query part of a link to ``object_id`` that is good from now on."""
        expires = repr(self._clock() + self._lifetime_s)
        return f"expires={expires}&signature={self._signature(object_id, expires)}"

    def check(self, object_id: str, expires: str, signature: str) -> str:
        """Tell whether a link is ``good``, ``denied`` (not signed here) or ``expired``."""
        if not hmac.compare_digest(self._signature(object_id, expires).encode(), signature.encode("utf-8", "replace")):
            return DENIED
        # The signature covers the time, so only a number that this object wrote itself gets here.
        return GOOD if float(expires) > self._clock() else EXPIRED

    def _signature(self, object_id: str, expires: str) -> str:
        text = f"{object_id}\n{expires}".encode("utf-8", "replace")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()
