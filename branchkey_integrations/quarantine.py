"""Keep aggregates that were refused, each beside a JSON file that says why, so that somebody can look at them."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any, BinaryIO

from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.events import check_aggregation_id

logger = logging.getLogger("branchkey_integrations.quarantine")


@dataclass(frozen=True)
class Quarantine:
    """A folder with the newest refused aggregates: ``<id>.npz`` and ``<id>.json``.

    Args:
        folder: made with the first file; only its owner may read it.
        most: how many aggregates are kept; older ones are deleted.
    """

    folder: str
    most: int = 10

    def keep(self, file: BinaryIO, aggregation_id: str, error: BranchKeyError) -> str:
        """Keep a file and the reason why it was refused; return its path, or an empty text if that failed.

        A refusal must not become another error, so a full disk is only logged.
        """
        path = os.path.join(self.folder, f"{check_aggregation_id(aggregation_id)}.npz")
        reason = f"{path[:-4]}.json"
        temporary = f"{path}.part"
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            file.seek(0)
            with open(temporary, "wb") as copy:
                shutil.copyfileobj(file, copy, 1024 * 1024)
            file.seek(0)
            with open(reason, "w", encoding="utf-8") as text:
                json.dump(self._reason(file, aggregation_id, error), text, indent=1)
            os.replace(temporary, path)
        except OSError as trouble:
            logger.warning("the refused aggregate %s could not be kept: %s", aggregation_id, trouble.strerror)
            self._remove(temporary, reason)
            return ""
        self._forget_old_ones()
        return path

    def _reason(self, file: BinaryIO, aggregation_id: str, error: BranchKeyError) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        while True:
            piece = file.read(1024 * 1024)
            if not piece:
                break
            digest.update(piece)
            size += len(piece)
        return {
            "aggregation_id": aggregation_id,
            "refused_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "what": error.what,
            "expected": error.expected,
            "found": error.found,
            "size_bytes": size,
            "sha256": digest.hexdigest(),
        }

    def _forget_old_ones(self) -> None:
        with contextlib.suppress(OSError):
            names = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".npz")]
            names.sort(key=lambda entry: entry.stat().st_mtime_ns)
            for entry in names[: max(0, len(names) - self.most)]:
                self._remove(entry.path, f"{entry.path[:-4]}.json")

    @staticmethod
    def _remove(*paths: str) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)


def quarantine_of(chosen: str | os.PathLike[str] | bool | None, output_dir: str) -> Quarantine | None:
    """Give the quarantine that a client's option asks for."""
    if chosen is False:
        return None
    return Quarantine(os.path.join(output_dir, "refused") if chosen in (None, True) else os.fspath(chosen))  # type: ignore[arg-type]
