"""``demo``: three leaves train one model together on this machine."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence

from branchkey_integrations.cli.demo_curves import draw_curves, write_figures
from branchkey_integrations.cli.demo_federation import Federation
from branchkey_integrations.cli.demo_leaves import LeafProcess, end_all
from branchkey_integrations.cli.demo_setup import find_script, make_folder, require_packages
from branchkey_integrations.cli.demo_table import Table
from branchkey_integrations.cli.interrupts import Interrupts
from branchkey_integrations.cli.progress import Progress
from branchkey_integrations.errors import BranchKeyError

#: The classes that each leaf owns.
PARTS = ("0-3", "4-6", "7-9")
_POLL_S = 0.05


def run_demo(arguments: argparse.Namespace, interrupts: Interrupts) -> int:
    """Train the leaves alone, then together; print a table, draw the curves; 1 if the federation did not win.

    Raises:
        BranchKeyError: something is missing, or a leaf failed. Nothing is left running in any case.
    """
    script = find_script(arguments.framework, arguments.leaves_script)
    require_packages(arguments.framework)
    output = make_folder(arguments.output)
    began = time.monotonic()
    progress = Progress()
    progress.say(
        f"Three leaves, each with its own classes of handwritten digits ({', '.join(PARTS)}), {arguments.rounds} rounds."
    )
    with tempfile.TemporaryDirectory(prefix="branchkey-demo-") as folder:
        alone = _train_alone(arguments, interrupts, progress, script, folder, output)
        table = Table(alone, arguments.timeout_s, progress.say)
        federation = Federation(arguments, interrupts, progress, table, PARTS, script, folder, output)
        federation.run()
    seconds = time.monotonic() - began
    about = {"framework": arguments.framework, "seed": arguments.seed, "seconds": round(seconds, 1)}
    write_figures(output, PARTS, alone, table.rounds, about)
    progress.alive("drawing the curves ...")
    picture = draw_curves(output, PARTS, alone, table.rounds)
    good = _verdict(progress, alone, table)
    progress.say(f"Curves in {picture}. {seconds:.0f} s in all.")
    return 0 if good else 1


def _train_alone(
    arguments: argparse.Namespace, interrupts: Interrupts, progress: Progress, script: str, folder: str, output: str
) -> list[list[float]]:
    """Train a twin of each leaf without the federation; gives the accuracies after each round.

    They come first, so that the table can show both from the first row on.
    """
    progress.say("First what each leaf reaches alone:")
    twins = []
    for index, part in enumerate(PARTS):
        command = [script, "--alone", "--classes", part]
        command += ["--rounds", str(arguments.rounds), "--seed", str(arguments.seed)]
        report = os.path.join(folder, f"alone-{index + 1}.jsonl")
        log = os.path.join(output, f"alone-{index + 1}.log")
        twins.append(LeafProcess(f"leaf {index + 1} alone", command, report, log))
    curves: list[list[float]] = [[] for _ in PARTS]
    try:
        for twin in twins:
            twin.start(interrupts)
        while not all(twin.ended for twin in twins):
            for index, twin in enumerate(twins):
                code = twin.returncode  # asked before its words are read: after its end there are no more
                for record in twin.new_records():
                    if record.get("event") == "round":
                        curves[index].append(float(record["accuracy"]))
                    elif record.get("event") == "end":
                        final = curves[index][-1] if curves[index] else 0.0
                        progress.say(
                            f"  leaf {index + 1}, classes {PARTS[index]}: {final:.3f} on the test images of all classes"
                        )
                if code is not None and not twin.ended:
                    twin.require_no_error()
                    raise BranchKeyError(
                        what=twin.name,
                        expected="training to the end",
                        found=f"killed by signal {-code}",
                        fix="Run again",
                    )
            rounds = ", ".join(str(len(curve)) for curve in curves)
            progress.alive(
                f"  training alone: round {rounds} of {arguments.rounds}" if any(curves) else "  starting ..."
            )
            time.sleep(_POLL_S)
    finally:
        with interrupts.ignored():
            end_all(twins)
    return curves


def _verdict(progress: Progress, alone: Sequence[Sequence[float]], table: Table) -> bool:
    """Say how it ended; True if the federated model is ahead of every single leaf and no bits differ."""
    federated = [row.federated for _, row in sorted(table.rounds.items()) if row.federated is not None]
    singles = [series[-1] for series in alone]
    progress.say("")
    for index, (part, single) in enumerate(zip(PARTS, singles)):
        progress.say(f"leaf {index + 1} alone, classes {part}:  {single:.3f}")
    if not federated:
        progress.say("federated model:  none, no round was completed")
        return False
    ahead = federated[-1] > max(singles)
    progress.say(f"federated model:            {federated[-1]:.3f}")
    if any(row.contradicts for row in table.rounds.values()):
        progress.say("The leaves did NOT hold the same parameters after each aggregate.")
        return False
    shared = sum(len(row.digests()) == 1 and row.applied == len(PARTS) for row in table.rounds.values())
    progress.say(
        f"In {shared} of {len(table.rounds)} rounds all {len(PARTS)} leaves ended with bit-identical parameters."
    )
    if ahead:
        progress.say("The federated model is ahead of every single leaf.")
    else:
        progress.say(
            "The federated model is NOT ahead of every single leaf"
            + (" (it needs about 8 rounds for that)." if len(table.rounds) < 15 else ".")
        )
    return ahead
