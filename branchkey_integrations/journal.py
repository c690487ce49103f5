"""Note what a leaf has sent, heard and loaded, so that a killed process goes on without sending or missing a round.

The journal is a file of JSON lines, one a step, each on the disk before the step is taken. It holds ids, digests and
numbers: no weights and no secrets. A line that a crash cut short is dropped when the file is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from branchkey_integrations.errors import ConfigurationError, JournalError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("branchkey_integrations.journal")

_VERSION = 1
_EVENTS = ("begin", "sending", "posted", "sent", "not_sent", "announced", "closed")
_ROUND_FIELDS = ("sent", "upload_id", "digest", "uploaded_bytes", "layout", "aggregation_id")
_open_here: weakref.WeakValueDictionary[str, Journal] = weakref.WeakValueDictionary()
_open_lock = threading.Lock()


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


class Journal:
    """Keep the journal of one leaf in one branch and one run.

    One process at a time may hold it; within a process the newest takes it over, since an interrupted notebook leaves the one
    before behind. What was noted in another run of the branch, or by a leaf of another branch, does
    not count.

    Args:
        folder: where the file ``<leaf_id>.jsonl`` lies or is made.
        leaf_id: id of the leaf.
        branch_id: id of its branch.
        run_number: number of the branch's run; None when it is not known.

    Raises:
        JournalError: the file cannot be opened or read.
        ConfigurationError: another process holds it.
    """

    def __init__(self, folder: str, leaf_id: str, branch_id: str, run_number: int | None) -> None:
        self.path = os.path.join(folder, f"{file_name(leaf_id)}.jsonl")
        self._lock = threading.Lock()
        self._rounds: dict[int, NotedRound] = {}
        self._heard: list[str] = []
        self._newest: int | None = None
        #: Whether what is known is of this leaf, branch and run.
        self.is_current = False
        #: An aggregate that was announced when no round was open.
        self.unread: str | None = None
        self._identity: dict[str, Any] = {"leaf_id": leaf_id, "branch_id": branch_id, "run_number": run_number}
        self._taken_over = False
        self._file = self._open(folder)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    # --- what is known -----------------------------------------------------------------------------------------------

    def get(self, number: int) -> NotedRound | None:
        """Give what is known of a round; None if it was not, or surely not wholly, sent."""
        noted = self._rounds.get(number) if self.is_current else None
        return None if noted is None or noted.sent == "no" else noted

    @property
    def rounds(self) -> list[NotedRound]:
        """All rounds that are known, by their number."""
        return [self._rounds[number] for number in sorted(self._rounds)]

    @property
    def heard(self) -> list[str]:
        """Ids of the aggregates that were announced, oldest first."""
        return list(self._heard)

    def unfinished(self, layout: str) -> NotedRound | None:
        """Give the newest round if it was, or may have been, sent with this layout and was not brought to an end."""
        found = None if self._newest is None or not self.is_current else self._rounds[self._newest]
        return None if found is None or found.sent == "no" or found.closed or found.layout != layout else found

    # --- taking notes ------------------------------------------------------------------------------------------------

    def begin(self, left: NotedRound | None = None, number: int = 0) -> None:
        """Start anew: what was noted so far does not belong to the rounds that follow.

        But for ``left``, which counts as round ``number``; in the same line, so that no kill comes between the two.
        """
        line = {"event": "begin", "version": _VERSION, **self._identity}
        if left is not None:
            line["left"] = {"round": number, **{name: getattr(left, name) for name in _ROUND_FIELDS}}
        self._note(line)

    def follow(self, run_number: int | None) -> None:
        """Start anew if the branch's run is another one by now; None: that is not known."""
        former = self._identity
        if run_number is None or run_number == former["run_number"]:
            return
        self._identity = {**former, "run_number": run_number}
        try:
            self.begin()
        except BaseException:
            self._identity = former
            raise

    def sending(self, number: int, layout: str, digest: str, size_bytes: int) -> None:
        """An archive is about to go out; asked again for each try.

        Raises:
            JournalError: it cannot be noted, so nothing may be sent.
        """
        self._note(
            {"event": "sending", "round": number, "layout": layout, "digest": digest, "uploaded_bytes": size_bytes}
        )

    def posted(self, number: int) -> None:
        """The last byte of the archive is about to go out; from here on the platform may have it."""
        self._note({"event": "posted", "round": number})

    def sent(self, number: int, upload_id: str) -> None:
        """The platform has said that it took the update."""
        self._note_if_possible({"event": "sent", "round": number, "upload_id": upload_id})

    def not_sent(self, number: int) -> None:
        """The platform surely did not take the update."""
        self._note_if_possible({"event": "not_sent", "round": number})

    def announced(self, aggregation_id: str) -> None:
        """An aggregate was announced. Called by the thread that listens, before the broker is told that it arrived."""
        self._note_if_possible({"event": "announced", "aggregation_id": aggregation_id})

    def closed(self, number: int, status: str, aggregation_id: str | None) -> None:
        """A round came to its end: ``applied``, ``rejected``, ``timeout``, ``stopped`` or ``skipped``."""
        self._note_if_possible({"event": "closed", "round": number, "status": status, "aggregation_id": aggregation_id})

    def close(self) -> None:
        """Let go of the file. May be repeated."""
        with self._lock:
            self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def hand_over(self) -> None:
        """Let a newer journal of this process have the file; from now on a step that is to be noted raises."""
        with self._lock:
            self._taken_over = not self._file.closed
            self._file.close()

    # --- the file ----------------------------------------------------------------------------------------------------

    def _open(self, folder: str) -> io.FileIO:
        name = os.path.realpath(self.path)
        held = ConfigurationError(
            what=f"journal {self.path}",
            expected="one process at a time that trains as this leaf",
            found="another one that holds it",
            fix="End the other process, or give this one the credentials of another leaf or another journal folder",
        )
        with _open_lock:
            former = _open_here.pop(name, None)
            if former is not None:
                former.hand_over()
            try:
                os.makedirs(folder, exist_ok=True)
                # Neither truncated nor made anew: it may hold the rounds of a process that was killed.
                file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+")
            except OSError as error:
                raise _unusable(self.path, "be opened", error) from error
            if fcntl is not None:
                try:
                    # Of the process, not of the file handle: a data loader's forked worker does not hold it.
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    file.close()
                    raise held from error
            _open_here[name] = self
        return file

    def _read(self) -> None:
        try:
            data = self._file.readall() or b""
            whole = data[: data.rfind(b"\n") + 1]
            for number, raw in enumerate(whole.splitlines(), start=1):
                self._take(self._parsed(number, raw))
            if len(whole) != len(data):
                logger.warning("journal %s: a line that a crash cut short is dropped", self.path)
                self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise _unusable(self.path, "be read", error) from error

    def _parsed(self, number: int, raw: bytes) -> Mapping[str, Any]:
        try:
            line = json.loads(raw)
            if isinstance(line, dict) and line.get("event") in _EVENTS:
                return line
            found = "something else"
        except ValueError:
            found = "no JSON"
        raise JournalError(
            what=f"journal {self.path}, line {number}",
            expected=f"a JSON object with one of the events {', '.join(_EVENTS)}",
            found=found,
            fix="Move the file away to start without it; rounds that it knew may then be sent again",
        )

    def _note_if_possible(self, line: Mapping[str, Any]) -> None:
        """Note what has happened already; that it cannot be noted is no reason to undo it."""
        try:
            self._note(line)
        except (JournalError, ConfigurationError) as error:
            logger.warning("%s", error)

    def _note(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._taken_over:
                raise ConfigurationError(
                    what=f"journal {self.path}",
                    expected="one training at a time as this leaf",
                    found="a newer one in this process, which took it over",
                    fix="Go on with the newer one, or give it the credentials of another leaf",
                )
            if self._file.closed:
                if line["event"] in ("sending", "posted"):
                    # Sent from here, nobody would know of it after a restart.
                    raise JournalError(
                        what=f"journal {self.path}",
                        expected="an open one while an update is being sent",
                        found="one that was closed meanwhile",
                        fix="Send the update with the next training",
                    )
                return
            start = self._file.tell()
            try:
                if self._file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._file.fileno())
            except OSError as error:
                # Half a line would spoil the next one.
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                    self._file.seek(start)
                raise _unusable(self.path, "be written", error) from error
            self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        event = line["event"]
        if event == "begin":
            self.is_current = {key: line.get(key) for key in self._identity} == self._identity
            self._rounds, self._heard, self._newest, self.unread = {}, [], None, None
            left = line.get("left")
            if isinstance(left, dict) and isinstance(left.get("round"), int):
                self._take_round("left", left["round"], left)
        elif event == "announced":
            self._take_announced(str(line.get("aggregation_id")))
        else:
            number = line.get("round")
            if isinstance(number, int):
                self._take_round(event, number, line)

    def _take_announced(self, aggregation_id: str) -> None:
        self._heard.append(aggregation_id)
        noted = None if self._newest is None else self._rounds[self._newest]
        if noted is None or noted.closed:
            self.unread = aggregation_id
        else:
            self._rounds[noted.round] = replace(noted, aggregation_id=aggregation_id)

    def _take_round(self, event: str, number: int, line: Mapping[str, Any]) -> None:
        noted = self._rounds.get(number) or NotedRound(number)
        known = {key: line[key] for key in _ROUND_FIELDS if key in line}
        if event == "sending":
            noted, self._newest, self.unread = NotedRound(number, sent="no", **known), number, None
        elif event == "left":
            noted, self._newest = NotedRound(number, **known), number
            if noted.aggregation_id is not None:
                self._heard.append(noted.aggregation_id)
        elif event in ("posted", "sent", "not_sent"):
            sent = {"posted": "maybe", "sent": "yes", "not_sent": "no"}[event]
            noted = replace(noted, sent=sent, upload_id=line.get("upload_id"))
        else:
            noted = replace(
                noted, closed=str(line.get("status")), aggregation_id=line.get("aggregation_id") or noted.aggregation_id
            )
            if self.unread == noted.aggregation_id:
                self.unread = None
        self._rounds[number] = noted


def file_name(leaf_id: str) -> str:
    """Give a name that is one file in the folder, whatever the id holds."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", leaf_id)[:64]
    return safe if safe == leaf_id else f"{safe}-{hashlib.sha256(leaf_id.encode()).hexdigest()[:12]}"


def _unusable(path: str, what: str, error: OSError) -> JournalError:
    return JournalError(
        what=f"journal {path}",
        expected=f"a file that can {what}",
        found=error.strerror or type(error).__name__,
        fix="Make room or give write permission, or choose another folder with journal=",
    )
