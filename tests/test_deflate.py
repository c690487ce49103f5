"""Deflate and inflate, with the accelerator and without."""

from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from branchkey_integrations import deflate
from tests.support import archives


@pytest.fixture(params=archives.BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with archives.using(request.param):
        yield request.param


GENERATOR = np.random.default_rng(5)
WEIGHTS = GENERATOR.normal(scale=0.02, size=200_000).astype("f4")
WIDENED = (WEIGHTS.view("u4") & 0xFFFF0000).view("f4")  # what bfloat16 parameters look like as float32
SAMPLES = {
    "nothing": b"",
    "one byte": b"x",
    "weights": WEIGHTS.tobytes(),
    "widened weights": WIDENED.tobytes(),
    "zeros": bytes(800_000),
    "noise": GENERATOR.bytes(300_000),
}


def packed(data: bytes, feed: int = deflate.FEED_BYTES) -> bytes:
    stream = deflate.compressor(data)
    pieces = [stream.compress(data[start : start + feed]) for start in range(0, len(data), feed)]
    return b"".join([*pieces, stream.flush()])


@pytest.mark.parametrize("name", SAMPLES)
def test_any_inflater_reads_what_is_packed(name: str) -> None:
    assert zlib.decompress(packed(SAMPLES[name]), -15) == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("limit", [1000, 262_144])
def test_what_zlib_packs_is_read_in_pieces_of_limited_size(name: str, limit: int) -> None:
    stream = zlib.compressobj(6, zlib.DEFLATED, -15)
    data = stream.compress(SAMPLES[name]) + stream.flush()
    reader = deflate.decompressor()
    result, tail = bytearray(), data
    while not reader.eof:
        piece = reader.decompress(tail, limit)
        assert len(piece) <= limit
        result += piece
        tail = reader.unconsumed_tail
    assert result == SAMPLES[name]
    assert reader.unused_data == b""


@pytest.mark.parametrize(
    ("name", "most"), [("weights", 0.94), ("widened weights", 0.53), ("zeros", 0.01), ("noise", 1.001)]
)
def test_packing_never_makes_floats_larger(name: str, most: float) -> None:
    assert len(packed(SAMPLES[name])) <= most * len(SAMPLES[name])


def test_the_standard_library_searches_for_repeats_only_where_there_are_some() -> None:
    with archives.using("zlib"):
        plain = zlib.compressobj(1, zlib.DEFLATED, -15, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
        assert not deflate._holds_repeats(SAMPLES["weights"])
        assert deflate._holds_repeats(SAMPLES["zeros"])
        assert deflate._holds_repeats(SAMPLES["widened weights"])
        assert packed(SAMPLES["weights"], 10**9) == plain.compress(SAMPLES["weights"]) + plain.flush()
        filtered = zlib.compressobj(4, zlib.DEFLATED, -15, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED)
        assert packed(SAMPLES["zeros"], 10**9) == filtered.compress(SAMPLES["zeros"]) + filtered.flush()


@pytest.mark.parametrize("name", SAMPLES)
def test_the_crc_is_that_of_zip_files_and_can_be_continued(name: str) -> None:
    data = SAMPLES[name]
    assert deflate.crc32(data) == zlib.crc32(data)
    assert deflate.crc32(data[7:], deflate.crc32(data[:7])) == zlib.crc32(data)


def test_a_broken_stream_raises_what_is_promised() -> None:
    with pytest.raises(deflate.INFLATE_ERRORS):
        deflate.decompressor().decompress(b"\xff" * 100, 1000)


def test_the_codec_works_where_the_accelerator_is_not_installed() -> None:
    script = (
        "import sys; sys.modules['isal'] = None\n"
        "import io, numpy\n"
        "from branchkey_integrations import deflate\n"
        "from branchkey_integrations.archive import Archive, write_archive\n"
        "buffer = io.BytesIO(); write_archive(buffer, [numpy.arange(5.0)], 1)\n"
        "print(deflate.backend(), Archive.open(buffer)[0].tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "zlib [0.0, 1.0, 2.0, 3.0, 4.0]\n"
