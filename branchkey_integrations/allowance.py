"""How many bytes an aggregate may have: one that is longer is refused before it fills the disk."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from branchkey_integrations.errors import AggregateRejectedError, BranchKeyError, DownloadError
from branchkey_integrations.parameters import Layout

#: Most bytes where nothing is known of the model and the user has set no limit.
MOST_BYTES = 64 << 30
#: The widest dtype of a layer is float64, and twice that leaves room for members that are no layers.
_BYTES_A_VALUE = 2 * 8
#: Container and array headers take some 300 bytes a layer, and 1,500 where names and shapes are as long as they may be.
_BYTES_A_LAYER = 4096
_BYTES_AN_ARCHIVE = 1 << 20
#: What a download leaves free: this, or a twentieth of a small disk.
_RESERVE_BYTES = 256 << 20


@dataclass(frozen=True)
class Allowance:
    """Say how many bytes an aggregate may have, and why.

    Args:
        most_bytes: by the model, the user or the default.
        room_bytes: what the disk can take; None where that cannot be told.
        layers: of the model; None where it is not known.
        needed_bytes: the most that the model can need.
    """

    most_bytes: int
    room_bytes: int | None = None
    layers: int | None = None
    needed_bytes: int = MOST_BYTES

    @property
    def limit_bytes(self) -> int:
        """The lower of both limits."""
        return self.most_bytes if self.room_bytes is None else min(self.most_bytes, self.room_bytes)

    def refusal(self, identifier: str, found: str) -> BranchKeyError:
        """Make the error for an aggregate that is longer.

        A disk that is too full for an aggregate says nothing about it, so that one can be downloaded later.
        """
        what = f"aggregate {identifier}"
        if self.limit_bytes < self.most_bytes:
            free = f"{found} where {self.limit_bytes} bytes may be taken"
            fix = "Free some space; temporary files go where TMPDIR says"
            return DownloadError(what=what, expected="room to store it", found=free, fix=fix)
        if self.layers is None or self.most_bytes < self.needed_bytes:
            expected, fix = f"at most {self.most_bytes} bytes", "Set the client's max_download_bytes if it is right"
            return DownloadError(what=what, expected=expected, found=found, fix=fix, status=413)
        return AggregateRejectedError(
            what=what,
            expected=f"at most {self.most_bytes} bytes for a model of {self.layers} layers",
            found=found,
            fix="All leaves of a branch need the same model",
            aggregation_id=identifier,
        )


def allow(folder: str | None, layout: Layout | None, chosen_bytes: int | None, in_memory_bytes: int = 0) -> Allowance:
    """Settle how long an aggregate may be.

    For a model: 16 bytes a value, 4 KiB a layer and 1 MiB, which is four times what float32 takes. Else 64 GiB. Never more
    than the user's own limit, nor than the disk has besides 256 MiB (or a twentieth of a disk below 5 GiB).

    Args:
        folder: where it will be written; None where there is no such place.
        layout: of the model that it is for, if there is one.
        chosen_bytes: the user's own limit.
        in_memory_bytes: up to this length it needs no disk.
    """
    room = 0 if folder is None else room_in(folder)
    room = None if room is None else max(room, in_memory_bytes)
    most = MOST_BYTES if chosen_bytes is None else chosen_bytes
    if layout is None:
        return Allowance(most, room)
    values = sum(math.prod(layer.shape) for layer in layout)
    needed = _BYTES_A_VALUE * values + _BYTES_A_LAYER * len(layout) + _BYTES_AN_ARCHIVE
    return Allowance(min(needed, most), room, len(layout), needed)


def room_in(folder: str) -> int | None:
    """Give the bytes that may be written in a folder; None where that cannot be told."""
    try:
        disk = os.statvfs(folder)
    except (OSError, AttributeError):  # no such folder, or not on this system
        return None
    if not disk.f_blocks:  # a file system that counts nothing, such as ramfs
        return None
    return max(0, disk.f_bavail * disk.f_frsize - min(_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 20))
