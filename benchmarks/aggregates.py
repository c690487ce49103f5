"""Make the file that the server hands back, as numpy.savez_compressed or numpy.savez would write it, in a fraction of the time."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np

from benchmarks import models

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_MAX32 = 0xFFFFFFFF


def write(path: Path, model: str, dtype: str, *, stored: bool) -> None:
    """Write the aggregate of a model.

    Each distinct layer is packed once (zlib, level 6, as numpy does) and its bytes are used again for equal ones: a
    transformer repeats its block, and packing 400 million floats anew would take a minute. Reading is not made easier by it.
    """
    packed: dict[models.Shape, tuple[int, bytes, int]] = {}
    entries = []
    with open(path, "wb") as file:
        for index, shape in enumerate(models.shapes_of(model)):
            if shape not in packed:
                packed[shape] = _pack(models.layer(shape, models.aggregate_seed(shape), dtype), stored)
            crc, data, raw = packed[shape]
            name = f"layer_{index}.npy".encode()
            offset = file.tell()
            method = 0 if stored else 8
            extra = struct.pack("<2H2Q", 1, 16, raw, len(data))
            times = (0, 1 << 5 | 1)
            file.write(
                _LOCAL.pack(b"PK\3\4", 45, 0, method, *times, crc, _MAX32, _MAX32, len(name), len(extra)) + name + extra
            )
            file.write(data)
            entries.append((name, method, crc, len(data), raw, offset))
        start = file.tell()
        for name, method, crc, size, raw, offset in entries:
            extra = struct.pack("<2H3Q", 1, 24, raw, size, offset)
            head = (b"PK\1\2", 3 << 8 | 45, 45, 0, method, 0, 1 << 5 | 1, crc, _MAX32, _MAX32)
            file.write(_CENTRAL.pack(*head, len(name), len(extra), 0, 0, 0, 0o600 << 16, _MAX32) + name + extra)
        size, count = file.tell() - start, len(entries)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size, _MAX32, 0))


def _pack(layer: np.ndarray, stored: bool) -> tuple[int, bytes, int]:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, layer, allow_pickle=False)
    raw = buffer.getbuffer()
    if stored:
        return zlib.crc32(raw), bytes(raw), len(raw)
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -15)
    return zlib.crc32(raw), packer.compress(raw) + packer.flush(), len(raw)
