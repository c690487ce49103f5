"""Deflate, inflate and CRC-32: ISA-L where the ``fast`` extra is installed, the standard library elsewhere.

Trained floats hardly compress, so the level is chosen for speed: ISA-L at level 2 packs them as tightly as zlib at level 6 at
about fifteen times its speed (levels 0 and 1 of ISA-L and zlib-ng can make them larger). Every call releases the interpreter lock.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol, Union, cast

try:
    from isal import isal_zlib
except ImportError:  # the extra is optional, and has no wheel for some machines
    _found: Any = None
else:
    _found = isal_zlib

#: The accelerator, or None; looked at on every call, so that tests can take it away.
_isal: Any = _found

#: Bytes to hand to one call: larger ones fall out of the processor's cache and are a quarter slower.
FEED_BYTES = 128 * 1024
#: Bytes of a layer that decide between the two ways of the standard library.
SAMPLE_BYTES = 64 * 1024
#: What a broken stream raises, whichever library reads it.
INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error,) if _found is None else (zlib.error, _found.error)

_RAW_STREAM = -zlib.MAX_WBITS
_ISAL_LEVEL = 2
_WORTH_MATCHING = 0.97

Buffer = Union[bytes, bytearray, memoryview]


class Compressor(Protocol):
    """Pack a stream piece by piece."""

    def compress(self, data: Buffer, /) -> bytes:
        """Take more input; give the output that is ready."""
        ...

    def flush(self) -> bytes:
        """End the stream; give the rest of the output."""
        ...


class Decompressor(Protocol):
    """Unpack a stream piece by piece, never more at a time than asked for."""

    @property
    def eof(self) -> bool:
        """Tell whether the end of the stream was seen."""
        ...

    @property
    def unconsumed_tail(self) -> bytes:
        """Input that was not needed yet because the output was full."""
        ...

    @property
    def unused_data(self) -> bytes:
        """Input behind the end of the stream."""
        ...

    def decompress(self, data: Buffer, max_length: int, /) -> bytes:
        """Give at most ``max_length`` (from 1) bytes of output."""
        ...


def backend() -> str:
    """Name the library in use: ``"isal"`` or ``"zlib"``."""
    return "zlib" if _isal is None else "isal"


def crc32(data: Buffer, value: int = 0) -> int:
    """Continue the CRC-32 ``value`` over ``data``."""
    return zlib.crc32(data, value) if _isal is None else int(_isal.crc32(data, value))


def compressor(sample: Buffer) -> Compressor:
    """Start a raw deflate stream (as in zip files) that suits data like ``sample``.

    Args:
        sample: some bytes of the layer; the first 64 KiB of them count. Only the standard library looks at it.
    """
    if _isal is not None:
        return cast(Compressor, _isal.compressobj(_ISAL_LEVEL, zlib.DEFLATED, _RAW_STREAM))
    return _filtered() if _holds_repeats(memoryview(sample)[:SAMPLE_BYTES]) else _huffman_only()


def decompressor() -> Decompressor:
    """Start to read a raw deflate stream."""
    return cast(Decompressor, (_isal or zlib).decompressobj(_RAW_STREAM))


def _holds_repeats(sample: Buffer) -> bool:
    # Random mantissas hold none: looking for them takes three quarters of the time and gains nothing. In zeros, and in floats
    # widened from a shorter type, the search pays.
    plain = _packed_bytes(_huffman_only(), sample)
    return _packed_bytes(_filtered(), sample) < plain * _WORTH_MATCHING


def _huffman_only() -> Compressor:
    return zlib.compressobj(1, zlib.DEFLATED, _RAW_STREAM, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)


def _filtered() -> Compressor:
    return zlib.compressobj(4, zlib.DEFLATED, _RAW_STREAM, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED)


def _packed_bytes(stream: Compressor, data: Buffer) -> int:
    return len(stream.compress(data)) + len(stream.flush())
