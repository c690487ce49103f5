"""What is kept of the members of an opened archive: columns of numbers, some fifty bytes a layer.

Objects would take twenty times that, and an archive of 65,000 members, which may be a sound one, should not cost memory before
anybody has asked for a layer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from branchkey_integrations.archive_npy import DTYPES, NpyHeader
from branchkey_integrations.archive_values import LayerHeader
from branchkey_integrations.archive_zip import Member, broken

#: Most axes of all different shapes together: eight a layer for the most layers there may be.
MAX_AXES_IN_ALL = 1 << 19

_DTYPES = [np.dtype(code) for code in sorted(DTYPES)]
_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
#: Headers kept as objects for the next layer that has the same; a model has few.
_MOST_KNOWN = 1024


class HeaderTable:
    """Keep headers of arrays as numbers, and each that occurs again once."""

    def __init__(self) -> None:
        self._axes = array("q")
        #: Where the axes of each header start; one more than there are headers.
        self._starts = array("I", [0])
        self._lengths = array("H")
        self._kinds = bytearray()
        self._known: dict[bytes, tuple[int, int]] = {}
        self._objects: dict[int, NpyHeader] = {}

    def known(self, head: bytes) -> tuple[int, int] | None:
        """Give the number of a header by its bytes, and the size of a member that has it; None if it is new."""
        return self._known.get(head)

    def add(self, header: NpyHeader, head: bytes) -> int:
        """Keep a header; give its number.

        Args:
            head: the bytes in front of the values; remembered where they are the header and nothing else.

        Raises:
            ArchiveError: more axes than any model has.
        """
        number = len(self._kinds)
        self._axes.extend(header.layer.shape)
        if len(self._axes) > MAX_AXES_IN_ALL:
            raise broken("more", what="layers", expected=f"at most {MAX_AXES_IN_ALL} axes in all")
        self._starts.append(len(self._axes))
        self._lengths.append(header.length)
        self._kinds.append(_NUMBERS[header.layer.dtype] << 2 | header.swapped << 1 | header.fortran)
        if len(head) == header.length and len(self._known) < _MOST_KNOWN:
            self._known[head] = (number, header.length + header.layer.nbytes)
        return number

    def forget_bytes(self) -> None:
        """Let go of what was only needed to find headers again."""
        self._known = {}

    def __getitem__(self, number: int) -> NpyHeader:
        found = self._objects.get(number)
        if found is None:
            shape = tuple(self._axes[self._starts[number] : self._starts[number + 1]])
            kind = self._kinds[number]
            layer = LayerHeader(shape, _DTYPES[kind >> 2])
            found = NpyHeader(layer, bool(kind & 2), bool(kind & 1), self._lengths[number])
            if len(self._objects) < _MOST_KNOWN:
                self._objects[number] = found
        return found


class MemberTable:
    """Keep the members that are layers, by number.

    Args:
        count: of all members, by the end record; no layer can have a number from there on.
    """

    def __init__(self, count: int) -> None:
        self._crcs = array("I", bytes(4 * count))
        self._flags = array("H", bytes(2 * count))
        self._packed, self._raw = array("Q", bytes(8 * count)), array("Q", bytes(8 * count))
        self._offsets, self._starts = array("Q", bytes(8 * count)), array("Q", bytes(8 * count))
        self._headers = array("I", bytes(4 * count))
        #: The method plus one; 0 where no layer has come yet.
        self._methods = bytearray(count)
        self._largest = -1
        self._size = 0
        self.headers = HeaderTable()

    def __len__(self) -> int:
        return self._size

    def add(self, index: int, member: Member) -> None:
        """Keep layer ``index``.

        Raises:
            ArchiveError: it is there already.
        """
        self._size += 1
        self._largest = max(self._largest, index)
        if index >= len(self._methods):
            return  # beyond all that there can be, so there is a gap, which demand_all() names
        _, method, flags, crc, packed, raw, offset = member
        if self._methods[index]:
            raise broken("two members of that name", what=f"layer_{index}", expected="each name once")
        self._methods[index] = method + 1
        self._flags[index], self._crcs[index] = flags, crc
        self._packed[index], self._raw[index], self._offsets[index] = packed, raw, offset

    def demand_all(self) -> None:
        """Demand layers 0..n-1.

        Raises:
            ArchiveError: names the first that is missing.
        """
        missing = self._methods.find(0, 0, self._size)
        if missing >= 0:
            found = f"layers up to layer_{self._largest} without it"
            raise broken(found, what=f"layer_{missing}", expected="layers 0..n-1 without a gap")

    def in_file_order(self) -> list[int]:
        """Give the numbers of all layers in the order in which they lie in the file."""
        return sorted(range(self._size), key=self._offsets.__getitem__)

    def place(self, index: int, start: int, header: int) -> None:
        """Note where the data of a layer starts, and the number of its header."""
        self._starts[index], self._headers[index] = start, header

    def member(self, index: int) -> Member:
        """Give what the directory told about a layer."""
        sizes = (self._crcs[index], self._packed[index], self._raw[index], self._offsets[index])
        return Member(f"layer_{index}.npy", self._methods[index] - 1, self._flags[index], *sizes)

    def start(self, index: int) -> int:
        """Give the place where the data of a layer starts."""
        return self._starts[index]

    def header(self, index: int) -> NpyHeader:
        """Give the header of a layer."""
        return self.headers[self._headers[index]]


class Headers(Sequence[LayerHeader]):
    """Give shape and dtype of each layer by position; made when they are asked for."""

    def __init__(self, table: MemberTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[LayerHeader]:
        return (self._table.header(index).layer for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> LayerHeader: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerHeader, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerHeader | tuple[LayerHeader, ...]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return tuple(self._table.header(number).layer for number in numbers)
        return self._table.header(numbers).layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # compared by value, as long as a tuple would be

    def __repr__(self) -> str:
        return repr(tuple(self))
