"""Judge an archive by its headers alone, with few reads and in little memory, whatever the number of its members."""

from __future__ import annotations

import io
import re
import zlib
from typing import NamedTuple

from branchkey_integrations import archive_npy
from branchkey_integrations.archive_directory import ReadAt, find_directory, read_local_header, read_members
from branchkey_integrations.archive_stream import ByteSource, MemberStream
from branchkey_integrations.archive_table import MemberTable
from branchkey_integrations.archive_zip import STORED, Member, broken, shown
from branchkey_integrations.errors import LayoutError

#: Most members that are no layers. Numpy's archives have as many as the sender named; the platform's have one or none.
MAX_EXTRAS = 100
#: Packed bytes that nearly always hold an array's header; a stream reads on where they do not.
HEADER_FEED_BYTES = 1024

#: Nine digits are more than there can be members, and few enough for int() to be quick.
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,8})\.npy", re.ASCII)
#: What numpy's headers of arrays of up to some ten axes take.
_HEAD_BYTES = 128
_FAR_BYTES, _NEAR_BYTES = 1024, 64 * 1024


class Opened(NamedTuple):
    """Say what was found in an archive."""

    layers: MemberTable
    #: The members that are no layers, by name, and where their data starts.
    extras: dict[str, tuple[Member, int]]


class _Window:
    """Read small pieces that mostly follow each other with few calls."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self._size = read_at, size
        self._data, self._start, self._end = b"", 0, 0

    def __call__(self, offset: int, count: int) -> bytes:
        at = offset - self._start
        if at < 0 or offset + count > self._end:
            # Members of some size lie far apart: most of a large piece would be read for nothing.
            near = 0 <= offset - self._end < _NEAR_BYTES or self._start <= offset < self._end
            wanted = max(count, _NEAR_BYTES if near else _FAR_BYTES)
            self._data = self._read_at(offset, max(count, min(wanted, self._size - offset)))
            self._start, self._end, at = offset, offset + len(self._data), 0
        return self._data[at : at + count]


def open_members(source: ByteSource, layers: int | None, max_bytes: int | None) -> Opened:
    """Read directory and headers of an archive.

    Args:
        source: its bytes.
        layers: how many there must be; None for any number. Another one is refused from the end record alone.
        max_bytes: most bytes that all members may take unpacked; None for no limit.

    Raises:
        LayoutError: another number of layers.
        ArchiveError: a broken or forged archive; names the member.
    """
    directory = find_directory(source.read_at, source.size)
    if layers is not None and not layers <= directory.members <= layers + MAX_EXTRAS:
        raise _another_count(layers, directory.members)
    table = MemberTable(directory.members)
    extras: dict[str, Member] = {}
    total = 0
    for member in read_members(source.read_at, directory):
        match = _LAYER.fullmatch(member.name)
        if match:
            table.add(int(match[1]), member)
        else:
            extras[_extra(member, extras)] = member
        total += member.raw_bytes
    table.demand_all()
    if layers is not None and len(table) != layers:
        raise _another_count(layers, len(table))
    if max_bytes is not None and total > max_bytes:
        raise broken(f"{total} bytes", expected=f"at most {max_bytes} bytes unpacked")
    return Opened(table, _look_at_all(source, table, extras, directory.start))


def _another_count(expected: int, found: int) -> LayoutError:
    return LayoutError(
        what="aggregate",
        expected=f"{expected} layers",
        found=str(found),
        fix="All leaves of a branch need the same model and the same choice of parameters",
    )


def _extra(member: Member, extras: dict[str, Member]) -> str:
    """Judge the name of a member that is no layer."""
    name = member.name
    if not name.endswith(".npy"):
        raise broken("a raw member", what=shown(name), expected="arrays only, named *.npy")
    if name.startswith("layer_"):
        raise broken("another name", what=shown(name), expected="names layer_0, layer_1, layer_2 and so on")
    key = name[: -len(".npy")]
    if key in extras:
        raise broken("two members of that name", what=shown(name), expected="each name once")
    if len(extras) == MAX_EXTRAS:
        raise broken("more", expected=f"at most {MAX_EXTRAS} members besides the layers")
    return key


def _look_at_all(
    source: ByteSource, table: MemberTable, extras: dict[str, Member], limit: int
) -> dict[str, tuple[Member, int]]:
    """Look at the local header of each member and the header of its array, in the order of the file.

    Members must not share bytes: that is the way by which a small file claims to hold an endless one. Names that are wrong
    in one of their two places betray damage, in members that are no layers too.
    """
    window = _Window(source.read_at, source.size)
    others = sorted(extras.items(), key=lambda item: -item[1].offset)
    placed: dict[str, tuple[Member, int]] = {}
    free = 0

    def start_of(member: Member) -> int:
        nonlocal free
        if member.offset < free:
            raise broken("members that overlap", what=shown(member.name))
        start = read_local_header(window, member)
        free = start + member.packed_bytes
        if free > limit:
            raise broken("a member that reaches into the directory", what=shown(member.name))
        return start

    def pass_extra() -> None:
        key, member = others.pop()
        placed[key] = (member, start_of(member))

    for index in table.in_file_order():
        member = table.member(index)
        while others and others[-1][1].offset <= member.offset:
            pass_extra()
        start = start_of(member)
        table.place(index, start, _header_of(source, window, table, member, start))
    while others:
        pass_extra()
    table.headers.forget_bytes()
    for key, (member, start) in placed.items():
        stream = MemberStream(source, member, start, HEADER_FEED_BYTES)
        text, _ = archive_npy.read_text(shown(member.name), stream.take)
        archive_npy.refuse_objects(shown(key), text)
    return {key: placed[key] for key in extras}


def _header_of(source: ByteSource, window: _Window, table: MemberTable, member: Member, start: int) -> int:
    head = _head(window, member, start)
    known = table.headers.known(head)
    if known is not None and known[1] == member.raw_bytes:
        return known[0]
    # A header that is there as a whole need not be unpacked again.
    whole = len(head) >= 10 and head[6] == 1 and 10 + int.from_bytes(head[8:10], "little") <= len(head)
    take = io.BytesIO(head).read if whole else MemberStream(source, member, start, HEADER_FEED_BYTES).take
    return table.headers.add(archive_npy.decode(member.name[: -len(".npy")], take, member.raw_bytes), head)


def _head(window: _Window, member: Member, start: int) -> bytes:
    """Give up to 128 unpacked bytes of a member; none where they cannot be had at once, for the stream to say why."""
    if member.method == STORED:
        return window(start, min(member.packed_bytes, _HEAD_BYTES))
    packed = window(start, min(member.packed_bytes, HEADER_FEED_BYTES))
    try:
        # The standard library, which starts three times as fast as ISA-L and needs no speed for so few bytes.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, _HEAD_BYTES)
    except zlib.error:
        return b""
