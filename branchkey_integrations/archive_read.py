"""Open an archive from its headers, and unpack its layers one by one, straight into the memory they are meant for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Union, overload

import numpy as np

from branchkey_integrations import archive_npy, archive_zip
from branchkey_integrations.archive_npy import NpyHeader
from branchkey_integrations.archive_stream import PIECE_BYTES, ByteSource, MemberStream
from branchkey_integrations.archive_values import LayerHeader
from branchkey_integrations.archive_zip import Member, broken, shown
from branchkey_integrations.errors import ArchiveError
from branchkey_integrations.values import all_finite

#: Nine digits are more than there can be members, and few enough for int() to be quick.
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,8})", re.ASCII)
_WEIGHTING = "weighting"
#: Packed bytes that nearly always hold an array's header; the stream reads on where they do not.
_HEADER_FEED_BYTES = 1024
_CHECK_ITEMS = 64 * 1024

Source = Union[str, "os.PathLike[str]", BinaryIO]


class _Layer(NamedTuple):
    member: Member
    start: int
    header: NpyHeader


class Archive(Sequence[np.ndarray]):
    """Read the layers of an NPZ archive by position: ``archive[i]`` is ``layer_i``, in numeric order.

    Nothing is unpacked but what is asked for; each layer is checked by length and CRC when it is. The object may be shared
    among threads. Values stay what they were in the file: judging them (finite, fitting the model) is the gate's business.

    ``headers`` give shape and dtype of each layer, ``weighting`` the weighting where the archive holds a plain one (else
    None), ``extras`` the names of all members that are not layers, ``size_bytes`` the size of the file.
    """

    def __init__(self, source: ByteSource, max_bytes: int | None = None, private: bool = False) -> None:
        self._source = source
        #: Nobody else can change the file: what was checked once stays so, and may be read again in place of a copy.
        self.private = private
        #: What the values were checked against by a pass over all of them (a model's layout); None as long as they were not.
        self.checked_for: object = None
        self.size_bytes: int = source.size
        members, end = archive_zip.read_directory(source.read_at, source.size)
        layers, extras = _sort(members)
        _refuse_size(members, max_bytes)
        # One call a member that is no layer, too: a name that is wrong in one of its two places betrays damage.
        starts = {member.name: archive_zip.read_local_header(source.read_at, member) for member in members}
        archive_zip.refuse_overlaps(
            [(member.offset, starts[member.name] + member.packed_bytes) for member in members], end
        )
        self._members = [(member, starts[member.name]) for member in members]
        self._layers = [self._open_layer(member, starts[member.name]) for member in layers]
        self.headers: tuple[LayerHeader, ...] = tuple(layer.header.layer for layer in self._layers)
        self.extras: tuple[str, ...] = tuple(extras)
        for key, member in extras.items():
            text, _ = archive_npy.read_text(shown(member.name), self._stream(member, starts[member.name]).take)
            archive_npy.refuse_objects(shown(key), text)
        self.weighting: float | None = None
        if _WEIGHTING in extras:
            self.weighting = self._read_weighting(extras[_WEIGHTING], starts[extras[_WEIGHTING].name])

    @classmethod
    def open(cls, source: Source, *, max_bytes: int | None = None, private: bool = False) -> Archive:
        """Open an archive and judge it by its headers alone.

        Args:
            source: a path, or a seekable binary file; a file stays open when the archive is closed.
            max_bytes: most bytes that all members may take unpacked; None for no limit. No memory is taken for values here,
                and a layer takes only its own size when it is read.
            private: nobody else can write to the file, since it has no name; then a model may be loaded in place from it.

        Raises:
            ArchiveError: no NPZ archive, a broken one, or one that holds anything but layers 0..n-1 of plain numbers (and
                extras, which are not looked into). Names the layer.
        """
        opened = ByteSource(source)
        try:
            return cls(opened, max_bytes, private)
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

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        header = self._layers[index].header
        # Fortran order is the same bytes with the axes turned round.
        array = np.empty(header.layer.shape[:: -1 if header.fortran else 1], header.layer.dtype)
        self._unpack(self._layers[index], array)
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
        layer = self._layers[index]
        header = layer.header
        what = shown(layer.member.name)
        if out.shape != header.layer.shape:
            raise ArchiveError(
                what=what, expected=f"shape {out.shape}", found=f"shape {header.layer.shape}", fix=_MODEL_FIX
            )
        if not out.flags.writeable or not np.can_cast(header.layer.dtype, out.dtype, "same_kind"):
            expected = f"a writeable array that can hold {header.layer.dtype}"
            found = f"{out.dtype}{'' if out.flags.writeable else ' (read-only)'}"
            raise ArchiveError(what=what, expected=expected, found=found, fix="Pass an array of a float dtype")
        if out.dtype == header.layer.dtype and out.flags.c_contiguous and not (header.swapped or header.fortran):
            self._unpack(layer, out)
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
        layer = self._layers[index]
        dtype, swapped = layer.header.layer.dtype, layer.header.swapped
        buffer = np.empty(PIECE_BYTES, np.uint8)
        stream = MemberStream(self._source, layer.member, layer.start)
        stream.take(layer.header.length)
        left = layer.header.layer.nbytes
        while left:
            part = buffer[: min(left, PIECE_BYTES)]
            stream.fill(part.data)
            left -= len(part)
            values = part.view(dtype)
            if swapped:
                values.byteswap(inplace=True)
            yield values
        stream.finish()

    def in_c_order(self, index: int) -> bool:
        """Tell whether the last axis of layer ``index`` varies fastest in the file."""
        return not self._layers[index].header.fortran

    def check(self) -> None:
        """Unpack every member to nothing, in 0.5 MB of memory, and check its length and CRC.

        Raises:
            ArchiveError: names the member that is broken.
        """
        for member, start in self._members:
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

    def _stream(self, member: Member, start: int) -> MemberStream:
        return MemberStream(self._source, member, start, _HEADER_FEED_BYTES)

    def _open_layer(self, member: Member, start: int) -> _Layer:
        take = self._stream(member, start).take
        return _Layer(member, start, archive_npy.decode(shown(member.name), take, member.raw_bytes))

    def _read_weighting(self, member: Member, start: int) -> float | None:
        try:
            layer = self._open_layer(member, start)
        except ArchiveError:
            # Strings and the like are an extra that is none of ours, no reason to refuse the layers; damage is one.
            stream = self._stream(member, start)
            stream.skip()
            stream.finish()
            return None
        if layer.header.layer.dtype.kind == "b" or layer.header.layer.nbytes != layer.header.layer.dtype.itemsize:
            return None
        value = np.empty(1, layer.header.layer.dtype)
        self._unpack(layer, value)
        return float(value.byteswap()[0] if layer.header.swapped else value[0])

    def _unpack(self, layer: _Layer, out: np.ndarray) -> None:
        stream = MemberStream(self._source, layer.member, layer.start)
        stream.take(layer.header.length)
        stream.fill(out.reshape(-1).view(np.uint8).data)
        stream.finish()


_MODEL_FIX = "All leaves of a branch need the same model"


def _sort(members: list[Member]) -> tuple[list[Member], dict[str, Member]]:
    """Put the layers into numeric order, demanding exactly 0..n-1; give the other members by name."""
    layers: dict[int, Member] = {}
    extras: dict[str, Member] = {}
    for member in members:
        if not member.name.endswith(".npy"):
            raise broken("a raw member", what=shown(member.name), expected="arrays only, named *.npy")
        key = member.name[: -len(".npy")]
        match = _LAYER.fullmatch(key)
        if match:
            layers[int(match[1])] = member
        elif key.startswith("layer_"):
            raise broken("another name", what=shown(member.name), expected="names layer_0, layer_1, layer_2 and so on")
        else:
            extras[key] = member
    for index in range(len(layers)):
        if index not in layers:
            found = f"layers up to layer_{max(layers)} without it"
            raise broken(found, what=f"layer_{index}", expected="layers 0..n-1 without a gap")
    return [layers[index] for index in range(len(layers))], extras


def _refuse_size(members: list[Member], max_bytes: int | None) -> None:
    total = sum(member.raw_bytes for member in members)
    if max_bytes is not None and total > max_bytes:
        raise broken(f"{total} bytes", expected=f"at most {max_bytes} bytes unpacked")


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
