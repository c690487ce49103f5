"""Remember, epoch by epoch, how the rounds stood, so that a killed ``fit`` goes on with its pending round.

Keras stores no state of callbacks. ``BackupAndRestore`` brings weights and epoch back; what belongs to that epoch of ours is
kept in a JSON file beside the journal: ids, numbers and digests, no weights and no secrets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from branchkey_integrations.journal import file_name

_log = logging.getLogger("branchkey_integrations.keras")

#: ``BackupAndRestore`` goes back one epoch, two with ``double_checkpoint``; a longer memory helps those who copy backups.
_KEPT = 20


def folder_beside_backup(company: Sequence[Any]) -> str | None:
    """Give the folder beside the backup of the first ``BackupAndRestore`` that backs up to a disk; None without one.

    Not within it: Keras deletes the backup when ``fit`` comes to its end.
    """
    for other in company:
        if isinstance(other, keras.callbacks.BackupAndRestore):
            backup = os.fspath(other.backup_dir)
            if "://" not in backup:
                return f"{backup.rstrip('/' + os.sep)}-branchkey"
    return None


class EpochStates:
    """Keep the state of the rounds at the end of each of the newest epochs.

    Args:
        folder: where the file ``<leaf_id>.epochs.json`` lies.
        leaf_id: id of the leaf.
    """

    def __init__(self, folder: str, leaf_id: str) -> None:
        self._path = os.path.join(os.path.abspath(folder), f"{file_name(leaf_id)}.epochs.json")

    def put(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Keep how things stand when ``epoch`` epochs are over; a full disk costs a warning."""
        known = {each: value for each, value in self._read().items() if int(each) < epoch}
        newest = dict(sorted(known.items(), key=lambda pair: int(pair[0]))[-_KEPT + 1 :])
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(f"{self._path}.part", "w", encoding="utf-8") as file:
                json.dump({**newest, str(epoch): state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{self._path}.part", self._path)
        except OSError as error:
            _log.warning(
                "the state of epoch %d could not be kept, so fit cannot go on from it: %s", epoch, error.strerror
            )

    def at(self, epoch: int) -> Mapping[str, Any] | None:
        """Give how things stood when ``epoch`` epochs were over; None if that is not known."""
        found = self._read().get(str(epoch))
        return found if isinstance(found, dict) else None

    def newest(self) -> Mapping[str, Any] | None:
        """Give the newest state; None if there is none."""
        known = self._read()
        return self.at(max(map(int, known))) if known else None

    def forget(self) -> None:
        """Remove the file: ``fit`` begins anew."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return {}
        return {key: value for key, value in found.items() if key.isdigit()} if isinstance(found, dict) else {}
