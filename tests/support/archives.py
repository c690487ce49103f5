"""Make archives by hand: right ones with numpy, and every kind of wrong one."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from branchkey_integrations import archive_zip, deflate
from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import ArchiveError

#: The deflate libraries that this environment has.
BACKENDS = ["zlib"] if deflate._found is None else ["isal", "zlib"]


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Make the codec use one library for a while."""
    before = deflate._isal
    deflate._isal = deflate._found if backend == "isal" else None
    try:
        assert deflate.backend() == backend
        yield
    finally:
        deflate._isal = before


def npz(arrays: Mapping[str, Any], *, compressed: bool = True) -> bytes:
    """Give what numpy writes; with pickled members where the arrays hold objects."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def layers(count: int, *, weighting: Any = None, value: float | None = None) -> dict[str, np.ndarray]:
    """Give ``count`` small layers, each filled with its number (or ``value``)."""
    named = {} if weighting is None else {"weighting": np.array([weighting])}
    for index in range(count):
        named[f"layer_{index}"] = np.full((4, 4), index if value is None else value, np.float32)
    return named


def npy(header: str, data: bytes = b"", *, version: int = 1) -> bytes:
    """Give a .npy member with the header text as it is, right or wrong."""
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def header(descr: str = "'<f4'", shape: str = "(2,)", fortran: str = "False") -> str:
    """Give the text of a header as numpy writes it."""
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def zipped(members: Mapping[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Give a zip file of raw members; a list may hold a name twice."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            file.writestr(name, data)
    return buffer.getvalue()


def patched(data: bytes, *changes: tuple[bytes, int, bytes], every: bool = False) -> bytes:
    """Overwrite bytes at an offset behind the last (or every) place of a mark: ``(mark, offset, new)``."""
    result = bytearray(data)
    for mark, offset, new in changes:
        at = result.rfind(mark)
        assert at >= 0
        while at >= 0:
            result[at + offset : at + offset + len(new)] = new
            at = result.rfind(mark, 0, at) if every else -1
    return bytes(result)


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def deflated(data: bytes) -> bytes:
    """Give a raw deflate stream."""
    stream = zlib.compressobj(6, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


def forged(stream: bytes, *, raw_bytes: int, crc: int, method: int = 8) -> bytes:
    """Give an archive whose only layer has the packed bytes, and claims the size and CRC, that are given."""
    member = archive_zip.Member("layer_0.npy", method, 0, crc, len(stream), raw_bytes, 0)
    data = archive_zip.local_header(member) + stream
    return data + b"".join(archive_zip.directory([member], len(data)))


def refusal(data: bytes) -> str:
    """Give the message with which an archive is refused, by its headers or at the latest by its values."""
    with pytest.raises(ArchiveError) as caught:
        list(Archive.open(io.BytesIO(data)))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.fix
    assert "pickle=" not in message.replace(" ", "")
    return message


def matches(pattern: str, text: str) -> bool:
    """Tell whether the text holds the pattern, and show both where it does not."""
    assert re.search(pattern, text, re.DOTALL), (pattern, text)
    return True


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Compare shape, kind and bytes, byte order aside."""
    expected = np.asarray(right, right.dtype.newbyteorder("="), order="C")
    return left.shape == expected.shape and left.dtype == expected.dtype and left.tobytes() == expected.tobytes()
