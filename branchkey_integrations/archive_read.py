"""Open an archive from its headers, and unpack its layers one by one, straight into the memory they are meant for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, BinaryIO, Union, overload

import numpy as np

from branchkey_integrations import archive_npy
from branchkey_integrations.archive_kept import Kept, Reader, keep
from branchkey_integrations.archive_npy import NpyHeader
from branchkey_integrations.archive_open import HEADER_FEED_BYTES, open_members
from branchkey_integrations.archive_stream import PIECE_BYTES, ByteSource, MemberStream
from branchkey_integrations.archive_table import Headers
from branchkey_integrations.archive_values import LayerHeader
from branchkey_integrations.archive_zip import STORED, Member, shown
from branchkey_integrations.errors import ArchiveError
from branchkey_integrations.values import all_finite

_WEIGHTING = "weighting"
_CHECK_ITEMS = 64 * 1024

Source = Union[str, "os.PathLike[str]", BinaryIO]


class Archive(Sequence[np.ndarray]):
    """Read the layers of an NPZ archive by position: ``archive[i]`` is ``layer_i``, in numeric order.

    Nothing is unpacked but what is asked for; each layer is checked by length and CRC when it is. The object may be shared
    among threads. Values stay what they were in the file: judging them (finite, fitting the model) is the gate's business.

    ``headers`` give shape and dtype of each layer, ``weighting`` the weighting where the archive holds a plain one (else
    None), ``extras`` the names of all members that are not layers, ``size_bytes`` the size of the file.
    """

    def __init__(
        self, source: ByteSource, max_bytes: int | None = None, private: bool = False, layers: int | None = None
    ) -> None:
        self._source = source
        #: Nobody else can change the file: what was checked once stays so, and may be read again in place of a copy.
        self.private = private
        #: What the values were checked against by a pass over all of them (a model's layout); None as long as they were not.
        self.checked_for: object = None
        self._kept: Kept | None = None
        self.size_bytes: int = source.size
        self._table, self._extras = open_members(source, layers, max_bytes)
        self.headers: Sequence[LayerHeader] = Headers(self._table)
        self.extras: tuple[str, ...] = tuple(self._extras)
        self.weighting: float | None = None
        if _WEIGHTING in self._extras:
            self.weighting = self._read_weighting(*self._extras[_WEIGHTING])

    @classmethod
    def open(
        cls, source: Source, *, max_bytes: int | None = None, private: bool = False, layers: int | None = None
    ) -> Archive:
        """Open an archive and judge it by its headers alone.

        Args:
            source: a path, or a seekable binary file; a file stays open when the archive is closed.
            max_bytes: most bytes that all members may take unpacked; None for no limit. No memory is taken for values here,
                and a layer takes only its own size when it is read.
            private: nobody else can write to the file, since it has no name; then a model may be loaded in place from it.
            layers: how many there must be, where that is known: another number is refused before its headers are looked at.

        Raises:
            LayoutError: another number of layers.
            ArchiveError: no NPZ archive, a broken one, or one that holds anything but layers 0..n-1 of plain numbers (and
                extras, which are not looked into). Names the layer.
        """
        opened = ByteSource(source)
        try:
            return cls(opened, max_bytes, private, layers)
        except ArchiveError as error:
            if error.what == "archive" and opened.name != "archive":
                error.what = f"archive {opened.name}"
            opened.close()
            raise
        except BaseException:
            opened.close()
            raise

    def close(self) -> None:
        """Let go of the file; reading is over. May be called twice."""
        self._source.close()
        if self._kept is not None:
            self._kept.close()

    def keep_unpacked(self) -> None:
        """Have the next pass over ``pieces`` keep on the disk what it unpacks, for the passes after it.

        It takes the size of the values in a temporary file that has no name; without the room for it, nothing is kept.
        """
        if self._kept is None:
            table = self._table
            packed = (index for index in range(len(self)) if table.member(index).method != STORED)
            self._kept = keep({index: self.headers[index].nbytes for index in packed})

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        header = self._table.header(index)
        # Fortran order is the same bytes with the axes turned round.
        array = np.empty(header.layer.shape[:: -1 if header.fortran else 1], header.layer.dtype)
        self._unpack(index, header, array)
        if header.swapped:
            array.byteswap(inplace=True)
        return np.array(array.T, order="C") if header.fortran else array

    def read_into(self, index: int, out: np.ndarray) -> None:
        """Unpack layer ``index`` into ``out``, casting where the dtypes differ.

        Where dtype and layout agree, the bytes go straight into the memory of ``out`` in pieces of 256 KiB; else one buffer
        of the layer's size is taken. When this raises because of broken data, ``out`` may be partly written: call ``check``
        before the first write where all or nothing is wanted.

        Args:
            index: position of the layer.
            out: writeable array of the layer's shape.

        Raises:
            ArchiveError: another shape, a cast between kinds of numbers, a finite value too large for the dtype of ``out``
                (nothing was written in these cases), or broken data.
        """
        index = range(len(self))[index]
        header = self._table.header(index)
        what = f"layer_{index}"
        if out.shape != header.layer.shape:
            raise ArchiveError(
                what=what, expected=f"shape {out.shape}", found=f"shape {header.layer.shape}", fix=_MODEL_FIX
            )
        if not out.flags.writeable or not np.can_cast(header.layer.dtype, out.dtype, "same_kind"):
            expected = f"a writeable array that can hold {header.layer.dtype}"
            found = f"{out.dtype}{'' if out.flags.writeable else ' (read-only)'}"
            raise ArchiveError(what=what, expected=expected, found=found, fix="Pass an array of a float dtype")
        if out.dtype == header.layer.dtype and out.flags.c_contiguous and not (header.swapped or header.fortran):
            self._unpack(index, header, out)
            return
        array = self[index]
        _refuse_overflow(what, array, out.dtype)
        np.copyto(out, array, casting="same_kind")

    def pieces(self, index: int) -> Iterator[np.ndarray]:
        """Give the values of layer ``index`` as flat pieces of at most 256 KiB, in the order of the file.

        That is C order unless the archive holds the layer in Fortran order (see :meth:`in_c_order`). Each piece lies in the
        same memory as the one before. Length and CRC are judged after the last one, so a reader takes all of them.

        Raises:
            ArchiveError: broken data.
        """
        index = range(len(self))[index]
        header = self._table.header(index)
        dtype, left = header.layer.dtype, header.layer.nbytes
        buffer = np.empty(min(left, PIECE_BYTES), np.uint8)
        stream = self._values(index, header)
        copy = None if self._kept is None else self._kept.writer(index)
        while left:
            part = buffer[: min(left, PIECE_BYTES)]
            stream.fill(part.data)
            left -= len(part)
            if copy is not None:
                copy.put(part.data)
            values = part.view(dtype)
            if header.swapped:
                values.byteswap(inplace=True)
            yield values
        stream.finish()
        if copy is not None:
            copy.done()

    def in_c_order(self, index: int) -> bool:
        """Tell whether the last axis of layer ``index`` varies fastest in the file."""
        return not self._table.header(range(len(self))[index]).fortran

    def check(self) -> None:
        """Unpack every member to nothing, in 0.5 MB of memory, and check its length and CRC.

        Raises:
            ArchiveError: names the member that is broken.
        """
        table = self._table
        layers = ((table.member(index), table.start(index)) for index in range(len(table)))
        for member, start in chain(layers, self._extras.values()):
            stream = MemberStream(self._source, member, start)
            stream.skip()
            stream.finish()

    def find_not_finite(self) -> int | None:
        """Check every member as ``check`` does; give the first layer that holds NaN or infinity, if any."""
        first = None
        for index in range(len(self)):
            for piece in self.pieces(index):
                if first is None and not all_finite(piece):
                    first = index
        return first

    def _read_weighting(self, member: Member, start: int) -> float | None:
        stream = MemberStream(self._source, member, start, HEADER_FEED_BYTES)
        try:
            header = archive_npy.decode(shown(member.name), stream.take, member.raw_bytes)
        except ArchiveError:
            # Strings and the like are an extra that is none of ours, no reason to refuse the layers; damage is one.
            stream = MemberStream(self._source, member, start)
            stream.skip()
            stream.finish()
            return None
        dtype = header.layer.dtype
        if dtype.kind == "b" or header.layer.nbytes != dtype.itemsize:
            return None
        value = np.empty(1, dtype)
        stream.fill(value.view(np.uint8).data)
        stream.finish()
        return float(value.byteswap()[0] if header.swapped else value[0])

    def _unpack(self, index: int, header: NpyHeader, out: np.ndarray) -> None:
        stream = self._values(index, header)
        stream.fill(out.reshape(-1).view(np.uint8).data)
        stream.finish()

    def _values(self, index: int, header: NpyHeader) -> MemberStream | Reader:
        """Read a layer's values from where they are had at the least cost."""
        kept = None if self._kept is None else self._kept.reader(index, f"layer_{index}")
        if kept is not None:
            return kept
        stream = MemberStream(self._source, self._table.member(index), self._table.start(index))
        stream.take(header.length)
        return stream


_MODEL_FIX = "All leaves of a branch need the same model"


def _refuse_overflow(what: str, array: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Refuse finite values that would become infinite, or wrap around, in ``dtype``; looks at 64 Ki values at a time."""
    if np.can_cast(array.dtype, dtype, "safe"):
        return
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = (float(limits.min), float(limits.max)) if dtype.kind == "f" else (int(limits.min), int(limits.max))
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHECK_ITEMS):
        values = flat[start : start + _CHECK_ITEMS]
        values = values[np.isfinite(values)]
        if values.size and (values.min().item() < low or values.max().item() > high):
            extreme = max(values.max().item(), values.min().item(), key=abs)
            raise ArchiveError(
                what=what, expected=f"values up to {high:g}, the largest {dtype}", found=f"{extreme:g}", fix=_MODEL_FIX
            )
