"""Opening: by headers alone, with few reads and little memory, in whatever order and number the members lie."""

from __future__ import annotations

import io
import random
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_npy, archive_table, archive_zip
from branchkey_integrations.archive import Archive, LayerHeader, write_archive
from branchkey_integrations.archive_zip import Member, directory, local_header
from branchkey_integrations.errors import ArchiveError, LayoutError
from tests.support.archives import END, deflated, header, layers, npy, npz, patched, zipped


class Watched(io.BytesIO):
    """Count what is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.calls = self.bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.calls += 1
        self.bytes += len(data)
        return data


def opened(data: bytes, **options: Any) -> Archive:
    return Archive.open(io.BytesIO(data), **options)


@pytest.fixture(scope="module")
def many() -> bytes:
    """Give an archive of 5,000 small layers of two shapes."""
    buffer = io.BytesIO()
    arrays = [np.arange(20.0), np.ones((3, 4), "f4")] * 2500
    write_archive(buffer, arrays)
    return buffer.getvalue()


# --- how many layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [0, 1, 2, 4, 5, 150])
def test_another_number_of_layers_than_the_model_has_is_refused(found: int) -> None:
    with pytest.raises(LayoutError) as caught:
        opened(npz(layers(found, weighting=1.0)), layers=3)
    assert (caught.value.what, caught.value.expected) == ("aggregate", "3 layers")
    assert int(caught.value.found) in (found, found + 1)  # whether or not its other members could be told from layers


def test_the_right_number_is_taken_whatever_lies_beside_the_layers() -> None:
    for extras in (0, 1, 100):
        more = {f"x{index}": np.zeros(1) for index in range(extras)}
        assert len(opened(npz({**more, **layers(3)}), layers=3)) == 3
    assert len(opened(npz({}), layers=0)) == 0


def test_a_wrong_number_is_refused_from_the_end_record_alone(many: bytes) -> None:
    for wrong in (4999 - 100, 5001):
        source = Watched(many)
        with pytest.raises(LayoutError, match="found 5000"):
            Archive.open(source, layers=wrong)
        assert source.bytes < 200
    assert len(Archive.open(Watched(many), layers=5000)) == 5000


@pytest.mark.parametrize("layout", [None, 2])
def test_a_hundred_members_besides_the_layers_are_the_most(layout: int | None) -> None:
    extras = {f"x{index}": np.zeros(1) for index in range(101)}
    with pytest.raises((ArchiveError, LayoutError), match=r"at most 100 members besides the layers|expected 2 layers"):
        opened(npz({**layers(2), **extras}), layers=layout)
    extras.popitem()
    assert len(opened(npz({**layers(2), **extras}), layers=layout).extras) == 100


def test_names_have_at_most_a_kilobyte() -> None:
    assert opened(zipped({"x" * 1020 + ".npy": npy(header(), bytes(8))})).extras == ("x" * 1020,)
    with pytest.raises(ArchiveError, match=r"expected a name of at most 1024 bytes, found 1025"):
        opened(zipped({"x" * 1021 + ".npy": npy(header(), bytes(8))}))


@pytest.mark.parametrize("beyond", [0, 1])
def test_all_axes_together_are_limited(beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_table, "MAX_AXES_IN_ALL", 9 - beyond)
    arrays = [np.zeros((1,) * 4), np.zeros(()), np.zeros((2, 3, 1, 1, 1)), np.zeros((1,) * 4)]
    data = npz({f"layer_{index}": array for index, array in enumerate(arrays)})
    if beyond:
        with pytest.raises(ArchiveError, match="layers: expected at most 8 axes in all, found more"):
            opened(data)
    else:
        assert [each.shape for each in opened(data)] == [each.shape for each in arrays]


# --- what it costs --------------------------------------------------------------------------------------------------------


def test_small_layers_that_follow_each_other_are_looked_at_with_few_reads(many: bytes) -> None:
    source = Watched(many)
    archive = Archive.open(source)
    assert len(archive) == 5000
    assert source.calls < 100
    assert source.bytes < 2 * len(many)
    assert np.array_equal(archive[4998], np.arange(20.0))


def test_large_layers_are_not_read_to_look_at_them() -> None:
    buffer = io.BytesIO()
    write_archive(buffer, [np.random.default_rng(0).normal(size=100_000)] * 20, compression="store")
    source = Watched(buffer.getvalue())
    assert len(Archive.open(source)) == 20
    assert source.bytes < 150_000


def traced(action: Callable[[], Any]) -> tuple[int, int, Any]:
    """Give the most memory taken at a time, what is left of it, and the result."""
    tracemalloc.start()
    try:
        result = action()
        left, peak = tracemalloc.get_traced_memory()
        return peak, left, result
    finally:
        tracemalloc.stop()


def test_a_layer_more_costs_some_tens_of_bytes(many: bytes) -> None:
    source = io.BytesIO(many)
    Archive.open(source)
    # A third of what is left is the numbers; most of the peak is one window of the directory.
    peak, left, archive = traced(lambda: Archive.open(source))
    assert len(archive) == 5000
    assert left < 80 * 5000
    assert peak < 200 * 5000 + 600_000


def test_writing_a_layer_more_costs_the_size_of_its_entry() -> None:
    arrays = [np.ones(3, "f4")] * 5000
    write_archive(io.BytesIO(), arrays[:2])
    with open("/dev/null", "wb") as nowhere:
        peak, left, info = traced(lambda: write_archive(nowhere, arrays))
    assert len(info.layers) == 5000
    assert left < 20 * 5000 + 10_000
    assert peak < 160 * 5000 + 500_000


# --- headers --------------------------------------------------------------------------------------------------------------


def test_headers_are_a_sequence_like_any_other() -> None:
    shapes = [(2,), (3, 1), (), (2,)]
    archive = opened(npz({f"layer_{index}": np.zeros(shape, "f4") for index, shape in enumerate(shapes)}))
    wanted = [LayerHeader(shape, np.dtype("f4")) for shape in shapes]
    found = archive.headers
    assert len(found) == 4
    assert list(found) == wanted
    assert [found[index] for index in range(-4, 4)] == wanted + wanted
    assert found[1:] == tuple(wanted[1:])
    assert found[::-2] == tuple(wanted[::-2])
    assert found == tuple(wanted)
    assert found == wanted
    assert found != wanted[:3]
    assert found != [*wanted[:3], wanted[1]]
    assert found != 5
    assert repr(found) == repr(tuple(wanted))
    assert wanted[1] in found
    assert found.index(wanted[2]) == 2
    for index in (4, -5):
        with pytest.raises(IndexError):
            found[index]
        with pytest.raises(IndexError):
            archive[index]


@pytest.mark.parametrize("compressed", [True, False])
def test_each_of_more_shapes_than_are_remembered_is_read_right(compressed: bool) -> None:
    shapes = [(index % 1300, 1 + index % 3, 0) for index in range(2700)]
    archive = opened(
        npz({f"layer_{index}": np.zeros(shape, "i1") for index, shape in enumerate(shapes)}, compressed=compressed)
    )
    for _ in range(2):
        assert [each.shape for each in archive.headers] == shapes
    assert archive[2699].shape == shapes[2699]


def test_a_header_seen_before_does_not_excuse_another_size() -> None:
    good, short = npy(header() + " " * 60, bytes(8)), npy(header() + " " * 60, bytes(4))
    assert len(good) == 128 + 8
    assert len(opened(zipped({"layer_0.npy": good, "layer_1.npy": good}))) == 2
    with pytest.raises(ArchiveError, match=r"layer_1: expected 8 bytes of values .*found 4 bytes declared"):
        opened(zipped({"layer_0.npy": good, "layer_1.npy": short}))


def test_headers_that_differ_behind_their_first_bytes_are_told_apart() -> None:
    arrays = [np.arange(6).reshape((1,) * 30 + tail) for tail in [(2, 3), (3, 2), (2, 3)]]
    archive = opened(npz({f"layer_{index}": array for index, array in enumerate(arrays)}))
    assert [each.shape[-2:] for each in archive.headers] == [(2, 3), (3, 2), (2, 3)]


def test_a_header_of_another_version_is_read_to_its_end() -> None:
    text = header()[:-1] + " " * 60 + "}"
    data = npy(text, bytes(8), version=2)
    assert len(data) == 130 + 8  # two bytes longer than what is looked at first
    assert opened(zipped({"layer_0.npy": data}))[0].shape == (2,)


def test_the_first_missing_and_the_last_layer_are_named_whatever_their_order() -> None:
    members = {f"layer_{index}.npy": npy(header(), bytes(8)) for index in (0, 7, 3)}
    with pytest.raises(ArchiveError, match=r"layer_1: .*found layers up to layer_7 without it"):
        opened(zipped(members))


def test_arrays_of_each_order_and_kind_are_told_apart_where_all_else_is_equal() -> None:
    arrays = [np.arange(6, dtype="<i4").reshape(2, 3)]
    arrays += [arrays[0].astype(">i4"), np.asfortranarray(arrays[0]), arrays[0].astype("<u4"), arrays[0].astype("<f4")]
    arrays *= 2
    archive = opened(npz({f"layer_{index}": array for index, array in enumerate(arrays)}))
    assert [each.dtype.str for each in archive.headers] == ["<i4", "<i4", "<i4", "<u4", "<f4"] * 2
    assert [archive.in_c_order(index) for index in range(5)] == [True, True, False, True, True]
    for found, given in zip(archive, arrays):
        assert np.array_equal(found, given)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1,) * 9, (1,) * 32, (12345, 0)])
@pytest.mark.parametrize("descr", ["<f4", ">f8", "|b1", "|i1"])
def test_numpys_own_headers_are_read_the_quick_way_and_the_slow_way_alike(
    descr: str, shape: tuple[int, ...], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    array = np.ones(shape, descr)
    np.lib.format.write_array(buffer, array, version=(version, 0))
    data = buffer.getvalue()

    def decoded() -> archive_npy.NpyHeader:
        return archive_npy.decode("layer_0", io.BytesIO(data).read, len(data))

    text = data[10 if version == 1 else 12 :].split(b"\n")[0].decode() + "\n"
    assert archive_npy._NUMPYS.fullmatch(text)
    quick = decoded()
    monkeypatch.setattr(archive_npy, "_NUMPYS", archive_npy.re.compile("(?!)"))
    assert decoded() == quick
    assert quick.layer == LayerHeader(shape, np.dtype(descr).newbyteorder("="))
    assert np.array_equal(opened(zipped({"layer_0.npy": data}))[0], array)


@pytest.mark.parametrize(
    "shape", ["(3)", "(3,,)", "(3 ,)", "(03,)", "(3,4,)", "(,)", "(3, 4", "(1e3,)", "(٣,)", "(-3,)"]
)
def test_the_quick_way_takes_nothing_but_what_numpy_writes(shape: str) -> None:
    text = header(shape=shape) + "\n"
    assert archive_npy._NUMPYS.fullmatch(header(shape="(3, 4)") + "   \n")
    assert archive_npy._NUMPYS.fullmatch(text) is None


# --- where the members lie ------------------------------------------------------------------------------------------------


def scattered(order: list[int], gaps: list[int], contents: list[bytes], names: list[str]) -> bytes:
    """Give an archive whose members lie in this order with so many foreign bytes before each."""
    data, members = bytearray(), {}
    for index, gap in zip(order, gaps):
        # The first local header is where the file starts; what lies between members belongs to nobody.
        data += bytes(gap if data else 0)
        stream = deflated(contents[index])
        crc = crc_of(contents[index])
        members[index] = Member(names[index], 8, 0, crc, len(stream), len(contents[index]), len(data))
        data += local_header(members[index]) + stream
    return bytes(data) + b"".join(directory([members[index] for index in range(len(names))], len(data)))


def crc_of(data: bytes) -> int:
    return zlib.crc32(data)


@pytest.mark.parametrize("seed", range(5))
def test_members_are_found_in_whatever_order_and_distance_they_lie(seed: int) -> None:
    dice = random.Random(seed)
    arrays = [np.full(dice.choice([1, 10, 30_000]), index, "f4") for index in range(20)]
    contents = [npy(header(shape=f"({array.size},)"), array.tobytes()) for array in arrays]
    names = [f"layer_{index}.npy" for index in range(18)] + ["weighting.npy", "other.npy"]
    contents[18] = npy(header(shape="(1,)"), np.float32(7).tobytes())
    order = dice.sample(range(20), 20)
    gaps = [dice.choice([0, 0, 1, 500, 70_000]) for _ in order]
    archive = opened(scattered(order, gaps, contents, names), layers=18)
    assert (archive.weighting, archive.extras) == (7.0, ("weighting", "other"))
    assert all(np.array_equal(found, array) for found, array in zip(archive, arrays))
    archive.check()


@pytest.mark.parametrize("names", [["layer_0.npy", "layer_1.npy"], ["layer_0.npy", "x.npy"], ["x.npy", "layer_0.npy"]])
def test_members_that_share_bytes_are_refused_whatever_they_are(names: list[str]) -> None:
    content = npy(header(), bytes(8))
    stream, crc = deflated(content), crc_of(content)
    inner = Member(names[1], 8, 0, crc, len(stream), len(content), 0)
    # The values of the first, which is stored, are all of the second.
    packed = local_header(inner) + stream
    start = npy(header("'|u1'", f"({len(packed)},)"))
    outer = start + packed
    first = Member(names[0], 0, 0, crc_of(outer), len(outer), len(outer), 0)
    at = len(local_header(first)) + len(start)
    data = local_header(first) + outer
    data += b"".join(directory([first, inner._replace(offset=at)], len(data)))
    with pytest.raises(ArchiveError, match=r"members that overlap"):
        opened(data)


@pytest.mark.parametrize(
    ("mark", "offset", "new"),
    [
        (b"PK\x06\x07", 0, b"PK\x06\x00"),
        (b"PK\x06\x07", 4, b"\x01"),
        (b"PK\x06\x07", 8, b"\x00"),
        (b"PK\x06\x07", 16, b"\x02"),
        (b"PK\x06\x06", 0, b"PK\x06\x00"),
        (b"PK\x06\x06", 4, b"\x2d"),
        (b"PK\x06\x06", 16, b"\x01"),
        (b"PK\x06\x06", 20, b"\x01"),
        (b"PK\x06\x06", 24, b"\x03"),
    ],
)
def test_each_field_of_the_long_end_records_counts(
    mark: bytes, offset: int, new: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(archive_zip, "MAX16", 2)  # in place of writing 65,535 layers
        write_archive(buffer, [np.zeros(3), np.zeros(4)])
    data = patched(buffer.getvalue(), (END, 8, b"\xff\xff\xff\xff"))
    assert len(opened(data)) == 2
    found = "found a (damaged (64-bit )?end record|directory that does not lie where the end record says)"
    with pytest.raises(ArchiveError, match=found):
        opened(patched(data, (mark, offset, new)))


@pytest.mark.parametrize("said", [2, 4], ids=["fewer", "more"])
def test_a_directory_holds_as_many_entries_as_the_end_record_says(said: int) -> None:
    data = npz({**layers(2), "x" * 200: np.zeros(1)})
    assert len(opened(data)) == 2
    count = said.to_bytes(2, "little")
    with pytest.raises(ArchiveError, match=r"a directory with (fewer|more) entries than the end record says"):
        opened(patched(data, (END, 8, count + count)))


def test_as_many_members_as_the_short_end_record_can_tell_are_no_sign_of_a_long_one() -> None:
    # Python's zipfile writes the long one for more than 65,535 only.
    buffer, one = io.BytesIO(), npy(header(), bytes(8))
    with zipfile.ZipFile(buffer, "w") as file:
        for index in range(65_535):
            file.writestr(f"layer_{index}.npy", one)
    assert len(opened(buffer.getvalue())) == 65_535
