"""The zip container: its records, and a reader of its directory that believes nothing.

Records always carry 64-bit sizes in front of the data, as numpy's do, and never a data descriptor behind it, so that readers which
follow the local headers work too. Source of all layouts: APPNOTE.TXT 6.3.10 by PKWARE.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from branchkey_integrations.errors import ArchiveError

STORED, DEFLATED = 0, 8
#: Most members of an archive; the largest published models have some 50,000 tensors.
MAX_MEMBERS = 65_535

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_SIZES64 = struct.Struct("<2H2Q")
_LOCAL_MARK, _CENTRAL_MARK, _END_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_LOCATOR64_MARK, _END64_MARK = b"PK\x06\x07", b"PK\x06\x06"
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_VERSION = 45  # the first with 64-bit sizes
_UNIX, _FILE_MODE = 3, 0o600
_NO_TIME, _FIRST_DAY = 0, 1 << 5 | 1  # 1980-01-01: equal layers shall give equal bytes
_DESCRIPTOR_FLAG, _UTF8_FLAG = 1 << 3, 1 << 11
_KNOWN_FLAGS = 1 << 1 | 1 << 2 | _DESCRIPTOR_FLAG | _UTF8_FLAG  # 1 and 2 say how hard the packer tried
_LONGEST_COMMENT = 65_535
_MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
#: Deflate cannot make more out of a byte than this.
_MOST_GROWTH = 1032

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """Say what the directory tells about one member."""

    name: str
    method: int
    flags: int
    crc: int
    packed_bytes: int
    raw_bytes: int
    #: Where its local header starts.
    offset: int


def local_header(member: Member) -> bytes:
    """Make the record in front of a member; its length does not depend on the sizes, so it can be written over later."""
    name = member.name.encode("ascii")
    sizes = _SIZES64.pack(1, 16, member.raw_bytes, member.packed_bytes)
    times = (_NO_TIME, _FIRST_DAY)
    start = _LOCAL.pack(
        _LOCAL_MARK, _VERSION, 0, member.method, *times, member.crc, _MAX32, _MAX32, len(name), len(sizes)
    )
    return start + name + sizes


def directory(members: list[Member], offset: int) -> Iterator[bytes]:
    """Make the records behind the last member, which ends at ``offset``."""
    size = 0
    for member in members:
        record = _central_record(member)
        size += len(record)
        yield record
    count = len(members)
    if count >= _MAX16 or size >= _MAX32 or offset >= _MAX32:
        place = (0, 0, count, count, size, offset)
        yield _END64.pack(_END64_MARK, _END64.size - 12, _VERSION, _VERSION, *place)
        yield _LOCATOR64.pack(_LOCATOR64_MARK, 0, offset + size, 1)
    short = min(count, _MAX16)
    yield _END.pack(_END_MARK, 0, 0, short, short, min(size, _MAX32), min(offset, _MAX32), 0)


def _central_record(member: Member) -> bytes:
    name = member.name.encode("ascii")
    values = (member.raw_bytes, member.packed_bytes, member.offset)
    long = [value for value in values if value >= _MAX32]
    extra = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    raw, packed, offset = (min(value, _MAX32) for value in values)
    start = _CENTRAL.pack(
        _CENTRAL_MARK,
        _UNIX << 8 | _VERSION,
        _VERSION,
        0,
        member.method,
        _NO_TIME,
        _FIRST_DAY,
        member.crc,
        packed,
        raw,
        len(name),
        len(extra),
        0,
        0,
        0,
        _FILE_MODE << 16,
        offset,
    )
    return start + name + extra


def broken(found: str, what: str = "archive", expected: str = "a sound NPZ archive") -> ArchiveError:
    """Say that the file is damaged or forged."""
    return ArchiveError(what=what, expected=expected, found=found, fix="The file is broken or forged; get it again")


def not_an_archive(found: str) -> ArchiveError:
    """Say that the file is something else altogether."""
    return ArchiveError(
        what="archive",
        expected="an NPZ archive of layers",
        found=f"{found}; this is not an NPZ archive",
        fix="Check that this is the file meant, and that it came through whole",
    )


def read_directory(read_at: ReadAt, size: int) -> tuple[list[Member], int]:
    """Read the directory of an archive of ``size`` bytes; give its members, and where it starts.

    Judges what can be judged without touching a member: the place and size of every record, names, methods, flags, claims.

    Raises:
        ArchiveError: no zip file, a broken or forged one, or more than 65,535 members.
    """
    start = read_at(0, min(size, 64))
    if start[:4] not in (_LOCAL_MARK, _END_MARK):
        raise not_an_archive(_guess(start))
    tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
    # Nearly all archives end without a comment, so 64 KiB are read only where one seems to be there.
    tail = read_at(max(0, size - _END.size), min(size, _END.size))
    if not (tail.startswith(_END_MARK) and tail.endswith(b"\0\0")):
        tail = read_at(tail_start, size - tail_start)
    at = tail.rfind(_END_MARK)
    if at < 0 or len(tail) - at < _END.size:
        raise not_an_archive("a truncated file, its end is missing")
    _, disk, first_disk, on_disk, count, length, offset, comment = _END.unpack_from(tail, at)
    end = size - len(tail) + at
    if comment != size - end - _END.size or disk or first_disk or on_disk != count:
        raise broken("a damaged end record")
    if count == _MAX16 or length == _MAX32 or offset == _MAX32:
        end, count, length, offset = _read_end64(read_at, end)
    if count > MAX_MEMBERS:
        raise broken(f"{count} members", expected=f"at most {MAX_MEMBERS} members")
    if offset + length != end or length > _MAX_DIRECTORY_BYTES or length < count * _CENTRAL.size:
        raise broken("a directory that does not lie where the end record says")
    return list(_members(read_at(offset, length), count, offset)), offset


def _read_end64(read_at: ReadAt, end: int) -> tuple[int, int, int, int]:
    at = end - _LOCATOR64.size
    if at < _END64.size:
        raise broken("a damaged end record")
    mark, disk, place, disks = _LOCATOR64.unpack(read_at(at, _LOCATOR64.size))
    if mark != _LOCATOR64_MARK or disk or disks != 1 or place != at - _END64.size:
        raise broken("a damaged 64-bit end record")
    fields = _END64.unpack(read_at(place, _END64.size))
    mark, length, _, _, disk, first_disk, on_disk, count, size, offset = fields
    if mark != _END64_MARK or length != _END64.size - 12 or disk or first_disk or on_disk != count:
        raise broken("a damaged 64-bit end record")
    return place, count, size, offset


def _members(data: bytes, count: int, limit: int) -> Iterator[Member]:
    seen: set[str] = set()
    at = 0
    for _ in range(count):
        if len(data) - at < _CENTRAL.size:
            raise broken("a directory with fewer entries than the end record says")
        fields = _CENTRAL.unpack_from(data, at)
        mark, _, _, flags, method, _, _, crc, packed, raw, name_length, extra_length, comment_length = fields[:13]
        disk, _, _, offset = fields[13:]
        name_end = at + _CENTRAL.size + name_length
        extra_end = name_end + extra_length
        if mark != _CENTRAL_MARK or extra_end + comment_length > len(data):
            raise broken("a damaged directory entry")
        name = _name(data[name_end - name_length : name_end], flags)
        raw, packed, offset = _long_values([raw, packed, offset], data[name_end:extra_end], name)
        member = Member(name, method, flags, crc, packed, raw, offset)
        _judge(member, limit, disk)
        if name in seen:
            raise broken("two members of that name", what=shown(name), expected="each name once")
        seen.add(name)
        at = extra_end + comment_length
        yield member
    if at != len(data):
        raise broken("a directory with more entries than the end record says")


def _judge(member: Member, limit: int, disk: int) -> None:
    what = shown(member.name)
    if member.flags & ~_KNOWN_FLAGS:
        found = "an encrypted member" if member.flags & 1 else f"flags {member.flags:#06x}"
        raise broken(found, what=what, expected="a plain zip member")
    if member.method not in (STORED, DEFLATED):
        raise broken(f"method {member.method}", what=what, expected="a member that is stored or deflated")
    if disk or member.offset + _LOCAL.size + member.packed_bytes > limit:
        raise broken("data outside the file", what=what)
    most = member.packed_bytes * (1 if member.method == STORED else _MOST_GROWTH)
    if member.raw_bytes > most or (member.method == STORED and member.raw_bytes != member.packed_bytes):
        raise broken(
            f"{member.raw_bytes} bytes declared, which {member.packed_bytes} packed ones cannot hold", what=what
        )


def read_local_header(read_at: ReadAt, member: Member) -> int:
    """Check that the record in front of a member agrees with the directory; give the place where its data starts."""
    what = shown(member.name)
    fields = _LOCAL.unpack(read_at(member.offset, _LOCAL.size))
    mark, _, flags, method, _, _, crc, packed, raw, name_length, extra_length = fields
    if mark != _LOCAL_MARK or (flags, method) != (member.flags, member.method):
        raise broken("a local header that contradicts the directory", what=what)
    rest = read_at(member.offset + _LOCAL.size, name_length + extra_length)
    raw, packed = _long_values([raw, packed], rest[name_length:], member.name)
    told = (crc, packed, raw)
    # A writer that could not seek back left zeros here and put the figures behind the data.
    if told != (member.crc, member.packed_bytes, member.raw_bytes) and not (flags & _DESCRIPTOR_FLAG and not any(told)):
        raise broken("a local header that contradicts the directory", what=what)
    if _name(rest[:name_length], flags) != member.name:
        raise broken("a local header with another name", what=what)
    return member.offset + _LOCAL.size + len(rest)


def refuse_overlaps(extents: list[tuple[int, int]], limit: int) -> None:
    """Refuse members that share bytes, the way by which a small file claims to hold an endless one.

    Args:
        extents: first byte of the local header and last byte of the data, plus one, of each member.
        limit: where the directory starts.
    """
    free = 0
    for start, end in sorted(extents):
        if start < free:
            raise broken("members that overlap")
        free = end
    if free > limit:
        raise broken("a member that reaches into the directory")


def shown(name: str) -> str:
    """Give the name of a member as the user knows it: without ``.npy``, cut to a readable length."""
    key = name[:-4] if name.endswith(".npy") else name
    return key if len(key) <= 80 and key.isprintable() else ascii(key[:80])


def _name(data: bytes, flags: int) -> str:
    try:
        return data.decode("utf-8" if flags & _UTF8_FLAG else "cp437")
    except UnicodeDecodeError:
        raise broken("a member whose name is not text") from None


def _long_values(values: list[int], extra: bytes, name: str) -> list[int]:
    if _MAX32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wanted = [index for index, value in enumerate(values) if value == _MAX32]
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
