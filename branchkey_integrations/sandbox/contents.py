"""What an uploaded file must hold to be counted."""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np

from branchkey_integrations.archive import validate_upload
from branchkey_integrations.errors import ArchiveError, WeightingError
from branchkey_integrations.sandbox.branch import Layers
from branchkey_integrations.sandbox.reception import Parcel, Refusal, parse_metadata

_KIND_ENTRY = "__bk_payload_kind__"
_ANALYTICS = "federated_analytics"
_MOST_KIND_BYTES = 4096


def check_contents(parcel: Parcel) -> tuple[float, Layers]:
    """Give weighting and layers of an upload. Reads the whole file, so not for the server's loop.

    Raises:
        Refusal: 422, naming what is wrong: no sound archive, a weighting that is not finite or not above zero, a gap in the
            layers, NaN or infinity in one, or a kind of upload that cannot be averaged.
    """
    metadata = parse_metadata(parcel.metadata)
    kind = metadata.get("kind") if isinstance(metadata, dict) else None
    if _ANALYTICS in (kind, _payload_kind(parcel.path)):
        raise Refusal(
            422, f"upload: expected layers to average, found kind {_ANALYTICS!r}; the sandbox has no analytics"
        )
    try:
        info = validate_upload(parcel.path)
    except (ArchiveError, WeightingError) as error:
        raise Refusal(422, f"upload: {error}") from error
    layers = tuple((tuple(header.shape), np.dtype(header.dtype).name) for header in info.layers)
    assert info.weighting is not None  # noqa: S101 - an upload without one was refused above
    return info.weighting, layers


def _payload_kind(path: str) -> str:
    """Read the entry that names the kind of an archive; empty when there is none or the file is no archive."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.getinfo(f"{_KIND_ENTRY}.npy").file_size > _MOST_KIND_BYTES:
                return ""
        with np.load(path, allow_pickle=False) as entries:
            value: Any = entries[_KIND_ENTRY]
            return str(value)
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return ""
