"""What a checkpoint holds of a leaf's rounds, as plain types without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.outcome import PendingRound
from branchkey_integrations.parameters import Layout

_VERSION = 1
_FRESH = "Resume with the checkpoint of this leaf, or start without its federation state"


@dataclass(frozen=True)
class RoundState:
    """How a leaf's rounds stand.

    Args:
        round: number of the last round that was begun.
        last_applied: id of the last aggregate that was loaded.
        fingerprint: of the model's layers; None before the first round.
        layers: the layers themselves; None when there are too many to keep, or before the first round.
        norm: of the last good aggregate, or of the weights at the start.
        lineage: names the updates of this training.
        pending: the round that was sent and not answered yet.
    """

    round: int
    last_applied: str | None
    fingerprint: str | None
    layers: Layout | None
    norm: float | None
    lineage: str
    pending: PendingRound | None

    def to_plain(self, leaf_id: str, branch_id: str) -> dict[str, Any]:
        """Give it as a checkpoint holds it."""
        pending = self.pending
        return {
            "version": _VERSION,
            "leaf_id": leaf_id,
            "branch_id": branch_id,
            "round": self.round,
            "last_applied": self.last_applied,
            "layout": self.fingerprint,
            "layers": None if self.layers is None else self.layers.to_plain(),
            "norm": self.norm,
            "lineage": self.lineage,
            "pending": None
            if pending is None
            else {
                "round": pending.round,
                "upload_id": pending.upload_id,
                "digest": pending.digest,
                "uploaded_bytes": pending.uploaded_bytes,
                "aggregation_id": pending.aggregation_id,
                "waits": pending.waits,
                "run": pending.run,
            },
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], leaf_id: str, branch_id: str) -> RoundState:
        """Read what :meth:`to_plain` gave.

        Raises:
            ConfigurationError: the state is of another leaf or branch (both are named), or is no state.
        """
        if not isinstance(state, Mapping):
            raise ConfigurationError(
                what="state", expected="what state_dict() gave", found=type(state).__name__, fix=_FRESH
            )
        for key, mine in (("leaf_id", leaf_id), ("branch_id", branch_id)):
            if state.get(key) != mine:
                raise ConfigurationError(
                    what=f"checkpoint's {key}", expected=mine, found=str(state.get(key)), fix=_FRESH
                )
        try:
            pending, layers = state["pending"], state.get("layers")
            return cls(
                int(state["round"]),
                state["last_applied"],
                state["layout"],
                None if layers is None else Layout.from_plain(layers),
                state["norm"],
                str(state.get("lineage") or ""),
                # Marks do not outlive a process: whatever the new client heard since it connected counts as newer.
                None if pending is None else PendingRound(mark=-1, **pending),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                what="state", expected="what state_dict() gave", found=f"a broken one ({error})", fix=_FRESH
            ) from error
