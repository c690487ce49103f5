"""Bring an aggregate into a live model: download, gate, load, and put everything back if it does not prove itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import (
    AggregateRejectedError,
    ArchiveError,
    BranchKeyError,
    DownloadError,
    LayoutError,
    MixedModelError,
)
from branchkey_integrations.gate import Gate
from branchkey_integrations.outcome import LeafClient
from branchkey_integrations.parameters import Layout, ParameterStore
from branchkey_integrations.quarantine import rejected

logger = logging.getLogger("branchkey_integrations.rounds")

#: An aggregate of up to so many bytes of values is unpacked once and held, which takes half the time of two passes over it.
HELD_BYTES = 1024 * 1024


def fetch(
    client: LeafClient, store: ParameterStore, aggregation_id: str, gate: Gate, reference_norm: float | None
) -> tuple[int, float]:
    """Download an aggregate and load it; one that was damaged on the way is downloaded once more.

    Returns:
        Its length in bytes, and its Euclidean norm.

    Raises:
        AggregateRejectedError: the gate refused it, or the model cannot take it; the parameters are as they were.
        ArchiveError: it is no archive, twice.
        BranchKeyError: it could not be had.
    """
    for last_try in (False, True):
        layout = store.layout()
        with client.open_aggregation(aggregation_id, quarantine=True, layout=layout) as archive:
            try:
                norm = _load(store, layout, aggregation_id, archive, gate, reference_norm)
                return archive.size_bytes, norm
            except (AggregateRejectedError, ArchiveError) as error:
                damaged = isinstance(error, ArchiveError) or isinstance(error.__cause__, ArchiveError)
                if last_try or not damaged:
                    # Raised within the block, so that the client keeps the file.
                    if isinstance(error, AggregateRejectedError):
                        raise
                    raise rejected(aggregation_id, error) from error
                logger.warning("%s; it is downloaded once more", error)
    raise AssertionError("unreachable")


def _load(
    store: ParameterStore,
    layout: Layout,
    aggregation_id: str,
    archive: Archive,
    gate: Gate,
    reference_norm: float | None,
) -> float:
    small = sum(header.nbytes for header in archive.headers) <= HELD_BYTES
    layers: Sequence[np.ndarray] = list(archive) if small else archive
    norm = gate.check(aggregation_id, layers, layout, reference_norm)
    before = gate.score()
    kept = store.read() if before is not None else None
    try:
        store.write(layers)
    except LayoutError as error:
        raise rejected(aggregation_id, error) from error
    except MixedModelError as error:
        if kept is None:
            raise
        store.write(kept)
        raise DownloadError(
            what=f"aggregate {aggregation_id}",
            expected="one that can be loaded whole",
            found=error.found,
            fix="The weights from before were put back; it can be collected again",
        ) from error
    except BranchKeyError:
        raise  # nothing was written
    except BaseException:
        if kept is not None:
            store.write(kept)
        raise
    if kept is not None:
        try:
            gate.check_score(aggregation_id, before, gate.score())
        except BaseException:
            # Also when the user's own metric raises: a model that could not be judged is not kept.
            store.write(kept)
            raise
    return norm


def name_layer(error: BranchKeyError, layout: Layout | None) -> None:
    """Say which of the model's parameters an error about ``layer_3`` is about; archives know numbers only."""
    found = re.fullmatch(r"layer_([0-9]+)", error.what)
    if found and layout is not None and int(found[1]) < len(layout):
        error.what = f"{error.what} ({layout.layers[int(found[1])].name})"
