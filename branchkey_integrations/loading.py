"""Bring an aggregate into a live model: download, gate, load, and put everything back if it does not prove itself."""

from __future__ import annotations

import logging

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import AggregateRejectedError, ArchiveError, BranchKeyError, LayoutError
from branchkey_integrations.gate import Gate
from branchkey_integrations.outcome import LeafClient
from branchkey_integrations.parameters import ParameterStore

logger = logging.getLogger("branchkey_integrations.rounds")


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
        with client.open_aggregation(aggregation_id, quarantine=True) as archive:
            try:
                norm = _load(store, aggregation_id, archive, gate, reference_norm)
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
    store: ParameterStore, aggregation_id: str, archive: Archive, gate: Gate, reference_norm: float | None
) -> float:
    norm = gate.check(aggregation_id, archive, store.layout(), reference_norm)
    before = gate.score()
    kept = store.read() if before is not None else None
    try:
        store.write(archive)
    except LayoutError as error:
        raise rejected(aggregation_id, error) from error
    if kept is not None:
        try:
            gate.check_score(aggregation_id, before, gate.score())
        except BaseException:
            # Also when the user's own metric raises: a model that could not be judged is not kept.
            store.write(kept)
            raise
    return norm


def rejected(aggregation_id: str, error: BranchKeyError) -> AggregateRejectedError:
    """Make a refusal of what was found wrong with an aggregate."""
    detail = "" if error.what == "aggregate" else f", {error.what}"
    what = error.what if aggregation_id in error.what else f"aggregate {aggregation_id}{detail}"
    return AggregateRejectedError(
        what=what,
        expected=error.expected,
        found=error.found,
        fix=error.fix,
        aggregation_id=aggregation_id,
        quarantined=getattr(error, "quarantined", ""),
    )
