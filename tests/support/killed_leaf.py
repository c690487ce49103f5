"""Start a leaf's process as often as it is killed, until it comes to its end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from branchkey_integrations.sandbox import Sandbox


class KilledLeaf(threading.Thread):
    """One leaf; ``train(leaf, credentials, url, folder, epochs)`` runs in a process of its own, each time anew.

    Args:
        context: makes processes.
        train: a function that keeps a journal somewhere in its folder.
        kills: when each of the first processes is killed: at how many lines of the journal, and how many seconds later.
    """

    def __init__(
        self,
        context: Any,
        train: Any,
        branch: Sandbox,
        index: int,
        folder: Path,
        epochs: int,
        kills: list[tuple[int, float]],
    ) -> None:
        super().__init__()
        credentials = branch.credentials[index].to_dict()
        self.work = (index, credentials, branch.url, str(folder), epochs)
        self.context, self.train, self.folder, self.to_kill = context, train, folder, list(kills)
        self.kills = 0
        self.codes: list[int | None] = []

    def run(self) -> None:
        while not self.codes or self.codes[-1] == -9:
            process = self.context.Process(target=self.train, args=self.work)
            process.start()
            if self.to_kill:
                lines, later_s = self.to_kill.pop(0)
                deadline = time.monotonic() + 60
                while self.noted() < lines and process.is_alive() and time.monotonic() < deadline:
                    process.join(0.002)
                process.join(later_s)
                process.kill()
            process.join(110)
            self.codes.append(process.exitcode)
            self.kills += process.exitcode == -9

    def noted(self) -> int:
        """Count the lines of the journal."""
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("*/*.jsonl"))


def federate(
    context: Any, train: Any, folder: Path, epochs: int, kills: list[list[tuple[int, float]]]
) -> tuple[list[KilledLeaf], list[int], int]:
    """Train leaves in one branch, one for each list of kills; give them, their numbers of updates, and that of rounds."""
    with Sandbox(leaves=len(kills)) as branch:
        leaves = [
            KilledLeaf(context, train, branch, index, folder / f"leaf{index}", epochs, each)
            for index, each in enumerate(kills)
        ]
        for leaf in leaves:
            leaf.folder.mkdir(parents=True)
            leaf.start()
        for leaf in leaves:
            leaf.join(300)
            assert leaf.codes[-1] == 0
        counts = Counter(upload.leaf_id for upload in branch.uploads)
        return leaves, sorted(counts.values()), len(branch.aggregates)
