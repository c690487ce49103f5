"""The options that all three adapters spell alike, checked when they are given."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Union

from branchkey_integrations.archive import check_weighting
from branchkey_integrations.config import check_seconds
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.gate import Gate
from branchkey_integrations.parameters import Selection, Selector

Weighting = Union[str, float, Callable[[Mapping[str, float]], float]]


@dataclass(frozen=True)
class RoundOptions:
    """Say how rounds are made; the names are keyword arguments of every adapter.

    Args:
        weighting: ``"samples"`` (really seen since the last round), a number, or ``f(metrics) -> float``.
        every_n_epochs: a round each n-th epoch.
        timeout_s: longest wait for an aggregate, in seconds; None waits for ever.
        wait: wait for the aggregate of each round; False never stops training and applies the newest one that has come.
        on_error: ``"raise"``, or ``"keep_local"``: warn, keep the local weights, try again next round.
        parameters: ``"all"``, ``"trainable"``, glob patterns, or ``f(name, tensor) -> bool``.
        buffers: also floating buffers such as BatchNorm statistics, after the parameters.
        optimizer_state: ``"keep"``, or ``"reset"``: clear moments after an aggregate is loaded.
        gate: what an aggregate must pass before it is loaded.
        report_metrics: send each round's metrics to the platform.
        progress: show rounds in the progress bar and logger; None decides by where the script runs.
        journal: a folder in which each step of each round is noted, so that a process that was killed goes on without
            sending a round twice or missing its aggregate: ``<leaf id>.jsonl``, at most a few megabytes. It stays when the
            training ends, since a checkpoint of it may be resumed; delete it when none will be. None: as the adapter says;
            False: nowhere.
        spool_bytes: with ``on_error="keep_local"`` and a journal, an update up to this size that cannot be sent waits
            beside the journal and is sent when the link is back, unless a newer one comes first; 0: none waits.
    """

    weighting: Weighting = "samples"
    every_n_epochs: int = 1
    timeout_s: float | None = 600.0
    wait: bool = True
    on_error: str = "raise"
    parameters: Selection = "all"
    buffers: bool = False
    optimizer_state: str = "keep"
    gate: Gate = field(default_factory=Gate)
    report_metrics: bool = True
    progress: bool | None = None
    journal: str | os.PathLike[str] | bool | None = None
    spool_bytes: int = 2 * 1024**3

    def __post_init__(self) -> None:
        if not callable(self.weighting) and self.weighting != "samples":
            if isinstance(self.weighting, str):
                raise _wrong("weighting", '"samples", a number or f(metrics) -> float', self.weighting, '"samples"')
            check_weighting(self.weighting)
        every = self.every_n_epochs
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise _wrong("every_n_epochs", "a whole number from 1", every, "1")
        check_seconds("timeout_s", self.timeout_s, optional=True)
        limit = self.spool_bytes
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise _wrong("spool_bytes", "a whole number of bytes from 0", limit, "2_000_000_000")
        if self.on_error not in ("raise", "keep_local"):
            raise _wrong("on_error", '"raise" or "keep_local"', self.on_error, '"keep_local"')
        if self.optimizer_state not in ("keep", "reset"):
            raise _wrong("optimizer_state", '"keep" or "reset"', self.optimizer_state, '"keep"')
        for name in ("wait", "buffers", "report_metrics"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "True or False", getattr(self, name), "True")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise _wrong("progress", "True, False or None", self.progress, "None")
        if not (self.journal is None or self.journal is False or isinstance(self.journal, (str, os.PathLike))):
            raise _wrong("journal", "the path of a folder, False or None", self.journal, '"runs/branchkey"')
        if not isinstance(self.gate, Gate):
            raise _wrong("gate", "a Gate", self.gate, "Gate(max_norm_ratio=10)")
        Selector(self.parameters)

    @classmethod
    def of(cls, **options: Any) -> RoundOptions:
        """Make options from an adapter's keyword arguments.

        Raises:
            ConfigurationError: an option that does not exist (names the nearest that does), or a wrong value.
        """
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigurationError(
                    what=f"option {name!r}",
                    expected=f"one of {', '.join(known)}",
                    found=repr(name),
                    fix=f"Did you mean {near[0]!r}?" if near else "Take it out",
                )
        return cls(**options)

    @property
    def selector(self) -> Selector:
        """The choice of parameters."""
        return Selector(self.parameters)

    def require_samples(self, samples: float | None) -> None:
        """Demand a number of samples where the weighting needs one.

        Raises:
            ConfigurationError: ``weighting="samples"`` and nobody counted samples.
        """
        if samples is None and not callable(self.weighting) and self.weighting == "samples":
            raise ConfigurationError(
                what="samples",
                expected="how many samples were trained on in this round",
                found="None",
                fix="Pass samples=len(dataset), or choose weighting=<a number>",
            )

    def weight(self, samples: float | None, metrics: Mapping[str, float]) -> float:
        """Work out a round's weighting.

        Raises:
            WeightingError: the result is no finite number above zero.
            ConfigurationError: ``weighting="samples"`` and nobody counted samples.
        """
        if callable(self.weighting):
            return check_weighting(self.weighting(metrics))
        if self.weighting != "samples":
            return check_weighting(self.weighting)
        self.require_samples(samples)
        return check_weighting(samples)


def finite_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Keep the metrics that are finite numbers, as plain floats."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigurationError(
            what="metrics",
            expected="numbers by name",
            found=type(metrics).__name__,
            fix='Pass for example {"loss": 0.5}',
        )
    kept = {}
    for name, value in (metrics or {}).items():
        try:
            # A loss still holds on to its graph, and torch warns of a number made of it.
            number = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            kept[str(name)] = number
    return kept


def _wrong(name: str, expected: str, found: object, example: str) -> ConfigurationError:
    return ConfigurationError(what=name, expected=expected, found=repr(found), fix=f"Pass for example {name}={example}")
