"""Pack layers into the members of a zip file in bounded memory, hashing the file as it grows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, Union

import numpy as np

from branchkey_integrations import archive_npy, archive_zip, deflate
from branchkey_integrations.archive_hash import Follower, can_follow
from branchkey_integrations.archive_values import LayerStream, not_finite
from branchkey_integrations.archive_zip import STORED, Member
from branchkey_integrations.errors import ArchiveError
from branchkey_integrations.values import all_finite

#: Members up to this size are packed in memory and written once; larger ones are written as they are packed, and their
#: header is put right afterwards.
IN_MEMORY_BYTES = 1024 * 1024
_REREAD_BYTES = 256 * 1024

Piece = Any  # bytes or memoryview: what write(), crc32() and sha256() take
Layer = Union[np.ndarray, LayerStream]


class _Copy:
    """Stand in for a compressor where nothing is compressed."""

    def compress(self, data: Piece) -> Piece:
        return data

    def flush(self) -> Piece:
        return b""


class Packing:
    """Make the packed pieces of one member by iteration (once), and know its sizes and CRC afterwards.

    Args:
        key: name of the array.
        layer: its values.
        method: ``STORED`` or ``DEFLATED``.
        finite: refuse NaN and infinity on the way.
    """

    def __init__(self, key: str, layer: Layer, method: int, finite: bool) -> None:
        self.key, self.layer, self.method = key, layer, method
        self.crc = self.packed_bytes = self.raw_bytes = 0
        self._finite = finite and layer.dtype.kind == "f"
        self._dtype = layer.dtype.newbyteorder("<")

    def __iter__(self) -> Iterator[Piece]:
        header = archive_npy.encode(self.layer.shape, self._dtype)
        chunks = self._chunks()
        first = next(chunks, memoryview(b""))
        packer: Any = _Copy() if self.method == STORED else deflate.compressor(first)
        chunk: Piece
        for chunk in chain((header, first), chunks):
            self.raw_bytes += len(chunk)
            self.crc = deflate.crc32(chunk, self.crc)
            yield self._packed(packer.compress(chunk))
        yield self._packed(packer.flush())

    def member(self, offset: int) -> Member:
        """Describe the member, whose local header starts at ``offset``."""
        sizes = (self.crc, self.packed_bytes, self.raw_bytes)
        return Member(f"{self.key}.npy", self.method, 0, *sizes, offset)

    def _packed(self, piece: Piece) -> Piece:
        self.packed_bytes += len(piece)
        return piece

    def _chunks(self) -> Iterator[memoryview]:
        """Give the values in C order and little-endian, without a copy where they lie in memory like that."""
        layer = self.layer
        items = deflate.FEED_BYTES // self._dtype.itemsize
        parts: Iterable[np.ndarray]
        if not isinstance(layer, np.ndarray):
            parts = layer.pieces(items)
        elif layer.flags.c_contiguous and layer.dtype == self._dtype:
            flat = layer.reshape(-1)
            parts = (flat[start : start + items] for start in range(0, flat.size, items))
        else:
            # Buffered, so that a transposed or strided layer takes one chunk of memory and not its whole size. The buffer
            # is used again for the next chunk, hence the copy.
            walk: Any = np.nditer(
                layer,
                ["external_loop", "buffered", "zerosize_ok"],
                op_dtypes=[self._dtype],
                order="C",
                casting="equiv",
                buffersize=items,
            )
            parts = (np.array(part) for part in walk)
        for part in parts:
            if self._finite and not all_finite(part):
                raise not_finite(self.key)
            yield part.astype(self._dtype, copy=False).view(np.uint8).data


class ZipWriter:
    """Write members one after the other, then the directory, and hash every byte in the order of the file.

    Args:
        file: written from where it stands. Where it can be read and sought too, large members are packed only once.
        method: ``STORED`` or ``DEFLATED``.
        beside: hash in a thread of its own, where the file allows it; then :meth:`close` is due in the end.
    """

    def __init__(self, file: BinaryIO, method: int, *, beside: bool = False) -> None:
        self._file: Any = file
        self._method = method
        #: The directory as it will be written: sixty bytes a layer, where a list of members would take four hundred.
        self._directory, self._count = bytearray(), 0
        self._sha256 = hashlib.sha256()
        self._size = 0
        # A file opened for appending takes every write at its end, wherever it was sought to.
        appends = "a" in str(getattr(file, "mode", ""))
        self._can_patch = _can(file, "seekable") and _can(file, "readable") and not appends
        self._origin: int = file.tell() if self._can_patch else 0
        descriptor = can_follow(file) if beside and self._can_patch else None
        self._follower = None if descriptor is None else Follower(descriptor, self._origin)

    def add(self, key: str, layer: Layer, *, finite: bool = False) -> None:
        """Write one member, packed straight from the memory of ``layer``."""
        offset = self._size
        packing = Packing(key, layer, self._method, finite)
        if layer.nbytes <= IN_MEMORY_BYTES:
            pieces = list(packing)
            self._emit(archive_zip.local_header(packing.member(offset)), *pieces)
        elif self._can_patch:
            self._add_patched(packing)
        else:
            self._add_twice(packing)
        self._directory += archive_zip.central_record(packing.member(offset))
        self._count += 1

    def finish(self) -> tuple[int, bytes]:
        """Write the directory; give size and SHA-256 of all that was written."""
        ends = archive_zip.end_records(self._count, len(self._directory), self._size)
        self._emit(self._directory, *ends)
        self._file.flush()
        if self._follower is None:
            return self._size, self._sha256.digest()
        self._follower.reached(self._origin + self._size)
        return self._size, self._follower.digest()

    def close(self) -> None:
        """End the thread that hashes, if there is one. May be called twice."""
        if self._follower is not None:
            self._follower.close()

    def _add_patched(self, packing: Packing) -> None:
        """Write a member behind an empty header, fill that in, and hash both from the system's cache."""
        offset = self._size
        empty = archive_zip.local_header(packing.member(offset))
        self._write(empty)
        for piece in packing:
            self._write(piece)
        end = self._origin + offset + len(empty) + packing.packed_bytes
        self._file.seek(self._origin + offset)
        self._write(archive_zip.local_header(packing.member(offset)))
        if self._follower is None:
            self._hash_again(offset, end - self._origin)
        self._file.seek(end)
        self._grown(end - self._origin)

    def _hash_again(self, start: int, end: int) -> None:
        self._file.seek(self._origin + start)
        left = end - start
        while left:
            piece = self._file.read(min(left, _REREAD_BYTES))
            if not piece:
                raise OSError("the file lost what was written to it")
            self._sha256.update(piece)
            left -= len(piece)

    def _grown(self, size: int) -> None:
        self._size = size
        if self._follower is not None and self._follower.wants(self._origin + size):
            self._file.flush()
            self._follower.reached(self._origin + size)

    def _add_twice(self, packing: Packing) -> None:
        """Pack for the sizes, then again for good: there is no way back to the header, nor memory for the whole."""
        for _ in packing:
            pass
        self._emit(archive_zip.local_header(packing.member(self._size)))
        again = Packing(packing.key, packing.layer, packing.method, finite=False)
        for piece in again:
            self._emit(piece)
        if again.member(0) != packing.member(0):
            raise ArchiveError(
                what=packing.key,
                expected="values that stay the same while they are written",
                found="values that changed",
                fix="Pass a copy, or write before training goes on",
            )

    def _emit(self, *pieces: Piece) -> None:
        size = self._size
        for piece in pieces:
            self._write(piece)
            size += len(piece)
            if self._follower is None:
                self._sha256.update(piece)
        self._grown(size)

    def _write(self, piece: Piece) -> None:
        view = memoryview(piece)
        while len(view):
            # An unbuffered file may take less than it was given.
            count = self._file.write(view)
            if not count:
                raise OSError("the file takes no more bytes")
            view = view[count:]


def _can(file: object, ability: str) -> bool:
    """Ask a file for an ability; wrappers that do not know the question have none."""
    ask = getattr(file, ability, None)
    return ask is not None and bool(ask())
