"""Faults of requests: refused, answered to nobody, broken off, changed on the wire."""

from __future__ import annotations

from dataclasses import replace

from branchkey_integrations.sandbox.answer import Answer
from branchkey_integrations.sandbox.chaos import Dice
from branchkey_integrations.sandbox.intercept import Call, Interceptions
from branchkey_integrations.sandbox.roster import Roster

_API_ROUTES = ("run", "upload", "download", "metrics", "config", "ticket")
#: These change something, so only a status by which the server says that it did nothing leaves no doubt.
_CHANGING = ("upload", "metrics")
_NOT_TAKEN = (503, 429, 408, 425)
_ANY = (503, 502, 500, 504, 429, 408)
_OBJECT = (503, 500, 403)
#: What stands in place of the answer to an upload that was taken; 0 is a reset.
_NO_ANSWER = (502, 0, 500, 504)
_TAKEN = 201
#: Whichever field of an archive these bytes fall into, one that counts is among them.
_CHANGED_BYTES = 16
_PAGE = b"<html><body><h1>Bad gateway</h1></body></html>"


class HttpFaults:
    """Stand between requests and answers, innermost, so that a script's own handlers see what a leaf would see."""

    def __init__(self, dice: Dice, roster: Roster) -> None:
        self._dice = dice
        self._roster = roster

    def install(self, interceptions: Interceptions) -> None:
        """Take the place on all routes but the WebSocket's, whose faults are those of its notifications."""
        for route in _API_ROUTES:
            interceptions.add(route, self.api_call)
        interceptions.add("object", self.object)

    def api_call(self, call: Call) -> Answer | None:
        """Answer a call of the API, or do not."""
        who = self._who(call)
        how = self._dice.throw("refused", who)
        if how is not None:
            status = _pick(_NOT_TAKEN if call.route in _CHANGING else _ANY, how)
            return Answer.error(status, "chaos: not now", {"Retry-After": "0"})
        answer = call.proceed()
        if answer is None:
            return None
        if call.route == "upload" and answer.status == _TAKEN:
            how = self._dice.throw("unanswered", who)
            if how is not None:
                status = _pick(_NO_ANSWER, how)
                return Answer.cut() if status == 0 else Answer(status, _PAGE, "text/html")
        how = self._dice.throw("cut_answers", who)
        return answer if how is None else _cut(answer, how)

    def object(self, call: Call) -> Answer | None:
        """Hand out an aggregate, or less than that. Who asks is not known: links carry no name."""
        how = self._dice.throw("refused")
        if how is not None:
            return Answer.xml(_pick(_OBJECT, how), "SlowDown", "chaos: not now")
        answer = call.proceed()
        if answer is None or answer.status != 200:
            return answer
        how = self._dice.throw("cut_downloads")
        if how is not None:
            return _cut(answer, how)
        how = self._dice.throw("corrupt")
        return answer if how is None else replace(answer, body=_changed(answer.read(), how))

    def _who(self, call: Call) -> str:
        leaf = self._roster.authenticate(call.headers.get("authorization"))
        return "" if leaf is None else self._roster.place_of(leaf.id)


def _pick(choices: tuple[int, ...], how: float) -> int:
    return choices[int(how * len(choices))]


def _cut(answer: Answer, how: float) -> Answer:
    return replace(answer, cut_after_bytes=int(how * answer.size_bytes))


def _changed(content: bytes, how: float) -> bytes:
    start = int(how * max(1, len(content) - _CHANGED_BYTES))
    piece = bytes(byte ^ 0xFF for byte in content[start : start + _CHANGED_BYTES])
    return content[:start] + piece + content[start + len(piece) :]
