"""Every hostile archive is refused, or read right, before it has cost memory: measured in a process that does nothing else.

What each field of the container and of the headers may be is tested in test_archive_container and test_archive_members.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_zip
from tests.support.archives import CENTRAL, END, LOCAL, deflated, header, layers, npy, npz, patched, zipped
from tests.support.leaks import REPOSITORY

_MOST_BYTES = 20_000_000
#: Each takes milliseconds, those of most members half a second; this is for a machine that does many other things.
_MOST_S = 5.0
_MANY = 65_000

#: What a leaf does with a download: judge the container, judge the headers against its model, read the values; and what is done
#: with one where no model is known.
_CHILD = """
import json, sys, time
from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.gate import Gate
from branchkey_integrations.parameters import LayerSpec, Layout

LAYOUT = Layout((LayerSpec("weight", (4, 4), "float32"), LayerSpec("bias", (4, 4), "float32")))

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def judge(path):
    try:
        with Archive.open(path, layers=len(LAYOUT)) as archive:
            Gate().check("a1", archive, LAYOUT)
            return "loaded " + str([float(archive[index][1, 2]) for index in range(len(archive))])
    except BranchKeyError as error:
        return f"{type(error).__name__}: {error}"

def look(path):
    try:
        with Archive.open(path) as archive:
            sum(header.nbytes for header in archive.headers)
            return f"opened {len(archive)}, the last of shape {archive.headers[-1].shape if len(archive) else None}"
    except BranchKeyError as error:
        return f"{type(error).__name__}: {error}"

def measured(action, path):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before, began = status("VmRSS"), time.monotonic()
    return [action(path), time.monotonic() - began, status("VmHWM") - before]

judge(sys.argv[1])  # whatever is imported or set up at the first time
look(sys.argv[1])
print(json.dumps({path: [measured(judge, path), measured(look, path)] for path in sys.argv[1:]}))
"""


class Fatal:
    """End the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (77,)


def pickled() -> np.ndarray:
    objects = np.empty((4, 4), object)
    objects[...] = Fatal()
    return objects


def built(*streams: tuple[bytes, int, int]) -> bytes:
    """Put layers together of packed bytes, and the size and CRC that they claim."""
    data, members = b"", []
    for index, (stream, raw_bytes, crc) in enumerate(streams):
        member = archive_zip.Member(f"layer_{index}.npy", 8, 0, crc, len(stream), raw_bytes, len(data))
        data += archive_zip.local_header(member) + stream
        members.append(member)
    return data + b"".join(archive_zip.directory(members, len(data)))


SOUND = npy(header(shape="(4, 4)"), bytes(64))


@functools.lru_cache(maxsize=1)
def honest_bomb() -> bytes:
    """Declare a quarter of a gigabyte and hold it: some kilobytes of packed zeros."""
    count = 1 << 28
    start = npy(header(shape=f"({count // 4},)"))
    stream = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = [stream.compress(start)] + [stream.compress(bytes(1 << 20)) for _ in range(count >> 20)] + [stream.flush()]
    return built((b"".join(packed), len(start) + count, 0), (deflated(SOUND), len(SOUND), zlib.crc32(SOUND)))


def lying_bomb() -> bytes:
    """Declare the model's layer, and unpack to far more."""
    return built((deflated(SOUND + bytes(50_000_000)), len(SOUND), 0), (deflated(SOUND), len(SOUND), zlib.crc32(SOUND)))


def nested_bomb() -> bytes:
    """Hold an archive in an archive in an archive."""
    inner = honest_bomb()
    for _ in range(3):
        inner = zipped({"layer_0.npy": inner, "layer_1.npy": SOUND})
    return inner


@functools.lru_cache(maxsize=1)
def many_members() -> bytes:
    members = [archive_zip.Member(f"layer_{index}.npy", 0, 0, 0, 0, 0, 0) for index in range(100_000)]
    data = archive_zip.local_header(members[0])
    return data + b"".join(archive_zip.directory(members, len(data)))


def sound(count: int, shape_of: Callable[[int], tuple[int, ...]], extra: bytes = b"") -> bytes:
    """Give a sound archive of so many layers without values, each of its own shape."""
    data, entries = bytearray(), bytearray()
    for index in range(count):
        text = header(shape=str(shape_of(index)))
        content = npy(text + " " * (117 - len(text)))
        name = b"layer_%d.npy" % index
        sizes = (zlib.crc32(content), len(content), len(content))
        entries += struct.pack(
            "<4s6H3I5H2I", CENTRAL, 45, 45, 0, 0, 0, 33, *sizes, len(name), len(extra), 0, 0, 0, 0, len(data)
        )
        entries += name + extra
        data += struct.pack("<4s5H3I2H", LOCAL, 45, 0, 0, 0, 33, *sizes, len(name), 0) + name + content
    return bytes(data + entries + b"".join(archive_zip.end_records(count, len(entries), len(data))))


def many_extras(count: int) -> bytes:
    return npz({f"extra_{index}": np.zeros(1, "f4") for index in range(count)} | layers(2, value=3.0), compressed=False)


def with_zip64() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in layers(2, value=3.0).items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array)
    return buffer.getvalue()


def placed(dtype: str, order: Any = "C") -> bytes:
    array = np.arange(16).reshape(4, 4).astype(dtype)
    return npz({"layer_0": np.asarray(array, order=order), "layer_1": np.asarray(array + 1, order=order)})


GOOD = npz(layers(2, value=3.0))
READ = {
    "plain": (GOOD, [3.0, 3.0]),
    "zip64": (with_zip64(), [3.0, 3.0]),
    "Fortran order": (placed("<f4", "F"), [6.0, 7.0]),
    "big-endian": (placed(">f4"), [6.0, 7.0]),
    "float64": (placed("<f8"), [6.0, 7.0]),
    "float16": (placed("<f2"), [6.0, 7.0]),
}
_REST = {"layer_1": np.zeros((4, 4), "f4")}


#: Each kind, how it is made, and the words in which it is refused.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "objects": (lambda: npz({"layer_0": pickled(), **_REST}), r"layer_0: .*pickled arrays are not accepted"),
    "an honest zip bomb": (
        honest_bomb,
        r"AggregateRejectedError: .*layer_0.*expected shape \(4, 4\), found shape \(67108864,\)",
    ),
    "a lying zip bomb": (lying_bomb, r"AggregateRejectedError: .*layer_0.*found more data than declared"),
    "a nested zip bomb": (nested_bomb, r"layer_0: expected an array in numpy's format"),
    "a terabyte declared": (
        lambda: zipped({"layer_0.npy": npy(header(shape="(1000000, 1000000)"), bytes(64)), "layer_1.npy": SOUND}),
        r"layer_0: expected 4000000000000 bytes",
    ),
    "two gigabytes declared by the container": (
        lambda: patched(GOOD, (CENTRAL, 24, b"\xf0\xff\xff\x7f")),
        r"2147483632 bytes declared",
    ),
    "sizes beyond memory": (
        lambda: zipped(
            {"layer_0.npy": npy(header(shape="(9223372036854775807, 9223372036854775807)")), "layer_1.npy": SOUND}
        ),
        r"layer_0: expected an array that fits into memory",
    ),
    "a wrong CRC": (
        lambda: patched(GOOD, (CENTRAL, 16, b"\x01\x02\x03\x04"), (LOCAL, 14, b"\x01\x02\x03\x04")),
        r"layer_1.*CRC [0-9a-f]{8} where the archive says 04030201",
    ),
    "a duplicate": (
        lambda: patched(GOOD, (LOCAL, 30, b"layer_0"), (CENTRAL, 46, b"layer_0")),
        r"layer_0.*(twice|once)",
    ),
    "an encrypted member": (
        lambda: patched(GOOD, (CENTRAL, 8, b"\x01\x00"), (LOCAL, 6, b"\x01\x00")),
        r"found an encrypted member",
    ),
    "void": (lambda: npz({"layer_0": np.zeros((4, 4), "V2"), **_REST}), r"layer_0: .*dtype '\|V2'"),
    "a structure": (lambda: npz({"layer_0": np.zeros((4, 4), [("a", "f4")]), **_REST}), r"layer_0: .*structured array"),
    "unicode": (lambda: npz({"layer_0": np.full((4, 4), "x"), **_REST}), r"layer_0: .*dtype '<U1'"),
    "complex": (lambda: npz({"layer_0": np.zeros((4, 4), "c8"), **_REST}), r"layer_0: .*dtype '<c8'"),
    "65,000 shapes": (
        lambda: sound(_MANY, lambda index: (0, index, 1, 2, 3)),
        r"LayoutError: aggregate: expected 2 layers, found 65000",
    ),
    "half a million axes": (
        lambda: sound(17_000, lambda index: (0, index) + (1,) * 30),
        r"LayoutError: aggregate: expected 2 layers, found 17000",
    ),
    "a directory of 16 MB": (
        lambda: sound(20_000, lambda _: (0,), struct.pack("<2H", 99, 750) + bytes(750)),
        r"LayoutError: aggregate: expected 2 layers, found 20000",
    ),
    "101 members besides the layers": (lambda: many_extras(101), r"LayoutError: aggregate: expected 2 layers"),
    "a name of a kilobyte and more": (
        lambda: zipped({"x" * 2000 + ".npy": SOUND, **{f"layer_{index}.npy": SOUND for index in range(2)}}),
        r"x{70}.*expected a name of at most 1024 bytes, found 2004",
    ),
    "a gap": (
        lambda: npz({"layer_0": _REST["layer_1"], "layer_2": _REST["layer_1"]}),
        r"layer_1: .*layers up to layer_2 without it",
    ),
    "100,000 members": (many_members, r"100000 members"),
    "100,000 members that are said to be two": (
        lambda: patched(many_members(), (b"PK\x06\x06", 24, struct.pack("<QQ", 2, 2))),
        r"directory",
    ),
    "an end record that points anywhere": (lambda: patched(GOOD, (END, 16, b"\xff\xff\xff\x7f")), r"directory"),
    "too many layers": (lambda: npz(layers(3)), r"LayoutError: aggregate: expected 2"),
    "no layers": (lambda: npz({}), r"LayoutError: aggregate: expected 2"),
    "NaN": (
        lambda: npz({"layer_0": np.full((4, 4), np.nan, "f4"), **_REST}),
        r"layer_0 \(weight\): .*16 of 16 NaN",
    ),
    "nothing": (lambda: b"", r"an empty file"),
    "a page": (lambda: b"<html>502</html>", r"XML or HTML text"),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Let a process of its own judge them all."""
    folder = tmp_path_factory.mktemp("hostile")
    kinds = {name: content for name, (content, _) in READ.items()}
    kinds.update({name: make() for name, (make, _) in REFUSED.items()})
    paths = {}
    for index, (name, content) in enumerate(kinds.items()):
        paths[str(folder / f"{index}.npz")] = name
        (folder / f"{index}.npz").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *paths], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return {paths[path]: verdicts for path, verdicts in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", READ)
def test_an_unusual_archive_is_read_right(name: str, verdicts: dict[str, Any]) -> None:
    assert verdicts[name][0][0] == f"loaded {READ[name][1]}"
    assert verdicts[name][1][0] == "opened 2, the last of shape (4, 4)"


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_archive_is_refused_by_name(name: str, verdicts: dict[str, Any]) -> None:
    message = verdicts[name][0][0]
    assert re.search(REFUSED[name][1], message), message
    assert re.match(r"(ArchiveError|AggregateRejectedError|LayoutError): ", message)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("65,000 shapes", r"opened 65000, the last of shape \(0, 64999, 1, 2, 3\)$"),
        ("a directory of 16 MB", r"opened 20000, the last of shape \(0,\)$"),
        ("half a million axes", r"layers: expected at most 524288 axes in all, found more"),
        ("101 members besides the layers", r"expected at most 100 members besides the layers, found more"),
    ],
)
def test_where_no_model_is_known_the_number_of_members_costs_no_memory(
    name: str, found: str, verdicts: dict[str, Any]
) -> None:
    assert re.search(found, verdicts[name][1][0]), verdicts[name][1][0]


@pytest.mark.parametrize("way", [0, 1], ids=["for a model", "for no model"])
def test_none_of_them_costs_memory_or_time(verdicts: dict[str, Any], way: int) -> None:
    figures = {name: found[way] for name, found in verdicts.items()}
    assert {name: grown for name, (_, _, grown) in figures.items() if grown >= _MOST_BYTES} == {}
    assert {name: took for name, (_, took, _) in figures.items() if took >= _MOST_S} == {}
    assert len(figures) == len(READ) + len(REFUSED)
