"""The small header in front of each array of an NPZ archive: written by numpy, read with suspicion.

Reading knows the few forms that number arrays have, and evaluates nothing: numpy's own reader hands the text to Python's parser,
which can be exhausted by nesting, and lets shapes through for which there is no memory.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from branchkey_integrations.archive_values import LayerHeader
from branchkey_integrations.errors import ArchiveError

#: Kinds and widths that may stand in a layer; wider floats differ from machine to machine.
DTYPES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
#: numpy 1 has no arrays of more axes.
MAX_AXES = 32
#: Longest header that is read; those of number arrays take 128 bytes.
MAX_HEADER_BYTES = 10_000

_MAGIC = b"\x93NUMPY"
_FIELD = re.compile(
    r"""\s* (?P<quote>['"]) (?P<name>descr|fortran_order|shape) (?P=quote) \s* : \s*
        (?: (?P<q>['"]) (?P<text>[^'"\\]*) (?P=q) | (?P<flag>True|False) | \( (?P<axes>[-0-9,\ L]*) \) )
        \s* (?: , | (?=\s*\}) ) \s*""",
    re.VERBOSE | re.ASCII,
)
_NUMBER = r"\s*-?(?:0|[1-9][0-9]{0,18})L?\s*"  # Python 2 wrote an L behind long ones
_AXES = re.compile(rf"\s*|{_NUMBER},(?:{_NUMBER},)*(?:{_NUMBER})?\s*", re.ASCII)
_AXIS = r"(?:0|[1-9][0-9]{0,18})"
#: Headers as numpy writes them, which is nearly all there are.
_NUMPYS = re.compile(
    r"\{'descr': '([<>|][a-z][0-9])', 'fortran_order': (True|False), "
    rf"'shape': \(((?:{_AXIS},|{_AXIS}(?:, {_AXIS})+)?)\), \}} *\n",
    re.ASCII,
)
_OBJECT = re.compile(r"""['"][|<>=]?O[0-9]*['"]""", re.ASCII)


class NpyHeader(NamedTuple):
    """Say how the bytes of one member become an array."""

    layer: LayerHeader
    #: True where the bytes are in the other byte order than this machine's.
    swapped: bool
    #: True where the first axis varies fastest.
    fortran: bool
    #: Bytes of the member in front of the values.
    length: int


def dtype_code(dtype: np.dtype[Any]) -> str:
    """Name kind and width of a dtype, without its byte order: ``f4``."""
    return f"{dtype.kind}{dtype.itemsize}"


def encode(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Make the header of a C-ordered array, byte for byte as numpy does."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def read_text(key: str, take: Callable[[int], bytes]) -> tuple[str, int]:
    """Read the text of a header, and the length of the whole of it in bytes.

    Args:
        key: name of the array, for the error.
        take: gives exactly so many bytes, from the start of the member on.
    """
    start = take(8)
    if start[:6] != _MAGIC or start[6] not in (1, 2, 3):
        raise ArchiveError(
            what=key,
            expected="an array in numpy's format",
            found="other data",
            fix="Write the archive with numpy.savez_compressed or with this package",
        )
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(take(width), "little")
    if length > MAX_HEADER_BYTES:
        raise ArchiveError(
            what=key,
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
            fix="Ask the sender for plain number arrays",
        )
    return take(length).decode("latin-1"), 8 + width + length


def refuse_objects(key: str, text: str) -> None:
    """Refuse an array of Python objects, whose values would have to be unpickled, which means run."""
    if "O" in text and _OBJECT.search(text):
        raise ArchiveError(
            what=key,
            expected="an array of numbers",
            found="dtype object; object/pickled arrays are not accepted",
            fix="Ask the sender for plain number arrays",
        )


def decode(key: str, take: Callable[[int], bytes], member_bytes: int) -> NpyHeader:
    """Read and judge the header of a number array before any memory is taken for its values.

    Args:
        key: name of the array, for the error.
        take: gives exactly so many bytes, from the start of the member on.
        member_bytes: unpacked size of the member as the archive declares it; header and values must fill it exactly.

    Raises:
        ArchiveError: objects, strings, records or complex numbers; a shape that cannot be; a size that does not fit.
    """
    text, length = read_text(key, take)
    refuse_objects(key, text)
    descr, fortran, shape = _fields(key, text)
    dtype = _dtype(key, descr)
    native = dtype.newbyteorder("=")
    if len(shape) > MAX_AXES or (shape and min(shape) < 0):
        raise ArchiveError(
            what=key, expected=f"at most {MAX_AXES} axes, none negative", found=f"shape {shape}", fix=_BROKEN_FIX
        )
    # Axes of length 0 do not count here: numpy multiplies the others all the same, and fails where they overflow.
    if math.prod([axis or 1 for axis in shape]) * dtype.itemsize > sys.maxsize:
        raise ArchiveError(what=key, expected="an array that fits into memory", found=f"shape {shape}", fix=_BROKEN_FIX)
    layer = LayerHeader(shape, native)
    if length + layer.nbytes != member_bytes:
        raise ArchiveError(
            what=key,
            expected=f"{layer.nbytes} bytes of values for {native} {list(shape)}",
            found=f"{member_bytes - length} bytes declared",
            fix=_BROKEN_FIX,
        )
    return NpyHeader(layer, dtype != native, fortran and len(shape) > 1, length)


_BROKEN_FIX = "The file is broken or forged; get it again"


def _fields(key: str, text: str) -> tuple[str, bool, tuple[int, ...]]:
    plain = _NUMPYS.fullmatch(text)
    if plain:
        return plain[1], plain[2] == "True", tuple([int(axis) for axis in plain[3].split(",") if axis])
    text = " ".join(text.split())  # a header may be padded with spaces, which the patterns would try one by one
    values: dict[str, Any] = {}
    position = 1
    if text.startswith("{"):
        while match := _FIELD.match(text, position):
            axes = match["axes"]
            if axes is not None and _AXES.fullmatch(axes):
                values[match["name"]] = tuple(int(axis.strip(" L")) for axis in axes.split(",") if axis.strip())
            else:
                values[match["name"]] = match["text"] if match["flag"] is None else match["flag"] == "True"
            position = match.end()
    descr, fortran, shape = (values.get(name) for name in ("descr", "fortran_order", "shape"))
    whole = text[position:] == "}" and len(values) == 3
    if not whole or not isinstance(descr, str) or not isinstance(fortran, bool) or not isinstance(shape, tuple):
        raise ArchiveError(
            what=key,
            expected="the header of a plain number array",
            found="a header of another kind, such as that of a structured array",
            fix="Ask the sender for plain number arrays",
        )
    return descr, fortran, shape


def _dtype(key: str, descr: str) -> np.dtype[Any]:
    order, code = (descr[0], descr[1:]) if descr[:1] in ("<", ">", "|", "=") else ("=", descr)
    code = "b1" if code == "?" else code
    if code not in DTYPES:
        raise ArchiveError(
            what=key,
            expected="real numbers of at most 64 bits (float, int, uint or bool)",
            found=f"dtype {descr!r}",
            fix="Ask the sender for plain number arrays, such as float32",
        )
    return np.dtype(order + code)
