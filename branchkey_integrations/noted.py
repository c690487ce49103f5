"""What the lines of a journal say: which rounds were sent, what became of them, and which aggregates were heard of.

Bounded, however long a training goes on: what was noted of the newest thousand rounds is known in full, and of older ones
only that there is nothing to send any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

EVENTS = ("begin", "sending", "posted", "sent", "not_sent", "announced", "closed", "kept", "state")
#: Rounds that are known in full. A checkpoint older than that finds its next rounds named as forgotten, and sends none twice.
KEPT_ROUNDS = 1000
#: Aggregates that are known as heard of. One that is announced once more after so many newer ones would have to have
#: waited in a broker through all of them, which hands out what it holds in order and at each new connection.
KEPT_IDS = 4096
#: How a round is closed that is known by its number alone.
FORGOTTEN = "forgotten"
VERSION = 1

_ROUND_FIELDS = ("sent", "upload_id", "digest", "uploaded_bytes", "layout", "aggregation_id")


@dataclass(frozen=True)
class NotedRound:
    """What the journal knows of one round.

    ``sent`` is ``"yes"``, ``"maybe"`` (every byte went out, no answer is known) or ``"no"``. ``aggregation_id`` is the
    newest aggregate that was announced after it; ``closed`` is how the round was brought to its end, empty while it is open.
    """

    round: int
    sent: str = "no"
    upload_id: str | None = None
    digest: str = ""
    uploaded_bytes: int = 0
    layout: str = ""
    aggregation_id: str | None = None
    closed: str = ""


def left_over(noted: NotedRound, number: int) -> dict[str, Any]:
    """Give what a ``begin`` line says of a round that the training before left open, as round ``number`` of the new one."""
    return {"round": number, **{name: getattr(noted, name) for name in _ROUND_FIELDS}}


class Noted:
    """Take in a journal's lines, one after the other.

    Args:
        identity: leaf, branch and run; lines of another one do not count.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        #: Whether what is known is of this leaf, branch and run.
        self.is_current = False
        #: An aggregate that was announced when no round was open.
        self.unread: str | None = None
        self._layout = ""
        self._forget()

    def _forget(self) -> None:
        self.rounds: dict[int, NotedRound] = {}
        self.heard: deque[str] = deque(maxlen=KEPT_IDS)
        self.newest: int | None = None
        self.unread = None
        # Rounds up to this number, if they are not in ``rounds``, are known by their number alone.
        self.forgotten = 0

    def get(self, number: int) -> NotedRound | None:
        """Give what is known of a round; None if it was not, or surely not wholly, sent."""
        if not self.is_current:
            return None
        noted = self.rounds.get(number)
        if noted is None:
            return NotedRound(number, sent="yes", closed=FORGOTTEN) if 0 < number <= self.forgotten else None
        return None if noted.sent == "no" else noted

    def unfinished(self, layout: str) -> NotedRound | None:
        """Give the newest round if it was, or may have been, sent with this layout and was not brought to an end."""
        found = None if self.newest is None or not self.is_current else self.rounds[self.newest]
        return None if found is None or found.sent == "no" or found.closed or found.layout != layout else found

    # --- lines ---------------------------------------------------------------------------------------------------------

    def take(self, line: Mapping[str, Any]) -> None:
        """Take in a line; it is one of :data:`EVENTS`."""
        event = line["event"]
        if event == "begin":
            self.is_current = {key: line.get(key) for key in self.identity} == self.identity
            self._forget()
            left = line.get("left")
            if isinstance(left, dict) and isinstance(left.get("round"), int):
                self._take_round("left", left["round"], left)
        elif event == "announced":
            self._take_announced(str(line.get("aggregation_id")))
        elif event == "state":
            self.heard.extend(map(str, line.get("heard") or ()))
            self.newest = line.get("newest") if line.get("newest") in self.rounds else None
            self.unread, self.forgotten = line.get("unread"), int(line.get("forgotten") or 0)
        else:
            number = line.get("round")
            if isinstance(number, int):
                self._take_round(event, number, line)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Give lines that say all that is known, and no more."""
        yield {"event": "begin", "version": VERSION, **self.identity}
        for number in sorted(self.rounds):
            yield {"event": "kept", **asdict(self.rounds[number])}
        yield {
            "event": "state",
            "newest": self.newest,
            "unread": self.unread,
            "forgotten": self.forgotten,
            "heard": list(self.heard),
        }

    def _take_announced(self, aggregation_id: str) -> None:
        self.heard.append(aggregation_id)
        noted = None if self.newest is None else self.rounds[self.newest]
        if noted is None or noted.closed:
            self.unread = aggregation_id
        else:
            self.rounds[noted.round] = replace(noted, aggregation_id=aggregation_id)

    def _take_round(self, event: str, number: int, line: Mapping[str, Any]) -> None:
        noted = self.rounds.get(number) or NotedRound(number)
        known = {key: line[key] for key in _ROUND_FIELDS if key in line}
        if known.get("layout") == self._layout:
            # The same text for all rounds, and not a copy for each.
            known["layout"] = self._layout
        self._layout = known.get("layout", self._layout)
        if event == "sending":
            noted, self.newest, self.unread = NotedRound(number, sent="no", **known), number, None
        elif event == "left":
            noted, self.newest = NotedRound(number, **known), number
            if noted.aggregation_id is not None:
                self.heard.append(noted.aggregation_id)
        elif event == "kept":
            noted = NotedRound(number, **known, closed=str(line.get("closed") or ""))
        elif event in ("posted", "sent", "not_sent"):
            sent = {"posted": "maybe", "sent": "yes", "not_sent": "no"}[event]
            noted = replace(noted, sent=sent, upload_id=line.get("upload_id"))
        else:
            noted = replace(
                noted, closed=str(line.get("status")), aggregation_id=line.get("aggregation_id") or noted.aggregation_id
            )
            if self.unread == noted.aggregation_id:
                self.unread = None
        self.rounds[number] = noted
        while len(self.rounds) > KEPT_ROUNDS:
            # The newest one may have a low number, after a return to an old checkpoint.
            oldest = min(other for other in self.rounds if other != self.newest)
            del self.rounds[oldest]
            self.forgotten = max(self.forgotten, oldest)
