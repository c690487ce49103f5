"""Keep aggregates that were refused, each beside a JSON file that says why, so that somebody can look at them."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any, BinaryIO

from branchkey_integrations import parts
from branchkey_integrations.allowance import room_in
from branchkey_integrations.errors import AggregateRejectedError, BranchKeyError
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
        path = self._path(aggregation_id)
        try:
            self._prepare()
            size = file.seek(0, os.SEEK_END) or file.tell()
            room = room_in(self.folder)
            if room is not None and size > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.seek(0)
            with parts.replacing(path) as copy:
                shutil.copyfileobj(file, copy, 1024 * 1024)
            self._write_reason(aggregation_id, error, file)
        except OSError as trouble:
            logger.warning("the refused aggregate %s could not be kept: %s", aggregation_id, trouble.strerror)
            self._remove(path)
            return ""
        self._forget_old_ones()
        return path

    def note(self, aggregation_id: str, error: BranchKeyError) -> str:
        """Keep the reason alone, of an aggregate that is not here; return its path, or an empty text if that failed."""
        try:
            self._prepare()
            path = self._write_reason(aggregation_id, error, None)
        except OSError as trouble:
            logger.warning("why %s was refused could not be noted: %s", aggregation_id, trouble.strerror)
            return ""
        self._forget_old_ones()
        return path

    def _path(self, aggregation_id: str) -> str:
        return os.path.join(self.folder, f"{check_aggregation_id(aggregation_id)}.npz")

    def _prepare(self) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        # Versions up to 0.1 named their parts otherwise.
        parts.sweep(self.folder, ".npz.part")

    def _write_reason(self, aggregation_id: str, error: BranchKeyError, file: BinaryIO | None) -> str:
        path = f"{self._path(aggregation_id)[:-4]}.json"
        text = json.dumps(self._reason(file, aggregation_id, error), indent=1)
        with parts.replacing(path) as target:
            target.write(text.encode("utf-8"))
        return path

    def _reason(self, file: BinaryIO | None, aggregation_id: str, error: BranchKeyError) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        if file is not None:
            file.seek(0)
        while file is not None:
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
            "size_bytes": None if file is None else size,
            "sha256": None if file is None else digest.hexdigest(),
        }

    def _forget_old_ones(self) -> None:
        with contextlib.suppress(OSError):
            newest: dict[str, int] = {}
            for entry in os.scandir(self.folder):
                stem, ending = os.path.splitext(entry.path)
                if ending in (".npz", ".json"):
                    newest[stem] = max(newest.get(stem, 0), entry.stat().st_mtime_ns)
            for stem in sorted(newest, key=newest.__getitem__)[: max(0, len(newest) - self.most)]:
                self._remove(f"{stem}.npz", f"{stem}.json")

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


def rejected(aggregation_id: str, error: BranchKeyError) -> AggregateRejectedError:
    """Make a refusal of what was found wrong with an aggregate."""
    detail = "" if error.what == "aggregate" else f", {error.what}"
    what = error.what if aggregation_id in error.what else f"aggregate {aggregation_id}{detail}"
    return AggregateRejectedError(
        what=what,
        expected=error.expected,
        found=error.found,
        fix=error.fix,
        aggregation_id=aggregation_id,
        quarantined=getattr(error, "quarantined", ""),
    )
