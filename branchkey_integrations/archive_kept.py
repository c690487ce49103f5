"""Keep what a first pass over an archive has unpacked, so that the second pass need not unpack it again."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

from branchkey_integrations import deflate
from branchkey_integrations.archive_zip import broken
from branchkey_integrations.errors import ArchiveError

logger = logging.getLogger("branchkey_integrations.archive")

_PIECE_BYTES = 256 * 1024


class Kept:
    """Hold values of layers in an unlinked temporary file; safe to share among threads, one a layer.

    Args:
        sizes: bytes of each layer, by any key.

    Raises:
        OSError: there is no room, or no such file can be had.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._starts: dict[int, int] = {}
        total = 0
        for key, size in sizes.items():
            self._starts[key] = total
            total += size
        self._crcs: dict[int, int] = {}
        self._file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - close() closes it
        # An archive on a file of the user's had nothing to close so far; nobody is to be warned of this one.
        weakref.finalize(self, self._file.close)
        try:
            descriptor = self._file.fileno()
            if _lies_in_memory(descriptor):
                raise OSError(
                    errno.ENOTSUP, "temporary files lie in memory here, where a copy costs what it is to save"
                )
            room = os.fstatvfs(descriptor)
            if room.f_bavail * room.f_frsize < 2 * total:
                raise OSError(errno.ENOSPC, "it would take more than half of what is free")
            # All of it now: a disk that fills up in the middle would fail others, who have no way to do without.
            os.posix_fallocate(descriptor, 0, total)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Give the room back. May be called twice."""
        self._file.close()

    def writer(self, key: int) -> Writer | None:
        """Take in layer ``key`` from its start; None where it is not to be kept, or is here already."""
        return Writer(self, key) if key in self._starts and key not in self._crcs else None

    def reader(self, key: int, name: str) -> Reader | None:
        """Read layer ``key``, which messages call ``name``, from its start; None if it is not here whole."""
        crc = self._crcs.get(key)
        return None if crc is None else Reader(self, key, name)

    def write_at(self, key: int, at: int, view: memoryview) -> None:
        """Write all of ``view`` behind the first ``at`` bytes of layer ``key``."""
        at += self._starts[key]
        while len(view):
            count = os.pwrite(self._file.fileno(), view, at)
            at += count
            view = view[count:]

    def read_at(self, key: int, at: int, view: memoryview) -> int:
        """Fill ``view``, or its first bytes, with what is behind the first ``at`` bytes of layer ``key``; say how many."""
        return os.preadv(self._file.fileno(), [view], self._starts[key] + at)

    def whole(self, key: int, crc: int) -> None:
        """Count layer ``key`` as here, with its CRC."""
        self._crcs[key] = crc

    def crc(self, key: int) -> int:
        """Give the CRC of layer ``key`` as it was written."""
        return self._crcs[key]

    def forget(self, key: int) -> None:
        """Count layer ``key`` as not here."""
        self._crcs.pop(key, None)


class Writer:
    """Take in one layer piece by piece."""

    def __init__(self, kept: Kept, key: int) -> None:
        self._kept = kept
        self._key = key
        self._at = self._crc = 0
        self._failed = False

    def put(self, view: memoryview) -> None:
        """Take the next bytes. A disk that does not take them costs the copy and nothing else."""
        if self._failed:
            return
        try:
            self._kept.write_at(self._key, self._at, view)
        except OSError as error:
            self._failed = True
            logger.info("an unpacked copy could not be kept: %s", error.strerror)
            return
        self._crc = deflate.crc32(view, self._crc)
        self._at += len(view)

    def done(self) -> None:
        """Say that the layer was whole and sound."""
        if not self._failed:
            self._kept.whole(self._key, self._crc)


class Reader:
    """Give one layer piece by piece, judging it by its CRC at the end."""

    def __init__(self, kept: Kept, key: int, name: str) -> None:
        self._kept = kept
        self._key = key
        self._wanted = kept.crc(key)
        self._at = self._crc = 0
        self._name = name

    def fill(self, view: memoryview) -> None:
        """Fill ``view`` (of bytes) with the next bytes.

        Raises:
            ArchiveError: the disk does not give back what it was given. It is not asked again.
        """
        while len(view):
            try:
                count = self._kept.read_at(self._key, self._at, view[:_PIECE_BYTES])
            except OSError as error:
                raise self._lost(error.strerror or type(error).__name__) from error
            if not count:
                raise self._lost("less than was written")
            # The piece is still in the processor's cache here.
            self._crc = deflate.crc32(view[:count], self._crc)
            self._at += count
            view = view[count:]

    def finish(self) -> None:
        """Demand that the CRC is right."""
        if self._crc != self._wanted:
            raise self._lost(f"CRC {self._crc:08x} where {self._wanted:08x} was written")

    def _lost(self, found: str) -> ArchiveError:
        self._kept.forget(self._key)
        return broken(found, what=self._name, expected="what was unpacked to a temporary file")


def _lies_in_memory(descriptor: int) -> bool:
    """Tell whether a file is of a file system that keeps it in memory, as far as Linux tells (see proc(5), mountinfo)."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            return any(
                line.split()[2] == number and line.partition(" - ")[2].split()[:1] in (["tmpfs"], ["ramfs"])
                for line in lines
            )
    except OSError:
        return False


def keep(sizes: Mapping[int, int]) -> Kept | None:
    """Make room to keep layers of these sizes in bytes; None where there is none, or where the system cannot do it."""
    if not all(hasattr(os, name) for name in ("posix_fallocate", "pwrite", "preadv")) or not sum(sizes.values()):
        return None
    try:
        return Kept(sizes)
    except OSError as error:
        logger.info("no room to keep an unpacked copy: %s", error.strerror)
        return None
