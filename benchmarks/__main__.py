"""Measure rounds, ours and the official client's, and write a report: ``make bench``, or ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import limits, models, others, plan, plots, report, scaling
from benchmarks.environments import REPOSITORY
from benchmarks.runner import Result, Runner

_OTHERS_MODEL = {False: "vit-b", True: "resnet18"}


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two minutes instead of a quarter of an hour")
    size.add_argument("--everything", action="store_true", help="every kind of values at 400M too: an hour")
    parser.add_argument("--models", nargs="+", help=f"{', '.join(models.MODELS)}, or plain:<parameters>x<layers>")
    parser.add_argument("--dtypes", nargs="+", choices=models.DTYPES, help="kinds of values")
    parser.add_argument("--links", nargs="+", choices=list(plan.LINKS), help="speeds of the link")
    parser.add_argument("--rounds", type=int, help="rounds of each case, instead of what suits its size")
    parser.add_argument("--without-official", action="store_true", help="ours only: no environments, no registry")
    parser.add_argument("--without-scaling", action="store_true", help="leave out the growth with size and layers")
    parser.add_argument("--without-others", action="store_true", help="leave out Flower and NVFlare")
    parser.add_argument("--without-verification", action="store_true", help="do not read archives back")
    parser.add_argument(
        "--output", type=Path, help="folder for the report (default: docs; with --quick: build/benchmarks)"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; the report is written whatever was measured when something fails."""
    arguments = _arguments(given)
    cases = plan.EVERYTHING if arguments.everything else plan.QUICK if arguments.quick else plan.FULL
    try:
        chosen = plan.choose(
            cases,
            models_wanted=arguments.models,
            dtypes=arguments.dtypes,
            links=arguments.links,
            official=not arguments.without_official,
            rounds=arguments.rounds,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # A quick look is not to replace the figures that the documentation shows.
    folder = arguments.output or REPOSITORY / ("build/benchmarks" if arguments.quick else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", flush=True)

    figures = report.Figures(limits.machine())
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        try:
            _measure(arguments, chosen, Path(temporary), figures, tell)
        finally:
            _write(figures, folder)
    tell(f"done; the report is in {_short(folder)}")
    for what, promised, measured, kept in report.goals(figures):
        print(f"{'ok ' if kept else 'NOT'}  {what}: {measured} (goal: {promised})")
    return 0


def _measure(
    arguments: argparse.Namespace, cases: list[plan.Case], folder: Path, figures: report.Figures, tell: object
) -> None:
    assert callable(tell)
    tell("limits of this machine")
    figures.limits = limits.measured()
    with contextlib.closing(Runner(folder, tell)) as runner:
        for case in cases:
            figures.results.append(runner.run(case))
            for line in _lines(figures.results[-1]):
                tell(f"    {line}")
        if not arguments.without_verification:
            official = not arguments.without_official
            for model, dtype in dict.fromkeys(
                (case.model, case.dtype) for case in cases if _checkable(arguments, case)
            ):
                tell(f"reading back {model} {dtype}")
                for contender in (plan.OURS, plan.STORED):
                    runner.verify(model, dtype, contender, official)
        if not arguments.without_scaling:
            figures.scaling = scaling.measured(runner, arguments.quick)
        figures.verified, figures.not_run = runner.verified, runner.not_run
    if not arguments.without_others:
        tell("other systems")
        figures.others_model = _OTHERS_MODEL[arguments.quick]
        figures.others, not_run = others.measured(figures.others_model, "float32", folder)
        figures.not_run += not_run


def _checkable(arguments: argparse.Namespace, case: plan.Case) -> bool:
    """Keep a quick run quick: what is read back there is the small models."""
    return not arguments.quick or models.parameters_in(case.model) < 50_000_000


def _lines(results: list[Result]) -> Iterator[str]:
    for each in results:
        took = f"{each.label:15} {each.median('total_s'):8.3f} s, cpu {each.median('cpu_s'):8.3f} s"
        yield f"{took}, extra {each.extra_bytes / 1e6:6.1f} MB, sent {each.uploaded_bytes / 1e6:.1f} MB"


def _write(figures: report.Figures, folder: Path) -> None:
    names = plots.draw(figures, folder)
    (folder / "BENCHMARKS.md").write_text(report.markdown(figures, names), encoding="utf-8")
    (folder / "benchmarks.json").write_text(
        json.dumps(dataclasses.asdict(figures), indent=1, default=str) + "\n", encoding="utf-8"
    )


def _short(path: Path) -> str:
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


if __name__ == "__main__":
    raise SystemExit(main())
