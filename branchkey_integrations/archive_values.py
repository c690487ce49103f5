"""What is known about an archive besides its values, and the weighting that may stand in one."""

from __future__ import annotations

import base64
import hashlib
import math
import numbers
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from branchkey_integrations.errors import ArchiveError, WeightingError

_PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class LayerHeader:
    """Describe one layer of an archive: its shape, and its dtype in this machine's byte order."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LayerStream(Protocol):
    """Stand for a layer that is made piece by piece while it is written: one that is widened, or comes from a device.

    ``shape`` and ``dtype`` are those of the layer in the archive.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the pieces."""
        ...

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        ...

    def pieces(self, items: int) -> Iterator[np.ndarray]:
        """Give the values in C order as flat, contiguous arrays of at most ``items``; may be called again.

        A piece is used up before the next one is asked for.
        """
        ...


@dataclass(frozen=True)
class ArchiveInfo:
    """Describe an archive that was written or read whole.

    Args:
        size_bytes: size of the file.
        sha256: SHA-256 of the file, 32 raw bytes.
        layers: shape and dtype of each layer, by position; empty where only the bytes were looked at.
        weighting: the weighting in it; None in an aggregate, or where only the bytes were looked at.
    """

    size_bytes: int
    sha256: bytes
    layers: tuple[LayerHeader, ...] = ()
    weighting: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 as the ``x-bk-file-digest`` header has it: ``sha256=`` and standard base64 with padding."""
        return "sha256=" + base64.b64encode(self.sha256).decode("ascii")


def check_weighting(value: object) -> float:
    """Check a weighting: one real, finite number above zero.

    Args:
        value: a Python or numpy number, or an array of one number (as the archive holds it).

    Raises:
        WeightingError: a bool, NaN, infinity, zero, a negative number, a string, None, or several numbers.
    """
    number = _as_number(value)
    if number is None or not math.isfinite(number) or number <= 0:
        raise WeightingError(
            what="weighting",
            expected="one finite number above zero",
            found=f"{value!r} ({type(value).__name__})",
            fix="Pass for example the number of samples this leaf trained on",
        )
    return number


def _as_number(value: object) -> float | None:
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        if isinstance(value, numbers.Real):
            return float(value)
        array = np.asarray(value)
        return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "iuf" else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor that requires grad
        return None


def file_digest(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Give size and SHA-256 of any file, read in pieces of 1 MiB; layers and weighting are not looked at.

    Raises:
        ArchiveError: the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise unreadable(path, error) from error
    return ArchiveInfo(size, digest.digest())


def unreadable(path: object, error: OSError) -> ArchiveError:
    """Say in our words that a file cannot be opened or read."""
    return ArchiveError(
        what=f"file {path}",
        expected="a file that can be read",
        found=error.strerror or str(error),
        fix="Check the path and the rights on it",
    )


def not_finite(what: str) -> ArchiveError:
    """Say that a layer holds NaN or infinity and must not leave."""
    return ArchiveError(
        what=what,
        expected="finite numbers only",
        found="NaN or infinity",
        fix="Training has diverged; skip this round, or lower the learning rate. Nothing was sent",
    )
