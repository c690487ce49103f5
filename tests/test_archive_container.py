"""Containers that lie or are damaged: refused before memory is taken, at the latest when a layer is read."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_zip
from branchkey_integrations.archive import (
    Archive,
)
from branchkey_integrations.archive_directory import find_directory, read_local_header, read_members
from branchkey_integrations.archive_stream import ByteSource, MemberStream
from branchkey_integrations.errors import ArchiveError
from tests.support import archives
from tests.support.archives import (
    CENTRAL,
    END,
    LOCAL,
    deflated,
    forged,
    header,
    layers,
    matches,
    npy,
    npz,
    patched,
    refusal,
    zipped,
)


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


def sound() -> bytes:
    """Give a small archive whose records all lie where the tests below expect them."""
    return npz({"layer_0": np.arange(8, dtype="f4")})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ((CENTRAL, 8, b"\x01\x00"), "encrypted"),
        ((CENTRAL, 8, b"\x20\x00"), "flags 0x0020"),
        ((CENTRAL, 10, b"\x0c\x00"), "method 12"),
        ((CENTRAL, 10, b"\x63\x00"), "method 99"),
        ((CENTRAL, 10, b"\x00\x00"), "declared"),
        ((CENTRAL, 16, b"\x00\x00\x00\x00"), "contradicts the directory"),
        ((CENTRAL, 20, b"\xf0\xff\xff\x7f"), "outside the file"),
        ((CENTRAL, 24, b"\xf0\xff\xff\x7f"), "2147483632 bytes declared"),
        ((CENTRAL, 24, b"\x01\x00\x00\x00"), "contradicts the directory"),
        ((CENTRAL, 24, b"\xff\xff\xff\xff"), "64-bit sizes that are missing"),
        ((CENTRAL, 42, b"\x01\x00\x00\x00"), "contradicts the directory"),
        ((CENTRAL, 42, b"\xf0\xff\xff\x7f"), "outside the file"),
        ((CENTRAL, 34, b"\x01\x00"), "outside the file"),
        ((CENTRAL, 28, b"\xff\xff"), "damaged directory entry"),
        ((CENTRAL, 28, b"\x0a\x00"), "raw member|damaged|more entries"),
        ((CENTRAL, 0, b"QK"), "damaged directory entry"),
        ((LOCAL, 0, b"QK"), "contradicts the directory|other data"),
        ((LOCAL, 14, b"\x00\x00\x00\x00"), "contradicts the directory"),
        ((LOCAL, 26, b"\xff\xff"), "ends too early|contradicts|missing|another name|another"),
        ((LOCAL, 30, b"layer_1"), "another name"),
        ((END, 8, b"\x02\x00\x02\x00"), "directory that does not lie|fewer entries"),
        ((END, 8, b"\x00\x00\x00\x00"), "more entries"),
        ((END, 8, b"\x02\x00"), "damaged end record"),
        ((END, 4, b"\x01\x00"), "damaged end record"),
        ((END, 16, b"\x00\x00\x00\x00"), "directory that does not lie"),
        ((END, 16, b"\xff\xff\xff\xff"), "64-bit end record"),
        ((END, 20, b"\x05\x00"), "damaged end record|truncated"),
    ],
)
def test_every_field_of_the_container_is_checked(change: Any, found: str) -> None:
    assert matches(found, refusal(patched(sound(), change)))


def test_an_archive_with_a_comment_is_read() -> None:
    data = patched(sound(), (END, 20, b"\x05\x00")) + b"hello"
    assert Archive.open(io.BytesIO(data))[0][7] == 7


def test_a_zip_bomb_of_shared_bytes_is_refused() -> None:
    buffer = io.BytesIO()
    member = npy(header(shape="(262144,)"), bytes(1 << 20))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for index in range(20):
            file.writestr(f"layer_{index}.npy", member)
        for entry in file.infolist():
            entry.header_offset = file.infolist()[0].header_offset
    assert matches("another name|overlap", refusal(buffer.getvalue()))
    # The same with names that agree: the second local header lies inside the data of the first member.
    inner = zipped({"layer_1.npy": npy(header(), bytes(8))}, zipfile.ZIP_STORED)
    inner = inner[: inner.rfind(CENTRAL)]
    outer_header = npy(header("'|u1'", f"({len(inner)},)"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("layer_0.npy", outer_header + inner)
        file.writestr("layer_1.npy", npy(header(), bytes(8)))
        file.infolist()[1].header_offset = 30 + len("layer_0.npy") + len(outer_header)
    assert "members that overlap" in refusal(buffer.getvalue())


SIXTEEN = npy(header(shape="(16,)"), bytes(64))


@pytest.mark.parametrize(
    ("values", "found"),
    [(64, None), (60, "ends too early"), (0, "ends too early"), (68, "more data than declared"), (10**7, "more data")],
)
def test_a_member_that_unpacks_to_another_size_than_declared_is_refused(values: int, found: str | None) -> None:
    content = SIXTEEN[:-64] + bytes(values)
    data = forged(deflated(content), raw_bytes=len(SIXTEEN), crc=zlib.crc32(content))
    if found is None:
        assert Archive.open(io.BytesIO(data))[0].tolist() == [0] * 16
        return
    for read in (lambda archive: archive[0], lambda archive: archive.check()):
        with pytest.raises(ArchiveError, match=f"layer_0: .*{found}"):
            read(Archive.open(io.BytesIO(data)))


def test_a_packed_stream_without_its_end_is_refused() -> None:
    for cut in (1, 2, 10):
        data = forged(deflated(SIXTEEN)[:-cut], raw_bytes=len(SIXTEEN), crc=zlib.crc32(SIXTEEN))
        assert matches("layer_0: .*too early", refusal(data))


def test_bytes_behind_the_packed_stream_are_refused() -> None:
    # Up to 8 of them go unnoticed by isal 1.7, which reads ahead; length and CRC of the values are checked all the same.
    data = forged(deflated(SIXTEEN) + b"foreign bytes", raw_bytes=len(SIXTEEN), crc=zlib.crc32(SIXTEEN))
    assert matches("layer_0: .*foreign bytes behind the data", refusal(data))
    far = forged(deflated(SIXTEEN) + bytes(10**6), raw_bytes=len(SIXTEEN), crc=zlib.crc32(SIXTEEN))
    assert matches("layer_0: .*foreign bytes behind the data", refusal(far))


def test_a_member_that_reaches_into_the_directory_is_refused() -> None:
    stream = deflated(SIXTEEN)
    member = archive_zip.Member("layer_0.npy", 8, 0, zlib.crc32(SIXTEEN), len(stream) + 20, len(SIXTEEN), 0)
    data = archive_zip.local_header(member) + stream
    assert "reaches into the directory" in refusal(data + b"".join(archive_zip.directory([member], len(data))))


def test_a_member_that_was_not_read_to_its_end_is_not_taken_for_sound() -> None:
    data = forged(deflated(SIXTEEN), raw_bytes=len(SIXTEEN), crc=zlib.crc32(SIXTEEN))
    source = ByteSource(io.BytesIO(data))
    (member,) = read_members(source.read_at, find_directory(source.read_at, source.size))
    stream = MemberStream(source, member, read_local_header(source.read_at, member))
    assert stream.take(6) == b"\x93NUMPY"
    with pytest.raises(ArchiveError, match=r"layer_0: .*longer than its header says"):
        stream.finish()
    with pytest.raises(ArchiveError, match=r"layer_0: .*shorter than its header says"):
        stream.take(len(SIXTEEN))


def test_a_wrong_crc_is_refused() -> None:
    data = forged(deflated(SIXTEEN), raw_bytes=len(SIXTEEN), crc=zlib.crc32(SIXTEEN) ^ 1)
    assert matches("layer_0: .*CRC", refusal(data))


def test_data_that_is_no_packed_stream_is_refused() -> None:
    assert matches("layer_0: .*does not unpack", refusal(forged(b"\xff" * 100, raw_bytes=len(SIXTEEN), crc=0)))


def test_more_than_any_packed_stream_can_hold_is_refused_by_the_headers() -> None:
    text = npy(header("'|u1'", "(1099511627776,)"))
    data = forged(deflated(text), raw_bytes=len(text) + 2**40, crc=0)
    with pytest.raises(
        ArchiveError, match=r"layer_0: .*1099511627\d+ bytes declared, which \d+ packed ones cannot hold"
    ):
        Archive.open(io.BytesIO(data))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_flipped_bit_in_the_values_is_refused_by_name(compressed: bool) -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype("f4")
    data = npz({"layer_0": np.zeros(3), "layer_1": values}, compressed=compressed)
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0x10
    archive = Archive.open(io.BytesIO(bytes(broken)))
    assert archive[0].tolist() == [0, 0, 0]
    for read in (lambda: archive[1], archive.check, lambda: archive.read_into(1, np.empty(10_000, "f4"))):
        with pytest.raises(ArchiveError, match=r"^layer_1: expected sound data"):
            read()


def test_damage_in_a_member_that_is_no_layer_is_found_too() -> None:
    data = npz({**layers(1), "weighting": np.array(["three"] * 500), "extra": np.arange(1000.0)}, compressed=False)
    archive = Archive.open(io.BytesIO(data.replace(np.array([500.0]).tobytes(), bytes(8))))
    with pytest.raises(ArchiveError, match=r"^extra: .*CRC"):
        archive.check()
    assert refusal(data.replace("three".encode("utf-32-le"), "seven".encode("utf-32-le"), 1)).startswith("weighting: ")


def test_what_is_declared_takes_no_memory() -> None:
    # The packed size allows 100 MB here, and the header agrees; values are only unpacked when they are asked for.
    member = npy(header(shape="(25000000,)"), bytes(100_000_000))
    data = zipped({"layer_0.npy": member})
    del member
    tracemalloc.start()
    try:
        archive = Archive.open(io.BytesIO(data))
        with pytest.raises(ArchiveError, match="at most 1000000 bytes unpacked"):
            Archive.open(io.BytesIO(data), max_bytes=1_000_000)
        archive.check()
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_hundred_thousand_members_are_refused_at_once() -> None:
    count = 100_000
    members = [archive_zip.Member(f"layer_{index}.npy", 0, 0, 0, 0, 0, 0) for index in range(count)]
    data = archive_zip.local_header(members[0])
    data += b"".join(archive_zip.directory(members, len(data)))
    tracemalloc.start()
    try:
        assert "100000 members" in refusal(data)
        # The same with a lie in the end record.
        lie = patched(data, (b"PK\x06\x06", 24, struct.pack("<QQ", 3, 3)))
        assert "directory" in refusal(lie)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_directory_of_huge_names_takes_little_memory() -> None:
    names = [f"{index:060000}.npy" for index in range(400)]
    members = [archive_zip.Member(name, 0, 0, 0, 0, 0, 0) for name in names]
    data = archive_zip.local_header(members[0])
    data += b"".join(archive_zip.directory(members, len(data)))
    assert "directory that does not lie" in refusal(data)
