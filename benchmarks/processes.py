"""The processes of a measurement: the sink, and one leaf at a time; nothing of them runs on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environments import REPOSITORY

CREDENTIALS = {
    "id": "00000000-0000-4000-8000-000000000001",
    "name": "bench",
    "session_token": "no-secret",
    "tree_id": "00000000-0000-4000-8000-000000000002",
    "branch_id": "00000000-0000-4000-8000-000000000003",
    "owner_id": "00000000-0000-4000-8000-000000000004",
}
#: Longest answer waited for; a round of the largest model takes the official client a minute and a half.
_ANSWER_S = 900.0


class Lines:
    """Talk to a process in lines of JSON, with a deadline for each answer."""

    def __init__(self, command: list[str], folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        kept.update(OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), PYTHONDONTWRITEBYTECODE="1", no_proxy="*")
        folder.mkdir(parents=True, exist_ok=True)
        self._errors = open(folder / "errors.txt", "w+")  # noqa: SIM115 - close() closes it
        self._rest = b""
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )

    def tell(self, value: object) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says why
            self.process.stdin.write(json.dumps(value).encode() + b"\n")

    def line(self, timeout_s: float = _ANSWER_S) -> Any:
        """Wait for the next line.

        Raises:
            RuntimeError: the process ended, or said nothing in time; with what it wrote to standard error.
        """
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                piece = b""
                if selector.select(max(0.0, deadline - time.monotonic())):
                    piece = os.read(self.process.stdout.fileno(), 65536)
                if not piece:
                    self._errors.seek(0)
                    raise RuntimeError(f"{self.process.args} gave no answer\n{self._errors.read()[-4000:]}")
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def ask(self, **order: Any) -> Any:
        """Send an order and wait for the answer."""
        self.tell(order)
        return self.line()

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._errors.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """Run the sink in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._lines = Lines([sys.executable, str(REPOSITORY / "benchmarks" / "sink.py")], folder)
        self.url = f"http://127.0.0.1:{self._lines.line(60)}"

    def set(self, **values: Any) -> dict[str, Any]:
        """Change what it does: ``rate`` (bit/s), ``keep`` (a path, or "" for nothing), ``objects`` (path by id)."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/control", json.dumps(values).encode(), 60) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found

    def close(self) -> None:
        """End it."""
        self._lines.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def leaf(kind: str, python: Path, task: dict[str, Any], folder: Path) -> Iterator[Lines]:
    """Start a leaf, ``official`` or ``ours``; it has a warm-up round of a small model behind it when it answers first."""
    command = [str(python), str(REPOSITORY / "benchmarks" / f"leaf_{kind}.py")]
    with Lines(command, folder) as lines:
        lines.tell({"credentials": CREDENTIALS, "folder": str(folder / "files"), **task})
        yield lines
