"""The zip container: its records as they are written, and what is said of one that is broken.

Records always carry 64-bit sizes in front of the data, as numpy's do, and never a data descriptor behind it, so that readers which
follow the local headers work too. Source of all layouts: APPNOTE.TXT 6.3.10 by PKWARE.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from branchkey_integrations.errors import ArchiveError

STORED, DEFLATED = 0, 8
#: Most members of an archive; the largest published models have some 50,000 tensors.
MAX_MEMBERS = 65_535

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
LOCATOR64 = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
SIZES64 = struct.Struct("<2H2Q")
LOCAL_MARK, CENTRAL_MARK, END_MARK = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
LOCATOR64_MARK, END64_MARK = b"PK\x06\x07", b"PK\x06\x06"
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
_VERSION = 45  # the first with 64-bit sizes
_UNIX, _FILE_MODE = 3, 0o600
_NO_TIME, _FIRST_DAY = 0, 1 << 5 | 1  # 1980-01-01: equal layers shall give equal bytes
DESCRIPTOR_FLAG, UTF8_FLAG = 1 << 3, 1 << 11


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
    sizes = SIZES64.pack(1, 16, member.raw_bytes, member.packed_bytes)
    times = (_NO_TIME, _FIRST_DAY)
    start = LOCAL.pack(LOCAL_MARK, _VERSION, 0, member.method, *times, member.crc, MAX32, MAX32, len(name), len(sizes))
    return start + name + sizes


def directory(members: Iterable[Member], offset: int) -> Iterator[bytes]:
    """Make the records behind the last member, which ends at ``offset``."""
    size = count = 0
    for member in members:
        record = central_record(member)
        size += len(record)
        count += 1
        yield record
    yield from end_records(count, size, offset)


def end_records(count: int, size: int, offset: int) -> Iterator[bytes]:
    """Make what stands behind a directory of ``count`` records and ``size`` bytes, which starts at ``offset``."""
    if count >= MAX16 or size >= MAX32 or offset >= MAX32:
        place = (0, 0, count, count, size, offset)
        yield END64.pack(END64_MARK, END64.size - 12, _VERSION, _VERSION, *place)
        yield LOCATOR64.pack(LOCATOR64_MARK, 0, offset + size, 1)
    short = min(count, MAX16)
    yield END.pack(END_MARK, 0, 0, short, short, min(size, MAX32), min(offset, MAX32), 0)


def central_record(member: Member) -> bytes:
    """Make a member's entry in the directory."""
    name = member.name.encode("ascii")
    values = (member.raw_bytes, member.packed_bytes, member.offset)
    long = [value for value in values if value >= MAX32]
    extra = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    raw, packed, offset = (min(value, MAX32) for value in values)
    start = CENTRAL.pack(
        CENTRAL_MARK,
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


def shown(name: str) -> str:
    """Give the name of a member as the user knows it: without ``.npy``, cut to a readable length."""
    key = name[:-4] if name.endswith(".npy") else name
    return key if len(key) <= 80 and key.isprintable() else ascii(key[:80])
