"""The NPZ archive of layers: what a leaf uploads, and what comes back.

    write_archive(path, arrays, weighting)      stream out: bounded memory, digest on the way, whole or not at all
    Archive.open(path)                          judge by the headers; then layer by layer, by position
    validate_upload(path)                       what may leave this site

An update holds ``weighting`` (float64, shape (1,)) and ``layer_0`` ... ``layer_<n-1>``; an aggregate the layers only (format of the
official clients since 2.7.1, measured on 2.7.1 and 3.0.1). numpy.load reads these archives, and the archives that
numpy.savez and numpy.savez_compressed write are read here. Nothing is ever unpickled.
"""

from __future__ import annotations

import os

from branchkey_integrations.archive_read import Archive
from branchkey_integrations.archive_values import (
    ArchiveInfo,
    LayerHeader,
    check_weighting,
    file_digest,
    not_finite,
)
from branchkey_integrations.archive_write import write_archive
from branchkey_integrations.errors import ArchiveError, WeightingError

__all__ = [
    "Archive",
    "ArchiveInfo",
    "LayerHeader",
    "check_weighting",
    "file_digest",
    "validate_upload",
    "write_archive",
]


def validate_upload(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Check that a file may leave: a good weighting, at least one layer, layers 0..n-1, all of finite numbers.

    Unpacks everything once, in 1 MB of memory, and reads the file once more for its digest.

    Returns:
        Size, digest, layers and weighting.

    Raises:
        ArchiveError: no sound archive of layers, or NaN or infinity in one; names the layer.
        WeightingError: the weighting is missing, or is not one finite number above zero.
    """
    with Archive.open(path) as archive:
        if not len(archive):
            raise ArchiveError(
                what=f"archive {os.fspath(path)}",
                expected="at least one layer (layer_0)",
                found=f"none, but {', '.join(archive.extras) or 'nothing else either'}",
                fix="Write it with save_weights, or with the names layer_0, layer_1 and so on",
            )
        if archive.weighting is None:
            raise WeightingError(
                what="weighting",
                expected="an array of one number in the archive",
                found="something else" if "weighting" in archive.extras else "none",
                fix="Add weighting=numpy.array([samples], dtype=numpy.float64)",
            )
        check_weighting(archive.weighting)
        bad = archive.find_not_finite()
        if bad is not None:
            raise not_finite(f"layer_{bad}")
        whole = file_digest(path)
        return ArchiveInfo(whole.size_bytes, whole.sha256, tuple(archive.headers), archive.weighting)
