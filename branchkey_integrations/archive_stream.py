"""Read bytes of an archive from any place, and the unpacked bytes of one member in bounded memory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from branchkey_integrations import deflate
from branchkey_integrations.archive_values import unreadable
from branchkey_integrations.archive_zip import STORED, Member, broken, shown
from branchkey_integrations.errors import ArchiveError

#: Most unpacked bytes that exist besides the target at one time.
PIECE_BYTES = 256 * 1024


class ByteSource:
    """Read a file at given places; safe to share among threads.

    Args:
        source: a path, which is opened here and closed by ``close``, or a seekable binary file, which stays its owner's.

    Raises:
        ArchiveError: the file cannot be opened or read.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO) -> None:
        self.name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "archive"
        self._lock = threading.Lock()
        self._file: Any = None
        self._owned = isinstance(source, (str, os.PathLike))
        try:
            if isinstance(source, (str, os.PathLike)):
                # Unbuffered: every read has a size of its own, and a buffer would be thrown away by each seek.
                self._file = open(source, "rb", buffering=0)  # noqa: SIM115 - close() closes it
            else:
                self._file = source
            self._file.seek(0, os.SEEK_END)
            self.size = int(self._file.tell())  # SpooledTemporaryFile's seek() gives None before Python 3.11
        except OSError as error:
            self.close()
            raise unreadable(self.name, error) from error

    def close(self) -> None:
        """Close the file if it was opened here; reading is over in any case."""
        with self._lock:
            file, self._file = self._file, None
        if self._owned and file is not None:
            file.close()

    def read_at(self, offset: int, count: int) -> bytes:
        """Give exactly ``count`` bytes from ``offset`` on."""
        parts = []
        with self._placed(offset) as file:
            while count:
                # A plain read: what SpooledTemporaryFile and other wrappers offer may be no more than that.
                part = file.read(count)
                if not part:
                    raise broken("a file that ends too early")
                parts.append(part)
                count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` (of bytes) from ``offset`` on, without a copy between where the file can do that."""
        with self._placed(offset) as file:
            into = getattr(file, "readinto", None)
            while len(view):
                if into is None:
                    part = file.read(len(view))
                    view[: len(part)] = part
                    count = len(part)
                else:
                    count = into(view)
                if not count:
                    raise broken("a file that ends too early")
                view = view[count:]

    @contextlib.contextmanager
    def _placed(self, offset: int) -> Iterator[Any]:
        with self._lock:
            if self._file is None:
                raise ArchiveError(
                    what="archive", expected="an open archive", found="a closed one", fix="Open it again"
                )
            try:
                self._file.seek(offset)
                yield self._file
            except OSError as error:
                raise unreadable(self.name, error) from error


class MemberStream:
    """Unpack one member from its start, judging length and CRC at the end.

    Args:
        source: the archive's bytes.
        member: what the directory says about the member.
        start: where its data starts.
        feed_bytes: packed bytes read at a time.
    """

    def __init__(self, source: ByteSource, member: Member, start: int, feed_bytes: int = deflate.FEED_BYTES) -> None:
        self._source = source
        self._member = member
        self._at = start
        self._end = start + member.packed_bytes
        self._feed_bytes = feed_bytes
        self._left = member.raw_bytes
        self._crc = 0
        self._tail = b""
        self._inflater = None if member.method == STORED else deflate.decompressor()

    def take(self, count: int) -> bytes:
        """Give exactly the next ``count`` unpacked bytes."""
        if count > self._left:
            raise self._broken("data shorter than its header says")
        buffer = bytearray(count)
        self.fill(memoryview(buffer))
        return bytes(buffer)

    def fill(self, view: memoryview) -> None:
        """Fill ``view`` (of bytes) with the next unpacked bytes."""
        if len(view) > self._left:
            raise self._broken("data shorter than its header says")
        done = 0
        while done < len(view):
            wanted = min(len(view) - done, PIECE_BYTES)
            part = view[done : done + wanted]
            if self._inflater is None:
                self._source.read_into(self._at, part)
                self._at += wanted
            else:
                piece = self._unpack(wanted)
                if not piece:
                    raise self._broken("data that ends too early")
                part = part[: len(piece)]
                part[:] = piece
            # The piece is still in the processor's cache here.
            self._crc = deflate.crc32(part, self._crc)
            done += len(part)
        self._left -= done

    def skip(self) -> None:
        """Unpack the rest to nothing."""
        buffer = memoryview(bytearray(min(self._left, PIECE_BYTES)))
        while self._left:
            self.fill(buffer[: self._left])

    def finish(self) -> None:
        """Demand that all was read, that nothing follows, and that the CRC is right."""
        if self._left:
            raise self._broken("data longer than its header says")
        if self._inflater is not None:
            while not self._inflater.eof:
                if self._unpack(1):
                    raise self._broken("more data than declared")
                if self._at == self._end and not self._tail and not self._inflater.eof:
                    raise self._broken("data that ends too early")
            if self._at != self._end or self._tail or self._inflater.unused_data:
                raise self._broken("foreign bytes behind the data")
        if self._crc != self._member.crc:
            raise self._broken(f"CRC {self._crc:08x} where the archive says {self._member.crc:08x}")

    def _unpack(self, limit: int) -> bytes:
        """Give 1 to ``limit`` bytes, or none at the end of the stream or of the input."""
        inflater = self._inflater
        while inflater is not None and not inflater.eof:
            if not self._tail and self._at < self._end:
                count = min(self._feed_bytes, self._end - self._at)
                self._tail = self._source.read_at(self._at, count)
                self._at += count
            fed = self._tail
            try:
                piece = inflater.decompress(fed, limit)
            except deflate.INFLATE_ERRORS as error:
                raise self._broken("data that does not unpack") from error
            self._tail = inflater.unconsumed_tail
            # Without new input a call still gives what the inflater held back.
            if piece or (not fed and self._at == self._end):
                return piece
        return b""

    def _broken(self, found: str) -> ArchiveError:
        return broken(found, what=shown(self._member.name), expected="sound data")
