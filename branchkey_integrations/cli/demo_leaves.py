"""The demo's child processes: each runs the example script in a session of its own, and none outlives the demo."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from branchkey_integrations.cli.interrupts import Interrupts
from branchkey_integrations.errors import BranchKeyError

_TERM_GRACE_S = 2.0


class LeafProcess:
    """Run one training script and read what it reports.

    Args:
        name: how the user knows it.
        command: script and arguments, without the interpreter.
        report: where the script appends its JSON lines.
        log: where its output goes.
    """

    def __init__(self, name: str, command: Sequence[str], report: str, log: str) -> None:
        self.name = name
        self.ended = False
        self.log = log
        self._command = [*command, "--report", report]
        self._report = report
        self._position = 0
        self._process: subprocess.Popen[bytes] | None = None
        with open(log, "w", encoding="utf-8"):
            pass  # an earlier demo's log would be taken for this one's

    @property
    def pid(self) -> int:
        """Process id, 0 before the start."""
        return self._process.pid if self._process is not None else 0

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self, interrupts: Interrupts, *more: str) -> None:
        """Start the script, or start it again; ``more`` are further arguments."""
        # One thread each: with more, small models on a shared machine take up to a hundred times longer, at random.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with interrupts.held(), open(self.log, "ab") as log:
            # In its own session a leaf does not get the terminal's Ctrl-C: the demo ends it, and in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
                [sys.executable, *self._command, *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def new_records(self) -> list[dict[str, Any]]:
        """Read what was reported since the last call; a line that is not finished waits."""
        try:
            with open(self._report, "rb") as file:
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        records = []
        for line in whole.splitlines():
            # A leaf that was killed while it wrote leaves half a line, which its successor ends.
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        self.ended = self.ended or any(record.get("event") == "end" for record in records)
        return records

    def last_words(self) -> str:
        """Give the last line of its log."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
        return lines[-1] if lines else "no word in its log"

    def require_no_error(self) -> None:
        """Demand that it did not end by itself before its time; being killed is another matter.

        Raises:
            BranchKeyError: it did; gives the last line of its log.
        """
        if not self.ended and (self.returncode or 0) >= 0 and self.returncode is not None:
            raise BranchKeyError(
                what=self.name,
                expected="training to the end",
                found=f"exit status {self.returncode}: {self.last_words()}",
                fix=f"See {self.log}",
            )

    def signal(self, number: int) -> None:
        """Send a signal to its whole session."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False when it still runs."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        return self._process is None or self._process.poll() is not None


def end_all(leaves: Iterable[LeafProcess]) -> None:
    """End the processes that still run: first asked, two seconds later without asking."""
    running = [leaf for leaf in leaves if leaf.pid and leaf.returncode is None]
    for number, grace_s in ((signal.SIGTERM, _TERM_GRACE_S), (signal.SIGKILL, _TERM_GRACE_S)):
        for leaf in running:
            leaf.signal(number)
        deadline = time.monotonic() + grace_s
        running = [leaf for leaf in running if not leaf.wait(max(0.0, deadline - time.monotonic()))]
