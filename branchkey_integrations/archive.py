"""Write, open and check NPZ archives of layers (first, simple version; the streaming codec replaces the inside)."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Union, overload

import numpy as np

from branchkey_integrations.errors import ArchiveError, WeightingError

Source = Union[str, "os.PathLike[str]", BinaryIO]
_KEY = re.compile(r"layer_(0|[1-9][0-9]*)", re.ASCII)


@dataclass(frozen=True)
class LayerHeader:
    """Describe one layer of an archive without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ArchiveInfo:
    """Describe an archive that was written or read whole."""

    size_bytes: int
    sha256: bytes
    layers: tuple[LayerHeader, ...] = ()
    weighting: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 as it stands in the ``x-bk-file-digest`` header."""
        return "sha256=" + base64.b64encode(self.sha256).decode("ascii")


def check_weighting(value: object) -> float:
    """Check a weighting: one finite number above zero."""
    good = not isinstance(value, (bool, np.bool_, str, bytes))
    number = math.nan
    if good:
        try:
            array = np.asarray(value)
            if array.size == 1 and array.dtype.kind in "iuf":
                number = float(array.reshape(()))
        except (ValueError, TypeError):
            number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise WeightingError(
            what="weighting",
            expected="one finite number above zero",
            found=repr(value),
            fix="Pass for example the number of samples trained on",
        )
    return number


def _info(path: str, layers: tuple[LayerHeader, ...], weighting: float | None) -> ArchiveInfo:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return ArchiveInfo(os.path.getsize(path), digest.digest(), layers, weighting)


def write_archive(
    target: Source,
    arrays: Sequence[np.ndarray[Any, Any]],
    weighting: float | None = None,
    *,
    compression: Literal["deflate", "store"] = "deflate",
) -> ArchiveInfo:
    """Write layers (and the weighting, for an upload) as an NPZ archive."""
    if weighting is not None:
        weighting = check_weighting(weighting)
    checked = []
    for index, value in enumerate(arrays):
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty(0, dtype=object)
        if array.dtype.kind not in "fiub":
            raise ArchiveError(
                what=f"layer_{index}", expected="an array of numbers", found=str(array.dtype), fix="Pass plain arrays"
            )
        checked.append(array)
    entries = {} if weighting is None else {"weighting": np.array([weighting], dtype=np.float64)}
    entries.update({f"layer_{index}": np.asarray(array, order="C") for index, array in enumerate(checked)})
    folder = os.path.dirname(os.path.abspath(os.fspath(target))) if isinstance(target, (str, os.PathLike)) else None
    handle, path = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            (np.savez_compressed if compression == "deflate" else np.savez)(file, **entries)  # type: ignore[arg-type]
        info = _info(path, tuple(LayerHeader(a.shape, a.dtype) for a in checked), weighting)
        if isinstance(target, (str, os.PathLike)):
            os.replace(path, target)
        else:
            with open(path, "rb") as file:
                target.write(file.read())
            os.unlink(path)
    except BaseException:
        if os.path.exists(path):
            os.unlink(path)
        raise
    return info


class Archive(Sequence[np.ndarray]):  # type: ignore[type-arg]
    """Read the layers of an archive one by one, in numeric order."""

    def __init__(self, data: bytes) -> None:
        self.size_bytes = len(data)
        try:
            self._npz = np.load(io.BytesIO(data), allow_pickle=False)
            if not hasattr(self._npz, "files"):
                raise ValueError("a bare array")
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ArchiveError(
                what="archive", expected="an NPZ archive", found="not an NPZ archive", fix="Check the file"
            ) from error
        numbers = []
        for key in self._npz.files:
            match = _KEY.fullmatch(key)
            if match:
                numbers.append(int(match.group(1)))
            elif key.startswith("layer_"):
                raise ArchiveError(what=key, expected="layer_<number>", found=key, fix="Check the file")
        numbers.sort()
        if numbers != list(range(len(numbers))):
            missing = next(i for i, n in enumerate([*numbers, -1]) if i != n)
            raise ArchiveError(what=f"layer_{missing}", expected="layers 0..n-1", found="missing", fix="Check the file")
        self.extras = tuple(k for k in self._npz.files if not k.startswith("layer_"))
        self.weighting = float(self._npz["weighting"].reshape(())) if "weighting" in self._npz.files else None
        self._count = len(numbers)
        self.headers = tuple(LayerHeader(self._get(i).shape, self._get(i).dtype) for i in range(self._count))

    @classmethod
    def open(cls, source: Source, *, max_bytes: int | None = None) -> Archive:
        """Open an archive."""
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                return cls(file.read())
        source.seek(0)
        return cls(source.read())

    def _get(self, index: int) -> np.ndarray[Any, Any]:
        try:
            array = self._npz[f"layer_{index}"]
        except ValueError as error:
            raise ArchiveError(
                what=f"layer_{index}", expected="an array of numbers",
                found="object/pickled arrays are not accepted", fix="Ask the sender for plain arrays",
            ) from error
        return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> np.ndarray[Any, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[np.ndarray[Any, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(self._count))]
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._get(index)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        return (self._get(i) for i in range(self._count))

    def read_into(self, index: int, out: np.ndarray[Any, Any]) -> None:
        """Copy layer ``index`` into ``out`` of the same shape."""
        array = self[index]
        if array.shape != out.shape:
            raise ArchiveError(what=f"layer_{index}", expected=f"shape {out.shape}", found=f"shape {array.shape}")
        out[...] = array

    def check(self) -> None:
        """Read everything once."""
        for _ in self:
            pass

    def close(self) -> None:
        """Let go of the file."""
        self._npz.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_digest(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Give size and SHA-256 of any file."""
    return _info(os.fspath(path), (), None)


def validate_upload(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Check that a file may leave: a good weighting, layers 0..n-1, numeric and finite."""
    with Archive.open(path) as archive:
        if not len(archive):
            raise ArchiveError(what="archive", expected="at least one layer", found="none", fix="Pass layers")
        weighting = check_weighting(archive.weighting)
        for index, array in enumerate(archive):
            if not np.isfinite(array).all():
                raise ArchiveError(what=f"layer_{index}", expected="finite numbers", found="NaN or inf",
                                   fix="Lower the learning rate, or skip this round")
        return _info(os.fspath(path), archive.headers, weighting)
