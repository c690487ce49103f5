"""Members that are no layers: objects, wrong names, wrong headers; refused by name, with no code run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import (
    Archive,
)
from branchkey_integrations.errors import ArchiveError
from tests.support import archives
from tests.support.archives import (
    header,
    layers,
    matches,
    npy,
    npz,
    refusal,
    zipped,
)


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


class Marker:
    """Run code when it is unpickled: make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (os.fspath(self.folder),)


def test_the_marker_would_run(tmp_path: Path) -> None:
    with np.load(
        io.BytesIO(npz({"a": np.array([Marker(tmp_path / "ran")], dtype=object)})), allow_pickle=True
    ) as loaded:
        assert loaded["a"].tolist() == [None]
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["layer_0", "layer_11", "weighting", "extra"])
def test_object_arrays_are_refused_by_name_and_never_unpickled(key: str, tmp_path: Path) -> None:
    data = npz({**layers(12, weighting=1.0), key: np.array([Marker(tmp_path / "ran")], dtype=object)})
    message = refusal(data)
    assert message.startswith(f"{key}: ")
    assert "object/pickled arrays are not accepted" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (npy(header(), bytes(8)), "a bare .npy array"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML or HTML"),
        (b"\n <!DOCTYPE html><html></html>" + bytes(100), "XML or HTML"),
        (b'{"error": "expired"}', "JSON"),
        (b"hello", "other data"),
        (b"PK", "other data"),
        (pickle.dumps([1, [np.zeros(2)]]), "other data"),
        (b"PK\x03\x04", "truncated"),
        (npz(layers(2))[:-1], "truncated"),
        (npz(layers(2))[:100], "truncated"),
        (b"x" + npz(layers(2)), "other data"),
        (npz(layers(2)) + b"x", "damaged end record"),
    ],
)
def test_other_files_are_no_npz_archive(data: bytes, found: str, tmp_path: Path) -> None:
    assert found in refusal(data)
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(ArchiveError) as caught:
        Archive.open(path)
    assert str(path) in str(caught.value)
    assert "damaged" in found or "not an NPZ archive" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("layer_00", "layer_00"),
        ("layer_01", "layer_01"),
        ("layer_1e", "layer_1e"),
        ("layer_-1", "layer_-1"),
        ("layer_+1", "layer_"),
        ("layer_ 1", "layer_"),
        ("layer_1.0", "layer_1.0"),
        ("layer_", "layer_"),
        ("layer_\u0661", "layer_"),
        ("layer_1\n", "layer_1"),
        ("layer_" + "9" * 5000, "layer_999"),
        ("layer_norm", "layer_norm"),
        ("layer_7", "layer_1: .*layer_7"),
        ("layer_999999999", "layer_1: .*layer_999999999"),
        ("layer_4294967296", "layer_4294967296: "),
    ],
)
def test_a_key_that_is_no_position_is_refused_by_name(key: str, found: str) -> None:
    message = refusal(npz({"layer_0": np.zeros(1, "f4"), key: np.zeros(1, "f4")}))
    assert matches(found, message)


def test_gaps_are_refused_naming_the_missing_layer() -> None:
    assert refusal(npz({"layer_0": np.zeros(1), "layer_2": np.zeros(1)})).startswith("layer_1: ")
    assert refusal(npz({"layer_1": np.zeros(1)})).startswith("layer_0: ")


@pytest.mark.parametrize("name", ["layer_0.npy", "weighting.npy", "extra.npy"])
def test_a_name_that_stands_twice_is_refused(name: str) -> None:
    member = npy(header(), bytes(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = zipped([("layer_0.npy", member), (name, member), (name, member)])
    assert refusal(data).startswith(f"{name[:-4]}: ")
    assert "two members of that name" in refusal(data)


@pytest.mark.parametrize("name", ["layer_0", "notes.txt", "layer_0.NPY", "layer_0.npy.npy", "folder/"])
def test_raw_members_are_refused_by_name(name: str) -> None:
    message = refusal(zipped({"layer_0.npy": npy(header(), bytes(8)), name: b"raw"}))
    assert name.split(".")[0] in message


HEADERS = {
    "a structured array": ("'<f4', 'x'", "(2,)", "False"),
    "a record": ("[('a', '<f4'), ('b', '<f4')]", "(2,)", "False"),
    "text": ("'<U1'", "(2,)", "False"),
    "bytes": ("'|S4'", "(2,)", "False"),
    "void, as bfloat16 is written": ("'|V2'", "(4,)", "False"),
    "complex numbers": ("'<c8'", "(1,)", "False"),
    "dates": ("'<M8[s]'", "(1,)", "False"),
    "a 128-bit float": ("'<f16'", "(1,)", "False"),
    "an unknown width": ("'<f3'", "(2,)", "False"),
    "no dtype": ("''", "(2,)", "False"),
    "a name of a dtype": ("'float32'", "(2,)", "False"),
    "a number as dtype": ("4", "(2,)", "False"),
    "a negative axis": ("'<f4'", "(-2,)", "False"),
    "two negative axes": ("'<f4'", "(-1, -2)", "False"),
    "a float axis": ("'<f4'", "(2.0,)", "False"),
    "a list as shape": ("'<f4'", "[2]", "False"),
    "a call in the shape": ("'<f4'", "(__import__('os').getpid(),)", "False"),
    "a sum": ("'<f4'", "(1+1,)", "False"),
    "an order that is a number": ("'<f4'", "(2,)", "0"),
    "too few bytes": ("'<f4'", "(3,)", "False"),
    "too many bytes": ("'<f4'", "(1,)", "False"),
    "a terabyte": ("'<f4'", "(1000000, 1000000)", "False"),
    "a product beyond 64 bits that comes out right in 64": ("'<f4'", "(4294967296, 4294967296, 2)", "False"),
    "an axis of 19 digits": ("'<f4'", "(9999999999999999999,)", "False"),
    "an axis of many digits": ("'<f4'", f"({'9' * 500},)", "False"),
    "too many axes": ("'<f4'", f"(2, {'1, ' * 32})", "False"),
    "deep nesting": ("'<f4'", "(" * 3000, "False"),
    "many signs": ("'<f4'", "(" + "-" * 3000 + "2,)", "False"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_no_plain_array_is_refused_by_name(name: str) -> None:
    descr, shape, fortran = HEADERS[name]
    for version in (1, 2, 3):
        member = npy(header(descr, shape, fortran), bytes(8), version=version)
        assert refusal(zipped({"layer_0.npy": member})).startswith("layer_0: ")


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x04\x00\x02\x00{}",
        b"\x93NUMPZ\x01\x00\x02\x00{}",
        npy(""),
        npy("{}"),
        npy("{"),
        npy(header()[:-3], bytes(8)),
        npy(header() + "x", bytes(8)),
        npy(header() + " " * 20_000, bytes(8)),
        npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}", bytes(8)),
        npy(header(shape="(0, 4611686018427387904, 4611686018427387904)")),  # empty, and numpy cannot make it
        b"raw bytes and nothing else",
    ],
)
def test_a_member_that_is_no_array_is_refused_by_name(member: bytes) -> None:
    assert refusal(zipped({"layer_0.npy": member})).startswith("layer_0: ")


def test_headers_of_other_writers_are_read() -> None:
    for text in (
        '{"descr":"<f4","fortran_order":False,"shape":(2,)}',
        "{'shape': (2L,), 'fortran_order': False, 'descr': '<f4'}",
        "{ 'descr' : '=f4' , 'fortran_order' : True , 'shape' : ( 2 , ) , }",
    ):
        archive = Archive.open(io.BytesIO(zipped({"layer_0.npy": npy(text, struct.pack("<2f", 1, 2))})))
        assert archive[0].tolist() == [1, 2]


def test_padding_in_a_header_costs_no_time() -> None:
    member = npy(header().replace("(2,)", "(2" + " " * 9000 + ",)"), bytes(8))
    assert Archive.open(io.BytesIO(zipped({"layer_0.npy": member})))[0].tolist() == [0, 0]
    start = time.thread_time()
    for text in ("{", "{'descr':", "{'descr': '<f4'", "{'shape': (", "{'shape': (2,", "{'shape': (2,)"):
        data = zipped({"layer_0.npy": npy(text + " " * 9900 + "x", bytes(8))})
        for _ in range(20):
            refusal(data)
    assert time.thread_time() - start < 1.0  # a pattern that tries every space against every other takes seconds
