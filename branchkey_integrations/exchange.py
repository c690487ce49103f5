"""Archives on their way out and in: packed without leaving a file, stored whole or not at all."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import numpy as np

from branchkey_integrations import deflate, parts
from branchkey_integrations.allowance import Allowance, allow
from branchkey_integrations.api import Api
from branchkey_integrations.archive import Archive, ArchiveInfo, write_archive
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ArchiveError,
    BranchKeyError,
    DownloadError,
    LayoutError,
)
from branchkey_integrations.link import AUTO, DEFLATE, MEASURABLE_BYTES, STORE, Choice, Link, Sample
from branchkey_integrations.parameters import Layout
from branchkey_integrations.quarantine import Quarantine, rejected
from branchkey_integrations.transport import OversizedError
from branchkey_integrations.values import pieces_of

logger = logging.getLogger("branchkey_integrations.exchange")

#: Archives up to this size are built in memory, larger ones in an unlinked temporary file.
_IN_MEMORY_BYTES = 8 * 1024 * 1024
#: What an archive holds of a layer besides its values: headers, and its line in the directory.
_MEMBER_BYTES = 256
#: Aggregates are small enough to stay in memory up to this size; nothing is known of them before they come.
_SMALL_BYTES = 1024 * 1024
#: Pieces of 128 KiB that are packed to see what packing costs and saves.
_SAMPLE_PIECES = 8


@contextlib.contextmanager
def packed(
    arrays: Sequence[Any], weighting: float, compression: str = DEFLATE
) -> Iterator[tuple[BinaryIO, ArchiveInfo]]:
    """Pack layers into an archive that is gone when the block ends.

    Raises:
        ArchiveError: no layers, one that cannot be sent, or NaN or infinity in one (named), found while it is packed.
    """
    method: Any = compression
    size = raw_bytes(arrays) + _MEMBER_BYTES * len(arrays)
    with io.BytesIO() if size <= _IN_MEMORY_BYTES else _scratch("update") as file:
        yield file, write_archive(file, arrays, weighting, compression=method, finite=True)


def choose(wanted: str, link: Link, arrays: Sequence[Any]) -> Choice:
    """Settle how an update is packed; ``"auto"`` tries a piece of its largest layer."""
    if wanted != AUTO:
        return Choice(wanted, "as you asked" if wanted == STORE else "")
    size = raw_bytes(arrays)
    return link.choose(size, _sample(arrays) if size >= MEASURABLE_BYTES else Sample(1.0, 0.0))


def raw_bytes(arrays: Sequence[Any]) -> int:
    """Give the size of all values."""
    return sum(getattr(array, "nbytes", 0) for array in arrays)


def _sample(arrays: Sequence[Any]) -> Sample:
    largest = max(arrays, key=lambda array: getattr(array, "nbytes", 0))
    pieces = itertools.islice(pieces_of(largest), _SAMPLE_PIECES)
    raw = b"".join(piece.tobytes() for piece in pieces)
    started = time.perf_counter()
    packer = deflate.compressor(raw)
    size = len(packer.compress(raw)) + len(packer.flush())
    return Sample(size / len(raw), (time.perf_counter() - started) / len(raw))


@contextlib.contextmanager
def opened(
    api: Api,
    identifier: str,
    quarantine: Quarantine | None = None,
    *,
    layout: Layout | None = None,
    max_bytes: int | None = None,
) -> Iterator[Archive]:
    """Download an aggregate into an unlinked temporary file and open it.

    What is no archive is downloaded once more, since it may have been damaged on the way. An aggregate that stays unsound,
    or that is refused within the block, is kept in ``quarantine``.

    Args:
        layout: of the model that it is for: an aggregate that is too long for it, or has another number of layers, is
            refused before it takes room or memory.
        max_bytes: the user's own limit.

    Raises:
        AggregateRejectedError: too long, or another number of layers.
        DownloadError, ArchiveError: it cannot be had, or is no sound archive.
    """
    allowed = allow(_temporary_folder(), layout, max_bytes, _SMALL_BYTES)
    with _scratch(f"aggregate {identifier}", _SMALL_BYTES) as file:
        archive = _fetched(api, identifier, file, quarantine, allowed)
        try:
            with archive:
                yield archive
        except AggregateRejectedError as error:
            if quarantine is not None:
                _keep(quarantine, file, identifier, error)
            raise


def _keep(
    quarantine: Quarantine, file: BinaryIO, identifier: str, error: AggregateRejectedError | ArchiveError
) -> None:
    error.quarantined = quarantine.keep(file, identifier, error)
    if error.quarantined:
        error.fix = f"{error.fix}. It was kept as {error.quarantined}"


def _fetched(api: Api, identifier: str, file: BinaryIO, quarantine: Quarantine | None, allowed: Allowance) -> Archive:
    for last_try in (False, True):
        file.seek(0)
        file.truncate()
        try:
            _download(api, identifier, file, allowed)
            return Archive.open(file, private=True, layers=allowed.layers)
        except AggregateRejectedError as error:
            # What there is of it says nothing, and would take the room that it was refused for.
            noted = "" if quarantine is None else quarantine.note(identifier, error)
            if noted:
                error.fix = f"{error.fix}. It was not downloaded; why is noted in {noted}"
            raise
        except LayoutError as error:
            refused = rejected(identifier, error)
            if quarantine is not None:
                _keep(quarantine, file, identifier, refused)
            raise refused from error
        except ArchiveError as error:
            named = _named(error, identifier)
            if last_try:
                if quarantine is not None:
                    _keep(quarantine, file, identifier, named)
                raise named from error
            logger.warning("%s; it is downloaded once more", named)
    raise AssertionError("unreachable")


def _download(api: Api, identifier: str, file: BinaryIO, allowed: Allowance) -> None:
    try:
        api.download(identifier, file, allowed.limit_bytes)
    except OversizedError as error:
        raise allowed.refusal(identifier, error.found) from error


def store(api: Api, identifier: str, folder: str, max_bytes: int | None = None) -> str:
    """Download an aggregate to ``<folder>/<identifier>.npz``; it appears there when it is complete and sound.

    Parts of downloads that were killed are deleted on the way.
    """
    path = os.path.join(folder, f"{identifier}.npz")
    try:
        os.makedirs(folder, exist_ok=True)
        parts.sweep(folder)
        with parts.replacing(path, durable=True) as file:
            _download(api, identifier, file, allow(folder, None, max_bytes))
            with Archive.open(file) as archive:
                archive.check()
    except ArchiveError as error:
        raise _named(error, identifier) from error
    except OSError as error:
        if isinstance(error, BranchKeyError):
            raise
        raise DownloadError(
            what=f"aggregate {identifier}",
            expected=f"a file that can be written in {folder}",
            found=error.strerror or type(error).__name__,
            fix="Free some space, or pass another output_dir",
        ) from error
    return path


def _temporary_folder() -> str | None:
    try:
        return tempfile.gettempdir()
    except OSError:  # nowhere may be written
        return None


def _scratch(what: str, in_memory_bytes: int = 0) -> BinaryIO:
    try:
        if in_memory_bytes:
            return cast(BinaryIO, tempfile.SpooledTemporaryFile(in_memory_bytes))
        return cast(BinaryIO, tempfile.TemporaryFile())
    except OSError as error:
        raise ArchiveError(
            what=what,
            expected="room for a temporary file",
            found=error.strerror or type(error).__name__,
            fix="Free some space, or let TMPDIR name another folder",
        ) from error


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
