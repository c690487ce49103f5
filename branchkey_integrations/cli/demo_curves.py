"""What the demo leaves behind: the figures as JSON, the curves as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from branchkey_integrations.cli.demo_table import Round


def write_figures(
    folder: str,
    parts: Sequence[str],
    alone: Sequence[Sequence[float]],
    rounds: Mapping[int, Round],
    about: Mapping[str, Any],
) -> str:
    """Write ``rounds.json`` and give its path."""
    path = os.path.join(folder, "rounds.json")
    content = {
        **about,
        "leaves": list(parts),
        "alone": [list(series) for series in alone],
        "rounds": [
            {
                "round": row.number,
                "federated": row.federated,
                "leaves": [row.records.get(leaf) for leaf in range(len(parts))],
            }
            for _, row in sorted(rounds.items())
        ],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    return path


def draw_curves(
    folder: str, parts: Sequence[str], alone: Sequence[Sequence[float]], rounds: Mapping[int, Round]
) -> str:
    """Draw ``curves.png`` (alone dashed, federated solid) and give its path."""
    # Not pyplot: that keeps state in the process and may look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (part, series) in enumerate(zip(parts, alone)):
        numbers = range(1, len(series) + 1)
        axes.plot(numbers, series, "--", color=f"C{index + 1}", label=f"leaf {index + 1} alone (classes {part})")
    points = [(row.number, row.federated) for _, row in sorted(rounds.items()) if row.federated is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], "-", color="C0", linewidth=2.5, label="federated model")
    axes.set(xlabel="round", ylabel="accuracy on the common test set, all ten classes", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")
    path = os.path.join(folder, "curves.png")
    figure.savefig(path, dpi=120)
    return path
