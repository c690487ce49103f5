"""Turn the figures of a run into Markdown: goals, rounds, stages, limits, scaling."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import STAGES
from benchmarks.runner import Result
from benchmarks.scaling import Point, slopes

_LARGE = ("vit-b", "gpt-400m")


@dataclass
class Figures:
    """Everything that a run has measured."""

    machine: str
    results: list[list[Result]] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, list[Point]] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    others_model: str = ""
    verified: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


def ratio(peer: Result, ours: Result, key: str) -> float:
    """Give the median of the ratios of rounds that stood beside each other; larger is better for ours."""

    def value(took: dict[str, Any]) -> float:
        found: float = took.get(key, took["stages"].get(key, 0.0))
        return found

    pairs = list(zip(peer.rounds, ours.rounds))
    return statistics.median(value(theirs) / max(value(mine), 1e-9) for theirs, mine in pairs)


def peer_of(results: Sequence[Result]) -> Result | None:
    """Give the official client's newest series, which the others are compared with."""
    return next((each for each in results if each.contender.kind == "official"), None)


def goals(figures: Figures) -> list[tuple[str, str, str, bool]]:
    """Hold what was measured against what the project promises: (what, promised, measured, kept)."""
    rows: list[tuple[str, str, str, bool]] = []

    def at_least(what: str, least: float, found: float) -> None:
        rows.append((what, f"at least {least:g}x", f"{found:.1f}x", found >= least))

    def at_most(what: str, most: float, found: float, unit: str) -> None:
        rows.append((what, f"at most {most:g}{unit}", f"{found:.3g}{unit}", found <= most))

    for results in figures.results:
        case, peer = results[0].case, peer_of(results)
        for ours in results:
            if ours.contender.kind != "ours":
                continue
            stored = ours.contender.compression == "store"
            plain = case.dtype == "float32" and case.link == "loopback"
            if plain and case.model in _LARGE and case.answer == "deflate":
                at_most(f"extra peak memory, {case.model}, {ours.label}", 20, ours.extra_bytes / 1e6, " MB")
            if peer is not None and plain and not stored and case.answer == "deflate":
                if case.model == "vit-b":
                    at_least("write, vit-b", 14, ratio(peer, ours, "write"))
                if case.model in _LARGE:
                    at_least(f"round, {case.model}", 5, ratio(peer, ours, "total_s"))
                    at_least(f"processor time, {case.model}", 5, ratio(peer, ours, "cpu_s"))
                if case.model == "lenet":
                    at_least("round, lenet", 2, ratio(peer, ours, "total_s"))
            if peer is not None and plain and stored and case.answer == "stored":
                at_least(f"round with stored members, {case.model}", 9, ratio(peer, ours, "total_s"))
            if case.link == "100 Mbit/s" and case.model != "lenet" and not stored:
                spent = ours.median("total_s") / ours.link_s
                at_most(f"round at 100 Mbit/s by the time its bytes need, {case.model}", 1.05, spent, "")
    return rows


def markdown(figures: Figures, plots: Iterable[str] = ()) -> str:
    """Write the whole report."""
    parts = [
        "# Benchmarks",
        "",
        "Made by `make bench`, in one run, with the rounds of all contenders interleaved against one server on this machine.",
        "",
        f"Machine: {figures.machine}.",
        "",
        *(f"![{name}]({name})" for name in plots),
        "",
    ]
    kept = goals(figures)
    if kept:
        parts += ["## Goals", "", *_table(("what", "goal", "measured", "kept"), [_goal(row) for row in kept]), ""]
    parts += [
        "## Rounds",
        "",
        "Seconds of a whole round (median, and lowest to highest), processor seconds of the leaf, peak memory on top of the",
        "model in a fresh process. `x` is the official client's time by this one's, the median of rounds side by side.",
        "",
        *_table(
            (
                "case",
                "who",
                "rounds",
                "total s",
                "spread",
                "x",
                "cpu s",
                "x cpu",
                "extra MB",
                "sent MB",
                "by link time",
            ),
            [row for results in figures.results for row in _rounds(results)],
        ),
        "",
        "## Stages",
        "",
        "Wall seconds, and processor seconds in brackets, of the parts of a round.",
        "",
        *_table(("case", "who", *STAGES), [row for results in figures.results for row in _stages(results)]),
        "",
    ]
    if figures.limits:
        rows = [(name, f"{rate:,.0f}") for name, rate in figures.limits.items()]
        parts += ["## Limits of this machine", "", *_table(("what one core does", "MB/s"), rows), ""]
    if figures.scaling:
        parts += ["## Scaling", "", *_scaling(figures.scaling), ""]
    if figures.others:
        title = f"## Other systems: packing and unpacking {figures.others_model} alone, no network, no checks"
        rows = [
            (
                each["label"],
                f"{each['stages']['write']:.3g}",
                f"{each['stages']['load']:.3g}",
                f"{each['cpu_s']:.3g}",
                f"{each['extra_bytes'] / 1e6:.0f}",
                f"{each['bytes'] / 1e6:.1f}",
            )
            for each in figures.others
        ]
        parts += [title, "", *_table(("who", "pack s", "unpack s", "cpu s", "extra MB", "bytes MB"), rows), ""]
    if figures.verified:
        parts += ["## Read back bit for bit", "", *(f"- {line}" for line in figures.verified), ""]
    if figures.not_run:
        parts += ["## Not run", "", *(f"- {line}" for line in figures.not_run), ""]
    return "\n".join([*parts, _HOW])


def _goal(row: tuple[str, str, str, bool]) -> tuple[str, ...]:
    what, promised, measured, kept = row
    return what, promised, measured, "yes" if kept else "**no**"


def _rounds(results: Sequence[Result]) -> list[tuple[str, ...]]:
    peer = peer_of(results)
    rows = []
    for each in results:
        totals = [took["total_s"] for took in each.rounds]
        rows.append(
            (
                each.case.name,
                each.label,
                str(len(each.rounds)),
                f"{each.median('total_s'):.3g}",
                f"{min(totals):.3g}-{max(totals):.3g}",
                f"{ratio(peer, each, 'total_s'):.2f}" if peer else "",
                f"{each.median('cpu_s'):.3g}",
                f"{ratio(peer, each, 'cpu_s'):.2f}" if peer else "",
                f"{each.extra_bytes / 1e6:.1f}",
                f"{each.uploaded_bytes / 1e6:.1f}",
                f"{each.median('total_s') / each.link_s:.3f}" if each.link_s else "",
            )
        )
    return rows


def _stages(results: Sequence[Result]) -> list[tuple[str, ...]]:
    rows = []
    for each in results:
        cells = []
        for stage in STAGES:
            walls = [took["stages"].get(stage) for took in each.rounds if stage in took["stages"]]
            cpus = [took["stages_cpu"][stage] for took in each.rounds if stage in took["stages_cpu"]]
            cells.append(f"{statistics.median(walls):.3g} ({statistics.median(cpus):.3g})" if walls else "")
        rows.append((each.case.name, each.label, *cells))
    return rows


def _scaling(scaling: dict[str, list[Point]]) -> list[str]:
    lines = []
    for kind, points in scaling.items():
        time_slope, memory_slope = slopes(points)
        rows = [(f"{point.x:,}", f"{point.seconds:.4g}", f"{point.extra_bytes / 1e6:.1f}") for point in points]
        lines += [*_table((kind, "round s", "extra MB"), rows), ""]
        lines.append(f"Slopes in logarithms, against {kind}: time {time_slope:.2f}, memory {memory_slope:.2f}.")
        lines.append("")
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


_HOW = """## How it is measured

- The server is one process of bare sockets. It takes uploads and throws them away, hands out one file, and keeps to the speed
  of the link in both directions. It costs every contender the same.
- Our leaf is the product: `RoundEngine`, `Client` and `TorchParameters` on a torch module, with every check of the gate on. The
  official client's leaf does what its documentation says: convert, `save_weights`, `file_upload`, `file_download`, `numpy.load`,
  copy; its weights are numpy arrays, so that torch's own costs count for our side only.
- Left out on both sides: the connection to the platform and the notification channel. An id is put into each client's own queue.
- The official client's time-out is raised to an hour: by default an upload that takes longer than 30 s fails.
- `write` holds, for ours, the digest, the check for NaN and the length; the official client reads its file twice more under
  `post`. `check` and `load` both unpack the aggregate: nothing is loaded before everything was checked.
- Values are normal numbers (bfloat16: rounded to it, kept as float32), which compress as trained weights do. Equal layers of
  an aggregate hold equal values, so that the server's file is made quickly; reading is not made easier by it.
- Up to 64 MB all rounds of a contender run in one process and memory is that of the first; above, each in a fresh process.
- After each round the weights in the model are compared with those that were handed out, bit for bit.
"""
