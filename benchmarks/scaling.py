"""How time and memory of a round grow with the model: by its size, and by the number of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.plan import OURS, Case
from benchmarks.runner import Runner

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 400_000_000)
QUICK_SIZES = (1_000, 100_000, 10_000_000)
LAYERS = (2, 20, 200, 2_000, 20_000)
QUICK_LAYERS = (2, 200, 2_000)
_LAYERS_OF_A_SIZE = 10
_SIZE_OF_A_LAYER = 100
#: Less cannot be told from what the interpreter itself takes in passing.
_FLOOR_BYTES = 1_000_000


@dataclass(frozen=True)
class Point:
    """What a round of one model took; ``x`` is its parameters or its layers."""

    x: int
    seconds: float
    extra_bytes: int


def measured(runner: Runner, quick: bool) -> dict[str, list[Point]]:
    """Measure rounds over loopback, against the number of parameters and of layers."""
    by_size = [(size, f"plain:{size}x{_LAYERS_OF_A_SIZE}") for size in (QUICK_SIZES if quick else SIZES)]
    by_layers = [(count, f"plain:{count * _SIZE_OF_A_LAYER}x{count}") for count in (QUICK_LAYERS if quick else LAYERS)]
    return {
        "parameters": [_point(runner, x, model) for x, model in by_size],
        "layers": [_point(runner, x, model) for x, model in by_layers],
    }


def _point(runner: Runner, x: int, model: str) -> Point:
    (result,) = runner.run(Case(model, rounds=5 if x <= 1_000_000 else 1, contenders=(OURS,)))
    return Point(x, result.median("total_s"), result.extra_bytes)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit a straight line to logarithms by least squares: 1 is proportional growth, 0 is none."""
    across, up = [math.log(value) for value in x], [math.log(value) for value in y]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    spread = sum((value - middle) ** 2 for value in across)
    return sum((value - middle) * (other - height) for value, other in zip(across, up)) / spread


def slopes(points: Sequence[Point]) -> tuple[float, float]:
    """Give the slopes of time and of extra memory; less memory than a megabyte counts as one."""
    x = [float(point.x) for point in points]
    memory = [float(max(point.extra_bytes, _FLOOR_BYTES)) for point in points]
    return slope(x, [point.seconds for point in points]), slope(x, memory)
