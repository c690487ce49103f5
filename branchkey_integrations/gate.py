"""What an aggregate must pass before it is loaded into a live model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from branchkey_integrations.errors import AggregateRejectedError, ArchiveError, ConfigurationError, LayoutError
from branchkey_integrations.parameters import Layout
from branchkey_integrations.screening import screen
from branchkey_integrations.values import squared_norm

__all__ = ["Gate", "squared_norm"]


@dataclass(frozen=True)
class Gate:
    """Say what an aggregate must pass. Count, shapes, dtypes, range and finite values are always checked.

    Args:
        max_norm_ratio: the aggregate's Euclidean norm over all layers may be at most this many times that of the last good
            one (of the uploaded weights in the first round), and at least its inverse; above 1. None: not checked.
        max_metric_drop: after loading, ``metric()`` may be at most this much lower than before; otherwise the weights from
            before are put back, bit for bit. Needs one copy of the parameters in memory. None: not checked.
        metric: a function without arguments that scores the live model, higher is better (accuracy on a held-out batch).

    Raises:
        ConfigurationError: a limit is out of range, or ``max_metric_drop`` comes without ``metric``.
    """

    max_norm_ratio: float | None = None
    max_metric_drop: float | None = None
    metric: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        for name, lowest, including in (("max_norm_ratio", 1.0, False), ("max_metric_drop", 0.0, True)):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < lowest or (value == lowest and not including):
                raise ConfigurationError(
                    what=f"gate {name}",
                    expected=f"a number {'from' if including else 'above'} {lowest:g}, or None",
                    found=repr(value),
                    fix=f"Pass for example Gate({name}={lowest + 2:g})",
                )
        if (self.max_metric_drop is None) != (self.metric is None):
            raise ConfigurationError(
                what="gate max_metric_drop and metric",
                expected="both or neither",
                found="one of them",
                fix="Pass Gate(max_metric_drop=0.05, metric=lambda: accuracy(model, held_out_batch))",
            )

    def check(
        self, aggregation_id: str, arrays: Sequence[np.ndarray], layout: Layout, reference_norm: float | None = None
    ) -> float:
        """Check an aggregate against the model's layout, in the memory of a few pieces.

        Args:
            aggregation_id: for the message.
            arrays: the layers, possibly decoded lazily.
            layout: what the model needs.
            reference_norm: the norm that ``max_norm_ratio`` refers to.

        Returns:
            The aggregate's Euclidean norm.

        Raises:
            AggregateRejectedError: says which layer, what was expected, what was found.
        """
        try:
            total = screen(arrays, layout)
        except (LayoutError, ArchiveError) as error:
            raise AggregateRejectedError(
                what=f"aggregate {aggregation_id}" + ("" if error.what == "aggregate" else f", {error.what}"),
                expected=error.expected,
                found=error.found,
                fix=error.fix,
                aggregation_id=aggregation_id,
            ) from error
        norm = math.sqrt(total)
        self._check_norm(aggregation_id, norm, reference_norm)
        return norm

    def _check_norm(self, aggregation_id: str, norm: float, reference: float | None) -> None:
        if self.max_norm_ratio is None or not reference:
            return
        ratio = norm / reference
        if ratio > self.max_norm_ratio or ratio * self.max_norm_ratio < 1:
            raise AggregateRejectedError(
                what=f"aggregate {aggregation_id}, its norm",
                expected=f"within {self.max_norm_ratio:g} times {reference:.6g}, the last good one",
                found=f"{norm:.6g}",
                fix="Nothing was loaded; raise max_norm_ratio if such a jump is normal here",
                aggregation_id=aggregation_id,
            )

    def score(self) -> float | None:
        """Score the live model with the user's metric; None without one."""
        return None if self.metric is None else float(self.metric())

    def check_score(self, aggregation_id: str, before: float | None, after: float | None) -> None:
        """Demand that the score did not drop too far. NaN after a number counts as the deepest drop.

        Raises:
            AggregateRejectedError: the caller must put the former weights back.
        """
        if self.max_metric_drop is None or before is None or after is None or math.isnan(before):
            return
        if math.isnan(after) or before - after > self.max_metric_drop:
            raise AggregateRejectedError(
                what=f"aggregate {aggregation_id}, your metric",
                expected=f"at least {before - self.max_metric_drop:.6g} (it was {before:.6g})",
                found=f"{after:.6g}",
                fix="The weights from before were put back",
                aggregation_id=aggregation_id,
            )
