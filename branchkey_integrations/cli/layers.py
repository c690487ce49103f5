"""``inspect``: what is in an archive, one layer at a time."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from branchkey_integrations.archive import Archive, file_digest
from branchkey_integrations.errors import ArchiveError

_MB = 1e6


def run_inspect(path: str) -> int:
    """Print a table of the layers, then weighting, size and digest; needs the size of one layer in memory.

    Raises:
        ArchiveError: the file is not a sound archive. The table up to the broken layer may have been printed.
    """
    try:
        size = os.stat(path)
        archive = Archive.open(path)
    except OSError as error:
        raise ArchiveError(
            what=f"archive {path!r}",
            expected="a readable file",
            found=error.strerror or type(error).__name__,
            fix="Check the path",
        ) from error
    except ArchiveError as error:
        raise _of_file(path, error) from error
    total, bad = 0, 0
    with archive:
        print(f"{'layer':>5}  {'dtype':<9}{'shape':<20}{'MB':>9}{'min':>12}{'max':>12}{'mean':>12}{'norm':>12}  flags")
        for index, header in enumerate(archive.headers):
            try:
                statistics, flags = _describe(archive[index])
            except ArchiveError as error:
                sys.stdout.flush()
                raise _of_file(path, error) from error
            shape = "x".join(str(length) for length in header.shape) or "scalar"
            print(
                f"{index:>5}  {header.dtype!s:<9}{shape:<20}{header.nbytes / _MB:>9.3f}{statistics}  {flags}".rstrip()
            )
            total += header.nbytes
            bad += bool(flags)
        weighting = archive.weighting
        extras = archive.extras
        layers = len(archive)
    others = sorted(set(extras) - {"weighting"})
    print(f"{layers} layers, {total / _MB:.3f} MB of values" + (f", {bad} of them with flags" if bad else ""))
    print("weighting  " + ("none (the form of an aggregate)" if weighting is None else f"{weighting:g}"))
    if others:
        print("others     " + ", ".join(others))
    print(f"size       {size.st_size} bytes")
    print(f"digest     {file_digest(path).digest}")
    return 0


def _of_file(path: str, error: ArchiveError) -> ArchiveError:
    """Name the file in an error that names only what is wrong inside."""
    if path in error.what:
        return error
    return ArchiveError(
        what=f"archive {path!r}, {error.what}", expected=error.expected, found=error.found, fix=error.fix
    )


def _describe(array: np.ndarray[Any, Any]) -> tuple[str, str]:
    """Give the statistics of the finite values as a part of the row, and the flags."""
    if not array.size:
        return f"{'-':>12}" * 4, "empty"
    flat = array.reshape(-1)
    flags = []
    if array.dtype.kind == "f":
        nan, infinite = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
        flags = [f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "inf")) if count]
        if flags:
            flat = flat[np.isfinite(flat)]
    if not flat.size:
        return f"{'-':>12}" * 4, ", ".join(flags)
    mean = float(flat.mean(dtype=np.float64))
    norm = float(np.sqrt(np.square(flat, dtype=np.float64).sum()))
    numbers = (float(flat.min()), float(flat.max()), mean, norm)
    return "".join(f"{number:>12.4g}" for number in numbers), ", ".join(flags)
