"""Read the directory of a zip file, and the record in front of each member, believing nothing and keeping nothing.

Entries are given one at a time from a window of the file, so that neither their number nor the length of what stands in them
costs memory. Source of all layouts: APPNOTE.TXT 6.3.10 by PKWARE.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from branchkey_integrations.archive_zip import (
    CENTRAL,
    CENTRAL_MARK,
    DEFLATED,
    DESCRIPTOR_FLAG,
    END,
    END64,
    END64_MARK,
    END_MARK,
    LOCAL,
    LOCAL_MARK,
    LOCATOR64,
    LOCATOR64_MARK,
    MAX16,
    MAX32,
    MAX_MEMBERS,
    SIZES64,
    STORED,
    UTF8_FLAG,
    Member,
    broken,
    not_an_archive,
    shown,
)

#: Longest name of a member; numpy's are a dozen bytes long.
MAX_NAME_BYTES = 1024

_KNOWN_FLAGS = 1 << 1 | 1 << 2 | DESCRIPTOR_FLAG | UTF8_FLAG  # 1 and 2 say how hard the packer tried
_BOTH_LONG = struct.pack("<2H", 1, 16)
_LONGEST_COMMENT = 65_535
_MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
#: Name, extra fields and comment of an entry have lengths of 16 bits.
_LONGEST_ENTRY = CENTRAL.size + 3 * 65_535
_WINDOW_BYTES = 256 * 1024
#: Deflate cannot make more out of a byte than this.
_MOST_GROWTH = 1032

ReadAt = Callable[[int, int], bytes]


class Directory(NamedTuple):
    """Say where the directory lies, as the end record tells and the size of the file confirms."""

    members: int
    start: int
    length_bytes: int


def find_directory(read_at: ReadAt, size: int) -> Directory:
    """Judge the end record of an archive of ``size`` bytes.

    Raises:
        ArchiveError: no zip file, a truncated one, or more than 65,535 members.
    """
    start = read_at(0, min(size, 64))
    if start[:4] not in (LOCAL_MARK, END_MARK):
        raise not_an_archive(_guess(start))
    tail_start = max(0, size - END.size - _LONGEST_COMMENT)
    # Nearly all archives end without a comment, so 64 KiB are read only where one seems to be there.
    tail = read_at(max(0, size - END.size), min(size, END.size))
    if not (tail.startswith(END_MARK) and tail.endswith(b"\0\0")):
        tail = read_at(tail_start, size - tail_start)
    at = tail.rfind(END_MARK)
    if at < 0 or len(tail) - at < END.size:
        raise not_an_archive("a truncated file, its end is missing")
    _, disk, first_disk, on_disk, count, length, offset, comment = END.unpack_from(tail, at)
    end = size - len(tail) + at
    if comment != size - end - END.size or disk or first_disk or on_disk != count:
        raise broken("a damaged end record")
    # Python's zipfile writes no 64-bit record for just as many members as the field can tell.
    if length == MAX32 or offset == MAX32 or (count == MAX16 and _has_end64(read_at, end)):
        end, count, length, offset = _read_end64(read_at, end)
    if count > MAX_MEMBERS:
        raise broken(f"{count} members", expected=f"at most {MAX_MEMBERS} members")
    if offset + length != end or length > _MAX_DIRECTORY_BYTES or length < count * CENTRAL.size:
        raise broken("a directory that does not lie where the end record says")
    return Directory(count, offset, length)


def _has_end64(read_at: ReadAt, end: int) -> bool:
    at = end - LOCATOR64.size
    return at >= 0 and read_at(at, 4) == LOCATOR64_MARK


def _read_end64(read_at: ReadAt, end: int) -> tuple[int, int, int, int]:
    at = end - LOCATOR64.size
    if at < END64.size:
        raise broken("a damaged end record")
    mark, disk, place, disks = LOCATOR64.unpack(read_at(at, LOCATOR64.size))
    if mark != LOCATOR64_MARK or disk or disks != 1 or place != at - END64.size:
        raise broken("a damaged 64-bit end record")
    fields = END64.unpack(read_at(place, END64.size))
    mark, length, _, _, disk, first_disk, on_disk, count, size, offset = fields
    if mark != END64_MARK or length != END64.size - 12 or disk or first_disk or on_disk != count:
        raise broken("a damaged 64-bit end record")
    return place, count, size, offset


def read_members(read_at: ReadAt, directory: Directory) -> Iterator[Member]:
    """Give the members in the order of the directory, in the memory of half a megabyte.

    Judges what can be judged without touching a member: the place and size of every record, names, methods, flags, claims.

    Raises:
        ArchiveError: a broken or forged directory.
    """
    count, limit, length = directory
    data, at, unread = b"", 0, length
    for _ in range(count):
        if unread and len(data) - at < _LONGEST_ENTRY:
            more = min(unread, _WINDOW_BYTES)
            data, at = data[at:] + read_at(limit + length - unread, more), 0
            unread -= more
        if len(data) - at < CENTRAL.size:
            raise broken("a directory with fewer entries than the end record says")
        fields = CENTRAL.unpack_from(data, at)
        mark, _, _, flags, method, _, _, crc, packed, raw, name_length, extra_length, comment_length = fields[:13]
        disk, _, _, offset = fields[13:]
        name_end = at + CENTRAL.size + name_length
        extra_end = name_end + extra_length
        if mark != CENTRAL_MARK or extra_end + comment_length > len(data):
            raise broken("a damaged directory entry")
        name = _name(data[name_end - name_length : name_end], flags)
        if name_length > MAX_NAME_BYTES:
            raise broken(f"{name_length}", what=shown(name), expected=f"a name of at most {MAX_NAME_BYTES} bytes")
        if raw == MAX32 or packed == MAX32 or offset == MAX32:
            raw, packed, offset = _long_values([raw, packed, offset], data[name_end:extra_end], name)
        member = Member(name, method, flags, crc, packed, raw, offset)
        _judge(member, limit, disk)
        at = extra_end + comment_length
        yield member
    if unread or at != len(data):
        raise broken("a directory with more entries than the end record says")


def _judge(member: Member, limit: int, disk: int) -> None:
    _, method, flags, _, packed, raw, offset = member
    if flags & ~_KNOWN_FLAGS:
        found = "an encrypted member" if flags & 1 else f"flags {flags:#06x}"
        raise broken(found, what=shown(member.name), expected="a plain zip member")
    if disk or offset + LOCAL.size + packed > limit:
        raise broken("data outside the file", what=shown(member.name))
    if method == DEFLATED:
        possible = raw <= packed * _MOST_GROWTH
    elif method == STORED:
        possible = raw == packed
    else:
        raise broken(f"method {method}", what=shown(member.name), expected="a member that is stored or deflated")
    if not possible:
        found = f"{raw} bytes declared, which {packed} packed ones cannot hold"
        raise broken(found, what=shown(member.name))


def read_local_header(read_at: ReadAt, member: Member) -> int:
    """Check that the record in front of a member agrees with the directory; give the place where its data starts."""
    fields = LOCAL.unpack(read_at(member.offset, LOCAL.size))
    mark, _, flags, method, _, _, crc, packed, raw, name_length, extra_length = fields
    if mark != LOCAL_MARK or flags != member.flags or method != member.method:
        raise broken("a local header that contradicts the directory", what=shown(member.name))
    rest = read_at(member.offset + LOCAL.size, name_length + extra_length)
    if raw == packed == MAX32 and extra_length == SIZES64.size and rest[name_length:].startswith(_BOTH_LONG):
        _, _, raw, packed = SIZES64.unpack_from(rest, name_length)  # as numpy writes it
    elif raw == MAX32 or packed == MAX32:
        raw, packed = _long_values([raw, packed], rest[name_length:], member.name)
    told = crc == member.crc and packed == member.packed_bytes and raw == member.raw_bytes
    # A writer that could not seek back left zeros here and put the figures behind the data.
    if not told and (crc or packed or raw or not flags & DESCRIPTOR_FLAG):
        raise broken("a local header that contradicts the directory", what=shown(member.name))
    if _name(rest[:name_length], flags) != member.name:
        raise broken("a local header with another name", what=shown(member.name))
    return member.offset + LOCAL.size + len(rest)


def _name(data: bytes, flags: int) -> str:
    if data.isascii():
        return data.decode("ascii")  # as either encoding has it, at a fraction of the time
    try:
        return data.decode("utf-8" if flags & UTF8_FLAG else "cp437")
    except UnicodeDecodeError:
        raise broken("a member whose name is not text") from None


def _long_values(values: list[int], extra: bytes, name: str) -> list[int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wanted = [index for index, value in enumerate(values) if value == MAX32]
            if length < 8 * len(wanted) or at + 4 + length > len(extra):
                break
            long = struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4)
            result = list(values)
            for index, value in zip(wanted, long):
                result[index] = value
            return result
        at += 4 + length
    raise broken("64-bit sizes that are missing", what=shown(name))


def _guess(start: bytes) -> str:
    if not start:
        return "an empty file"
    if start.startswith(b"\x93NUMPY"):
        return "a bare .npy array"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "XML or HTML text, such as an error page"
    if start.lstrip().startswith((b"{", b"[")):
        return "JSON text, such as an error answer"
    return "other data"
