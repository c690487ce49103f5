"""Archives on their way out and in: packed without leaving a file, stored whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from branchkey_integrations.api import Api
from branchkey_integrations.archive import Archive, ArchiveInfo, write_archive
from branchkey_integrations.errors import ArchiveError

#: Archives up to this size are built in memory, larger ones in an unlinked temporary file.
_IN_MEMORY_BYTES = 32 * 1024 * 1024


def require_finite(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Demand at least one layer, and no NaN or infinity in any.

    Raises:
        ArchiveError: names the first layer that may not leave.
    """
    if not arrays:
        raise ArchiveError(
            what="update", expected="at least one layer", found="none", fix="Pass the model's parameters"
        )
    for index, array in enumerate(arrays):
        if getattr(getattr(array, "dtype", None), "kind", "") == "f" and not np.isfinite(array).all():
            raise ArchiveError(
                what=f"layer_{index}",
                expected="finite numbers",
                found="NaN or infinity",
                fix="Training has diverged; lower the learning rate. Nothing was sent",
            )
    return arrays


@contextlib.contextmanager
def packed(arrays: Sequence[np.ndarray], weighting: float) -> Iterator[tuple[BinaryIO, ArchiveInfo]]:
    """Pack layers into an archive that is gone when the block ends."""
    size = sum(getattr(array, "nbytes", 0) for array in arrays)
    with io.BytesIO() if size <= _IN_MEMORY_BYTES else tempfile.TemporaryFile() as file:
        yield file, write_archive(file, arrays, weighting)


@contextlib.contextmanager
def opened(api: Api, identifier: str) -> Iterator[Archive]:
    """Download an aggregate into an unlinked temporary file and open it."""
    with tempfile.TemporaryFile() as file:
        api.download(identifier, file)
        try:
            archive = Archive.open(file)
        except ArchiveError as error:
            raise _named(error, identifier) from error
        with archive:
            yield archive


def store(api: Api, identifier: str, folder: str) -> str:
    """Download an aggregate to ``<folder>/<identifier>.npz``; it appears there when it is complete and sound."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{identifier}.npz")
    temporary = os.path.join(folder, f".{identifier[:64]}-{secrets.token_hex(8)}.part")
    try:
        # Not mkstemp, whose files only the owner may read: other tools of the user pick this one up.
        with open(temporary, "x+b") as file:
            api.download(identifier, file)
            with Archive.open(file) as archive:
                archive.check()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, ArchiveError):
            raise _named(error, identifier) from error
        raise
    return path


def copy_tensors(named_parameters: Iterable[tuple[str, Any]]) -> list[np.ndarray]:
    """Copy tensors into numpy arrays, widening what numpy lacks (bfloat16, float8) to float32, exactly."""
    arrays = []
    for _, parameter in named_parameters:
        tensor = parameter.detach().cpu()
        if "bfloat16" in str(tensor.dtype) or "float8" in str(tensor.dtype):
            tensor = tensor.float()
        # A tensor on the CPU shares its memory with .numpy(); the next optimiser step would change the update.
        arrays.append(tensor.numpy().copy())
    return arrays


def _named(error: ArchiveError, identifier: str) -> ArchiveError:
    # What the archive is called on disk is an accident of ours; the user knows the aggregate.
    what = re.sub(r"^archive( \S+)?", "", error.what).strip(", ")
    return ArchiveError(
        what=f"aggregate {identifier}" + (f", {what}" if what else ""),
        expected=error.expected,
        found=error.found,
        fix=error.fix,
    )
