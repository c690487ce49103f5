"""Run the command line as a process of its own, wait for its words, and look for what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class Command:
    """A running ``python -m branchkey_integrations …`` in a session of its own."""

    def __init__(self, words: Sequence[object], folder: Path, **environment: str) -> None:
        self._mark = f"test-{os.getpid()}-{time.monotonic_ns()}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BRANCHKEY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "branchkey_integrations", *map(str, words)],
            cwd=folder,
            # Whatever it starts inherits the mark, and can be found by it whatever session or parent it has.
            env={**inherited, "PYTHONPATH": str(REPOSITORY), "CLI_TEST_MARK": self._mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=pair)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any, lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                with self._changed:
                    lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, text: str, timeout_s: float = 60.0) -> str:
        """Wait for a line of standard output that holds ``text``, and give it."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = next((line for line in self.out if text in line), None)
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or not any(reader.is_alive() for reader in self._readers):
                    raise AssertionError(f"no {text!r} in:\n{self.everything}")
                self._changed.wait(min(left, 0.5))

    def finish(self, timeout_s: float = 100.0) -> int:
        """Wait for its end and give its exit status."""
        status = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return status

    @property
    def everything(self) -> str:
        """All that it has printed."""
        return "\n".join([*self.out, "--- stderr", *self.err])

    def left_running(self, timeout_s: float = 5.0) -> list[int]:
        """Give the processes that it started and that are still there; waits a moment for them to go."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [pid for pid in self._marked() if pid != self.process.pid]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def _marked(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._mark.encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
        return found

    def clean_up(self) -> None:
        """Kill whatever is left."""
        for pid in self._marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.finish()


@contextlib.contextmanager
def running(words: Sequence[object], folder: Path, **environment: str) -> Iterator[Command]:
    """Run a command for the length of the block; kills what is left after it."""
    command = Command(words, folder, **environment)
    try:
        yield command
    finally:
        command.clean_up()
