"""Keep the newest update that could not be sent, and metrics, on the disk until the platform can be reached."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from branchkey_integrations import parts
from branchkey_integrations.archive import write_archive
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.journal import file_name

logger = logging.getLogger("branchkey_integrations.spool")

_METRIC_LINES = 1000


@dataclass(frozen=True)
class Spooled:
    """An update that waits: which round's, of which layers, in which run of which branch, and what its archive must be."""

    round: int
    layout: str
    update_id: str
    leaf_id: str
    branch_id: str
    run_number: int | None
    size_bytes: int
    digest: str


class Spool:
    """A folder with at most one update (``update.npz``, ``update.json``) and the newest thousand reports of metrics.

    Args:
        folder: a folder of this leaf is made in it with the first file; only its owner may read it.
        leaf_id: id of the leaf.
        limit_bytes: an archive above this size is not kept.
    """

    def __init__(self, folder: str, leaf_id: str, limit_bytes: int) -> None:
        folder = os.path.join(folder, file_name(leaf_id))
        self._folder = folder
        self._limit = limit_bytes
        self.path = os.path.join(folder, "update.npz")
        self._about = os.path.join(folder, "update.json")
        self._metrics = os.path.join(folder, "metrics.jsonl")

    def put(self, arrays: Sequence[Any], weighting: float, **about: Any) -> Spooled | None:
        """Keep an update in place of the one before; None, and a warning, if it cannot be kept."""
        self.drop()
        size = sum(getattr(array, "nbytes", 0) for array in arrays)
        if size > self._limit:
            logger.warning(
                "an update of %d bytes is not kept until the link is back: the limit is %d", size, self._limit
            )
            return None
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            info = write_archive(self.path, arrays, weighting)
            spooled = Spooled(size_bytes=info.size_bytes, digest=info.digest, **about)
            with parts.replacing(self._about, durable=True) as file:
                file.write(json.dumps(asdict(spooled)).encode())
            return spooled
        except (OSError, BranchKeyError) as error:
            logger.warning("an update could not be kept until the link is back: %s", error)
            self.drop()
            return None

    def newest(self) -> Spooled | None:
        """Give the update that waits; None if there is none, or only the remains of a crash."""
        try:
            with open(self._about, encoding="utf-8") as file:
                spooled = Spooled(**json.load(file))
            return spooled if os.path.getsize(self.path) == spooled.size_bytes else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def replaced(self, update_id: str) -> bool:
        """Tell whether another update than this one waits here by now."""
        found = self.newest()
        return found is not None and found.update_id != update_id

    def drop(self, update_id: str | None = None) -> None:
        """Forget the update; with an id, unless another one has taken its place."""
        if update_id is not None and self.replaced(update_id):
            return
        # A process that was killed while it wrote leaves hidden parts, that of an archive of any size.
        left = glob.glob(os.path.join(glob.escape(self._folder), ".update.*.part"))
        for path in (self._about, f"{self._about}.part", self.path, *left):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def add_metrics(self, about: str, numbers: Mapping[str, float], mode: str) -> None:
        """Keep a report; the oldest goes when there are too many."""
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            lines = [*self._lines()[-_METRIC_LINES + 1 :], json.dumps([about, dict(numbers), mode])]
            self._write_lines(lines)
        except OSError as error:
            logger.warning("metrics could not be kept until the link is back: %s", error.strerror)

    def metrics(self) -> list[tuple[str, dict[str, float], str]]:
        """Give the reports that wait, oldest first."""
        found = []
        for line in self._lines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                about, numbers, mode = json.loads(line)
                found.append((str(about), dict(numbers), str(mode)))
        return found

    def drop_metrics(self, count: int) -> None:
        """Forget the oldest ``count`` reports."""
        left = self._lines()[count:]
        with contextlib.suppress(OSError):
            if left:
                self._write_lines(left)
            else:
                os.unlink(self._metrics)

    def _write_lines(self, lines: Sequence[str]) -> None:
        # Under a name that nobody knows before: in its place might lie a link to another file of the user.
        with parts.replacing(self._metrics) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def _lines(self) -> list[str]:
        try:
            with open(self._metrics, encoding="utf-8") as file:
                return file.read().splitlines()
        except (OSError, ValueError):
            return []
