"""The federated part of the demo: a sandbox, three leaves, and what happens when one of them dies."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from branchkey_integrations.cli.demo_leaves import LeafProcess, end_all
from branchkey_integrations.cli.demo_table import Table
from branchkey_integrations.cli.interrupts import Interrupts
from branchkey_integrations.cli.progress import Progress
from branchkey_integrations.errors import BranchKeyError

_POLL_S = 0.05


class Federation:
    """Run the leaves against a sandbox until all have ended.

    A leaf that ends by itself with an error ends the demo. One that is killed does not: the others end their round at the
    timeout and train on with their own weights. Then, unless told otherwise, it is started again from its checkpoint, at
    the round in which the others are.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        interrupts: Interrupts,
        progress: Progress,
        table: Table,
        parts: Sequence[str],
        script: str,
        folder: str,
        output: str,
    ) -> None:
        self._arguments = arguments
        self._interrupts = interrupts
        self._progress = progress
        self._table = table
        self._parts = parts
        self._script = script
        self._folder = folder
        self._output = output
        self._leaves: list[LeafProcess] = []
        self._dead: set[int] = set()
        self._missed: set[int] = set()

    def run(self) -> None:
        """Start sandbox and leaves, print the table, and end what was started, come what may.

        Raises:
            BranchKeyError: sandbox or broker cannot start, or a leaf failed or all were killed.
        """
        from branchkey_integrations.sandbox import Sandbox

        arguments = self._arguments
        over = "RabbitMQ" if arguments.rabbitmq else "WebSocket"
        self._progress.say(f"\nNow together. Starting a sandbox with notifications over {over} ...")
        sandbox = Sandbox(len(self._parts), rabbitmq="auto" if arguments.rabbitmq else None)
        try:
            sandbox.open()
            self._progress.say(f"Sandbox at {sandbox.url}; starting the leaves ...")
            self._make_leaves(sandbox)
            for leaf in self._leaves:
                leaf.start(self._interrupts)
            self._watch()
        finally:
            with self._interrupts.ignored():
                end_all(self._leaves)
                sandbox.close()

    def _make_leaves(self, sandbox: Any) -> None:
        arguments = self._arguments
        for index, part in enumerate(self._parts):
            command = [
                self._script,
                "--classes",
                part,
                "--rounds",
                str(arguments.rounds),
                "--seed",
                str(arguments.seed),
            ]
            command += ["--credentials", os.path.join(sandbox.directory, f"leaf-{index}.json"), "--host", sandbox.url]
            command += ["--timeout-s", str(arguments.timeout_s)]
            command += ["--checkpoint", os.path.join(self._folder, f"leaf-{index + 1}.checkpoint")]
            if sandbox.broker is not None:
                command += ["--rbmq-host", sandbox.broker.host, "--rbmq-port", str(sandbox.broker.port)]
            report = os.path.join(self._folder, f"leaf-{index + 1}.jsonl")
            log = os.path.join(self._output, f"leaf-{index + 1}.log")
            self._leaves.append(LeafProcess(f"leaf {index + 1}", command, report, log))

    def _watch(self) -> None:
        ready = 0
        while not all(leaf.ended or index in self._dead for index, leaf in enumerate(self._leaves)):
            for index, leaf in enumerate(self._leaves):
                code = leaf.returncode  # asked before its words are read: after its end there are no more
                for record in leaf.new_records():
                    if record.get("event") == "ready":
                        ready += 1
                        self._welcome(index, record, first=ready == len(self._leaves))
                    elif record.get("event") == "round":
                        self._table.add(index, record)
                        if record.get("status") != "applied":
                            self._missed |= self._dead
                if code is not None and not leaf.ended and index not in self._dead:
                    leaf.require_no_error()
                    self._bury(index, -code)
            present = [index not in self._dead and not leaf.ended for index, leaf in enumerate(self._leaves)]
            self._table.print_complete(present)
            self._revive()
            self._show_life(present)
            time.sleep(_POLL_S)
        self._table.print_complete([False] * len(self._leaves), last=True)
        if not any(leaf.ended for leaf in self._leaves):
            raise BranchKeyError(
                what="demo",
                expected="at least one leaf to train to the end",
                found="all were killed",
                fix="Run it again",
            )

    def _welcome(self, index: int, record: dict[str, Any], *, first: bool) -> None:
        self._progress.say(
            f"  leaf {index + 1} (process {self._leaves[index].pid}): classes {self._parts[index]}, {record['images']} images, "
            f"{record['parameters']} parameters, from round {record['first_round']}"
        )
        if first:
            self._progress.say("Accuracies on the same test images of all ten classes:")
            self._table.header()

    def _bury(self, index: int, number: int) -> None:
        self._dead.add(index)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        after = "then it is started again" if self._arguments.restart_dead else "it stays dead (--no-restart-dead)"
        self._progress.say(
            f"      leaf {index + 1} died ({name}). The others end their round after at most "
            f"{self._arguments.timeout_s:g} s and go on; {after}"
        )

    def _revive(self) -> None:
        """Start the dead again whose absence the others have got over."""
        if not self._arguments.restart_dead:
            return
        for index in sorted(self._missed & self._dead):
            number = self._table.newest + 1
            if number > self._arguments.rounds:
                continue
            self._progress.say(f"      leaf {index + 1} is started again, from its checkpoint, with round {number}")
            self._dead.discard(index)
            self._missed.discard(index)
            self._leaves[index].start(self._interrupts, "--first-round", str(number))

    def _show_life(self, present: Sequence[bool]) -> None:
        waiting = ", ".join(f"leaf {index + 1}" for index in self._table.missing(present))
        if waiting:
            what = f"round {self._table.next_number} of {self._arguments.rounds}" if self._table.newest else "start"
            self._progress.alive(f"      {what}: waiting for {waiting} ...")
