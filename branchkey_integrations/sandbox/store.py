"""The sandbox's files: uploads, aggregates, metrics, the state, and one credentials file a leaf.

<directory>/state.json            leaves with their tokens, run, open round; mode 0600, replaced atomically
<directory>/leaf-<i>.json         credentials of leaf i, counted from 0; mode 0600
<directory>/uploads/<id>.npz      what a leaf sent, beside <id>.json, which says who, when and with what metadata
<directory>/aggregates/<id>.npz   what the leaves can download
<directory>/metrics.jsonl         a line for each report of metrics
<directory>/incoming/             uploads on their way in; emptied at every start
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np

from branchkey_integrations.archive import write_archive
from branchkey_integrations.archive_pack import ZipWriter
from branchkey_integrations.archive_zip import DEFLATED
from branchkey_integrations.errors import SandboxError

STATE_VERSION = 1


class Store:
    """Hold the files under one directory, for one sandbox at a time.

    Args:
        directory: where; made if it is missing. None means a temporary one that :meth:`close` removes.

    Raises:
        SandboxError: it cannot be written to, or another sandbox uses it.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._temporary = directory is None
        self.path = tempfile.mkdtemp(prefix="branchkey-sandbox-") if directory is None else os.path.abspath(directory)
        self._lock_file: IO[bytes] | None = None
        try:
            for name in ("uploads", "aggregates", "incoming"):
                os.makedirs(os.path.join(self.path, name), mode=0o700, exist_ok=True)
            self._lock()
            self._sweep()
        except OSError as error:
            self.close()
            raise SandboxError(
                what=f"directory {self.path!r}",
                expected="a directory that can be written to",
                found=error.strerror or type(error).__name__,
                fix="Choose another directory",
            ) from error
        except SandboxError:
            self.close()
            raise

    def _in(self, *names: str) -> str:
        return os.path.join(self.path, *names)

    def _lock(self) -> None:
        self._lock_file = open(self._in("lock"), "ab")  # noqa: SIM115 - held until close
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SandboxError(
                what=f"directory {self.path!r}",
                expected="one sandbox at a time",
                found="another one that uses it",
                fix="Stop the other sandbox, or choose another directory",
            ) from None

    def _sweep(self) -> None:
        """Remove what a killed sandbox left half done."""
        for folder, suffix in (("incoming", ""), ("aggregates", ".part"), ("aggregates", ".tmp")):
            for name in os.listdir(self._in(folder)):
                if name.endswith(suffix):
                    os.unlink(self._in(folder, name))

    def close(self) -> None:
        """Let go of the directory, and remove it if it was temporary."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        if self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)

    # --- state and credentials -----------------------------------------------------------------------------------

    def load_state(self) -> dict[str, Any] | None:
        """Read the state of an earlier run, if there is one.

        Raises:
            SandboxError: the file is not a state that this version writes.
        """
        path = self._in("state.json")
        if not os.path.exists(path):
            return None
        problem = SandboxError(
            what=f"state file {path!r}",
            expected=f"the state of a sandbox, version {STATE_VERSION}",
            fix="Delete it, or choose another directory",
        )
        try:
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
        except (OSError, ValueError):
            # ``from None``: the decoder's error carries the text, and that holds session tokens.
            problem.found = "a file that is not readable JSON"
            raise problem from None
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            problem.found = "something else"
            raise problem
        return state

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the state."""
        self._write_private("state.json", {"version": STATE_VERSION, **state})

    def save_credentials(self, index: int, credentials: dict[str, str]) -> None:
        """Write the credentials file of leaf ``index``."""
        self._write_private(f"leaf-{index}.json", credentials)

    def _write_private(self, name: str, content: Any) -> None:
        temporary = self._in(name + ".tmp")
        # Created private: a file that is opened to all and closed to them later can be read in between.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.fchmod(handle, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, self._in(name))
        except BaseException:
            os.unlink(temporary)
            raise

    # --- uploads, aggregates, metrics ------------------------------------------------------------------------------

    def incoming_path(self, name: str) -> str:
        """Give a path for an upload on its way in."""
        return self._in("incoming", name)

    def keep_upload(self, incoming: str, file_id: str, record: dict[str, Any]) -> str:
        """Move a complete upload to its place, its record first, and give its path."""
        self._write_private(os.path.join("uploads", f"{file_id}.json"), record)
        path = self.upload_path(file_id)
        os.replace(incoming, path)
        return path

    def drop_upload(self, file_id: str) -> None:
        """Remove an upload that does not count after all."""
        for path in (self.upload_path(file_id), self._in("uploads", f"{file_id}.json")):
            os.unlink(path)

    def upload_path(self, file_id: str) -> str:
        """Give the path of an upload."""
        return self._in("uploads", f"{file_id}.npz")

    def load_uploads(self) -> list[dict[str, Any]]:
        """Read the records of all uploads there are, in the order they came."""
        records = []
        for name in os.listdir(self._in("uploads")):
            if name.endswith(".json") and os.path.exists(self._in("uploads", name[:-5] + ".npz")):
                with open(self._in("uploads", name), encoding="utf-8") as file:
                    records.append(json.load(file))
        return sorted(records, key=lambda record: int(record["number"]))

    def aggregate_path(self, aggregation_id: str) -> str:
        """Give the path of an aggregate; the id must have been checked."""
        return self._in("aggregates", f"{aggregation_id}.npz")

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Append a report of metrics."""
        with open(self._in("metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def load_metrics(self) -> list[dict[str, Any]]:
        """Read all reports of metrics."""
        if not os.path.exists(self._in("metrics.jsonl")):
            return []
        with open(self._in("metrics.jsonl"), encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]


def write_layers(path: str, layers: Sequence[np.ndarray[Any, Any]]) -> None:
    """Write an aggregate whose layers are made one by one while it is written, so that only one is in memory.

    The file is whole or not there: it grows under another name.
    """
    part = path + ".part"
    try:
        with open(part, "w+b") as file:
            writer = ZipWriter(file, DEFLATED)
            # By position: a loop variable would keep the last layer while the next one is made.
            for index in range(len(layers)):
                writer.add(f"layer_{index}", layers[index])
            writer.finish()
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


def arrays_writer(arrays: Sequence[np.ndarray[Any, Any]]) -> Callable[[str], Any]:
    """Give a function that writes layers as an aggregate to a path."""
    return lambda path: write_archive(path, arrays)


def bytes_writer(content: bytes) -> Callable[[str], Any]:
    """Give a function that writes any bytes to a path."""

    def write(path: str) -> None:
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)

    return write
