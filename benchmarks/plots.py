"""Draw the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import Figures
from benchmarks.scaling import Point, slopes

ROUNDS, SCALING = "benchmark-rounds.svg", "benchmark-scaling.svg"
_COLOURS = ("#8c8c8c", "#bdbdbd", "#1f77b4", "#2ca02c")


def draw(figures: Figures, folder: Path) -> list[str]:
    """Write the plots into ``folder`` and give their names; none where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    # The same figures shall give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"
    names = []
    if figures.results:
        _save(_rounds(figures), folder / ROUNDS)
        names.append(ROUNDS)
    if figures.scaling:
        _save(_scaling(figures.scaling), folder / SCALING)
        names.append(SCALING)
    return names


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def _rounds(figures: Figures) -> Any:
    from matplotlib import pyplot

    cases = figures.results
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.55 * len(cases) + 2), sharey=True)
    labels = list(dict.fromkeys(each.label for results in cases for each in results))
    height = 0.8 / max(len(labels), 1)
    for place, label in enumerate(labels):
        found = [(row, each) for row, results in enumerate(cases) for each in results if each.label == label]
        rows = [row + place * height for row, _ in found]
        colour = _COLOURS[place % len(_COLOURS)]
        left.barh(rows, [each.median("total_s") for _, each in found], height, color=colour, label=label)
        right.barh(rows, [max(each.extra_bytes / 1e6, 0.1) for _, each in found], height, color=colour)
    for axes, title in ((left, "whole round, seconds"), (right, "memory on top of the model, MB")):
        axes.set_xscale("log")
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    left.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], [each[0].case.name for each in cases])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncol=len(labels), bbox_to_anchor=(0.5, -0.02))
    return figure


def _scaling(scaling: dict[str, list[Point]]) -> Any:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(scaling), figsize=(6 * len(scaling), 4), squeeze=False)
    for axes, (kind, points) in zip(grid[0], scaling.items()):
        time_slope, memory_slope = slopes(points)
        x = [point.x for point in points]
        axes.loglog(x, [point.seconds for point in points], "o-", label=f"round, s (slope {time_slope:.2f})")
        memory = [max(point.extra_bytes / 1e6, 0.1) for point in points]
        axes.loglog(x, memory, "s--", label=f"extra memory, MB (slope {memory_slope:.2f})")
        axes.set_xlabel(kind)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
