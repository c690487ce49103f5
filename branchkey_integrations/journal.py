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
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from branchkey_integrations import journal_lock, parts
from branchkey_integrations.errors import ConfigurationError, JournalError
from branchkey_integrations.noted import EVENTS, VERSION, Noted, NotedRound, left_over

logger = logging.getLogger("branchkey_integrations.journal")

#: A file of more lines is written anew without what does not count any more; a round makes about five.
MOST_LINES = 10_000
#: How long a journal that another process holds is waited for, and how often it is asked for, in seconds.
PATIENCE_S, _AGAIN_S = 30.0, 0.25


class Journal:
    """Keep the journal of one leaf in one branch and one run.

    One process at a time may hold it; within a process the newest takes it over, since an interrupted notebook leaves the one
    before behind, and the former is told so at its next step. What was noted in another run of the branch, or by a leaf of
    another branch, does not count.

    The file holds the newest training's rounds: it starts anew with each beginning, and of a very long training it drops
    what is over. It stays when a training ends, since a checkpoint may be resumed; when none will be, it may be deleted.

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
        self._lock_path = os.path.join(folder, f"{file_name(leaf_id)}.lock")
        self._lock = threading.Lock()
        self._noted = Noted({"leaf_id": leaf_id, "branch_id": branch_id, "run_number": run_number})
        self._lines = 0
        self._most_lines = MOST_LINES
        self._taken_over = False
        until, told = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                with journal_lock.alone():
                    self._file = self._open(folder)
                    try:
                        self._read()
                    except BaseException:
                        self.close()
                        raise
                return
            except journal_lock.HeldElsewhereError as error:
                # A job that is started again may meet the one before, which is still ending.
                if time.monotonic() > until:
                    raise _held_elsewhere(self.path) from error
                if not told:
                    told = True
                    logger.warning("journal %s: another process holds it; waiting %g s for it", self.path, PATIENCE_S)
                time.sleep(_AGAIN_S)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Whether what is known is of this leaf, branch and run."""
        return self._noted.is_current

    @property
    def unread(self) -> str | None:
        """An aggregate that was announced when no round was open."""
        return self._noted.unread

    def get(self, number: int) -> NotedRound | None:
        """Give what is known of a round; None if it was not, or surely not wholly, sent."""
        return self._noted.get(number)

    @property
    def rounds(self) -> list[NotedRound]:
        """The newest thousand rounds that are known, by their number."""
        return [self._noted.rounds[number] for number in sorted(self._noted.rounds)]

    @property
    def heard(self) -> list[str]:
        """Ids of the newest aggregates that were announced, oldest first."""
        return list(self._noted.heard)

    def unfinished(self, layout: str) -> NotedRound | None:
        """Give the newest round if it was, or may have been, sent with this layout and was not brought to an end."""
        return self._noted.unfinished(layout)

    # --- taking notes ------------------------------------------------------------------------------------------------

    def begin(self, left: NotedRound | None = None, number: int = 0) -> None:
        """Start anew: what was noted so far does not belong to the rounds that follow, and leaves the file.

        But for ``left``, which counts as round ``number``; in the same step, so that no kill comes between the two.

        Raises:
            JournalError: it cannot be noted; the file says what it said before.
        """
        line: dict[str, Any] = {"event": "begin", "version": VERSION, **self._noted.identity}
        if left is not None:
            line["left"] = left_over(left, number)
        with self._lock:
            if self._writes(line):
                self._write_anew([line])
                self._noted.take(line)

    def follow(self, run_number: int | None) -> None:
        """Start anew if the branch's run is another one by now; None: that is not known."""
        former = self._noted.identity
        if run_number is None or run_number == former["run_number"]:
            return
        self._noted.identity = {**former, "run_number": run_number}
        try:
            self.begin()
        except BaseException:
            self._noted.identity = former
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
        try:
            with self._lock:
                self._file.close()
        finally:
            journal_lock.release(self._lock_path, self)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            # The collector may run while this thread or another one is in the middle of a step.
            self._file.close()
            journal_lock.release(self._lock_path, self, at_once=True)

    def hand_over(self) -> None:
        """Let a newer journal of this process have the file; from now on a step that is to be noted raises."""
        with self._lock:
            self._taken_over = True
            self._file.close()

    # --- the file ----------------------------------------------------------------------------------------------------

    def _open(self, folder: str) -> io.FileIO:
        try:
            os.makedirs(folder, exist_ok=True)
            if not journal_lock.take(self._lock_path, self):
                logger.warning(
                    "journal %s: its file system has no locks; see to it that one process trains as this leaf",
                    self.path,
                )
            try:
                # Neither truncated nor made anew: it may hold the rounds of a process that was killed.
                file = _opened(self.path)
                _keep_entry(folder)
                parts.sweep(folder)
                return file
            except BaseException:
                journal_lock.release(self._lock_path, self)
                raise
        except OSError as error:
            raise _unusable(self.path, "be opened", error) from error

    def _read(self) -> None:
        try:
            data = self._file.readall() or b""
            whole = data[: data.rfind(b"\n") + 1]
            for number, raw in enumerate(whole.splitlines(), start=1):
                self._take_in(number, raw)
                self._lines = number
            if len(whole) != len(data):
                logger.warning("journal %s: a line that a crash cut short is dropped", self.path)
                self._file.truncate(len(whole))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise _unusable(self.path, "be read", error) from error

    def _take_in(self, number: int, raw: bytes) -> None:
        found = "no JSON"
        try:
            line = json.loads(raw)
            found = "something else"
            if isinstance(line, dict) and line.get("event") in EVENTS:
                self._noted.take(line)
                return
        except (ValueError, TypeError, RecursionError):
            # What a line says may also be of the wrong kind, after somebody changed it.
            pass
        raise JournalError(
            what=f"journal {self.path}, line {number}",
            expected=f"a JSON object with one of the events {', '.join(EVENTS)}",
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
        with self._lock:
            if not self._writes(line):
                return
            data = _encoded([line])
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
            self._noted.take(line)
            self._lines += 1
            if self._lines > self._most_lines:
                self._compact()

    def _writes(self, line: Mapping[str, Any]) -> bool:
        """Tell whether lines are still written; what must be known after a restart is not left out in silence."""
        if self._taken_over:
            raise ConfigurationError(
                what=f"journal {self.path}",
                expected="one training at a time as this leaf",
                found="a newer one in this process, which took it over",
                fix="Go on with the newer one, or give it the credentials of another leaf",
            )
        if self._file.closed and line["event"] in ("sending", "posted"):
            raise JournalError(
                what=f"journal {self.path}",
                expected="an open one while an update is being sent",
                found="one that was closed meanwhile",
                fix="Send the update with the next training",
            )
        return not self._file.closed

    def _compact(self) -> None:
        try:
            self._write_anew(self._noted.lines())
        except JournalError as error:
            # It goes on growing, which harms less than to stop noting.
            logger.warning("%s", error)
        self._most_lines = self._lines + MOST_LINES

    def _write_anew(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Put ``lines`` in the place of all that the file holds, at one stroke."""
        found = list(lines)
        try:
            try:
                with parts.replacing(self.path, durable=True) as file:
                    file.write(_encoded(found))
                    # Windows replaces no file that is open.
                    self._file.close()
            finally:
                if self._file.closed:
                    self._file = _opened(self.path)
                    self._file.seek(0, os.SEEK_END)
            _keep_entry(os.path.dirname(self.path))
            self._lines = len(found)
        except OSError as error:
            raise _unusable(self.path, "be written", error) from error


def file_name(leaf_id: str) -> str:
    """Give a name that is one file in the folder, whatever the id holds."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", leaf_id)[:64]
    return safe if safe == leaf_id else f"{safe}-{hashlib.sha256(leaf_id.encode()).hexdigest()[:12]}"


def _opened(path: str) -> io.FileIO:
    return io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+")


def _encoded(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


def _keep_entry(folder: str) -> None:
    """Put a file's name on the disk too, where folders can be synced: a file without a name does not outlive a power cut."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder or os.curdir, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _held_elsewhere(path: str) -> ConfigurationError:
    return ConfigurationError(
        what=f"journal {path}",
        expected="one process at a time that trains as this leaf",
        found="another one that holds it",
        fix="End the other process, or give this one the credentials of another leaf or another journal folder",
    )


def _unusable(path: str, what: str, error: OSError) -> JournalError:
    return JournalError(
        what=f"journal {path}",
        expected=f"a file that can {what}",
        found=error.strerror or type(error).__name__,
        fix="Make room or give write permission, or choose another folder with journal=",
    )
