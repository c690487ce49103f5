"""Let leaves train for many rounds against a branch that does its worst, and account for every round afterwards.

    python -m benchmarks.soak --rounds 500 --leaves 4 --chaos 0.2

The branch is ``branchkey-integrations sandbox --chaos`` in a process of its own; the leaves are threads of this one, each a plain
client and round engine with ``on_error="keep_local"``. At the end: each round must have been counted once at every leaf, the
weights must equal a replay of the leaves' journals bit for bit, and memory, file descriptors and threads must be flat. Exit
status 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from branchkey_integrations import Client, Credentials
from branchkey_integrations import journal as journal_module
from branchkey_integrations import noted as noted_module
from branchkey_integrations import outcome as outcome_module
from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.options import RoundOptions
from branchkey_integrations.parameters import LayerSpec, Layout
from branchkey_integrations.rounds import RoundEngine
from branchkey_integrations.sandbox import Sandbox

_SHAPES = {"weight": (32, 16), "bias": (16,)}
#: Patient in numbers and quick in pace: the faults are many, and nobody is spared by waiting.
_RETRY = RetryPolicy(attempts=12, backoff_s=0.01, backoff_max_s=0.3, budget_s=60.0)
_ROUND_S = 120.0
_MOST_TRIES = 50
_MOST_FDS = 8
_MOST_THREADS = 2
_MOST_MEMORY = 4 << 20
_REMEMBERED = 40


class Weights:
    """A model of two arrays whose training is a formula, so that it can be done again."""

    def __init__(self, leaf: int) -> None:
        self.leaf = leaf
        self.arrays = {name: np.full(shape, leaf, np.float32) for name, shape in _SHAPES.items()}

    def train(self, step: int) -> None:
        """Take a step that differs from leaf to leaf and from step to step, and always comes out the same."""
        generator = np.random.default_rng((self.leaf, step))
        for array in self.arrays.values():
            array += generator.normal(scale=0.1, size=array.shape).astype(np.float32)

    def layout(self) -> Layout:
        """Describe the arrays."""
        return Layout(tuple(LayerSpec(name, array.shape, array.dtype.name) for name, array in self.arrays.items()))

    def read(self) -> list[np.ndarray]:
        """Give copies."""
        return [array.copy() for array in self.arrays.values()]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Take all or none."""
        for array, new in zip(self.arrays.values(), [arrays[index] for index in range(len(arrays))]):
            array[...] = new


def weighting_of(leaf: int) -> float:
    """Give the influence of a leaf."""
    return 10.0 + leaf


@dataclass
class Sample:
    """What this process held at one moment."""

    round: int
    memory_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls, number: int) -> Sample:
        """Look."""
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        page = os.sysconf("SC_PAGE_SIZE")
        return cls(number, pages * page, len(os.listdir("/proc/self/fd")), threading.active_count())


@dataclass
class Account:
    """What came of it; ``problems`` is empty when all is well."""

    rounds: int
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def demand(self, good: bool, problem: str) -> None:
        """Note a problem unless all is well."""
        if not good:
            self.problems.append(problem)

    def lines(self) -> list[str]:
        """Word it for people."""
        steady = self.samples[len(self.samples) // 4 :] or self.samples
        return [
            f"{self.rounds} rounds in {self.seconds:.0f} s; halves of rounds by how they ended: {self.statuses}",
            "faults met:",
            *(f"  {line}" for line in self.faults),
            "held by the leaves' process, from the first quarter to the end:",
            *(
                f"  {name:<12} {min(values)} to {max(values)}, at the end {values[-1]}"
                for name, values in (
                    ("memory KiB", [sample.memory_bytes >> 10 for sample in steady]),
                    ("descriptors", [sample.descriptors for sample in steady]),
                    ("threads", [sample.threads for sample in steady]),
                )
            ),
            *(
                self.problems
                or ["every round counted once at every leaf; weights equal to the replay; no secret in a log"]
            ),
        ]


class _SecretSearch(logging.Handler):
    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__(logging.DEBUG)
        self.secrets = secrets
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if any(secret in text for secret in (*self.secrets, "signature=", "ticket=")):
            self.found.append(f"{record.name}:{record.lineno}")


@contextmanager
def branch(folder: str, leaves: int, level: float, seed: int, rabbitmq: bool) -> Iterator[dict[str, Any]]:
    """Run the sandbox's command; gives its URL, its broker, and after the block the table of faults."""
    words = ["sandbox", "--leaves", leaves, "--directory", folder, "--chaos", level, "--chaos-seed", seed]
    words += ["--rabbitmq", "auto"] if rabbitmq else []
    process = subprocess.Popen(
        [sys.executable, "-m", "branchkey_integrations", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = {"faults": []}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("url"):
                found["url"] = line.split()[1]
            elif line.startswith("rabbitmq"):
                _, _, host, _, port = line.replace(",", "").split()
                found["broker"] = (host, int(port))
            elif line.startswith("running"):
                break
        yield found
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read().splitlines()
        found["faults"] = [line.strip() for line in rest[rest.index("faults met") + 1 :] if line.startswith("  ")]
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Leaf(threading.Thread):
    """One leaf: train, send, take in, again and again."""

    def __init__(self, index: int, credentials: Credentials, rounds: int, folder: str, place: dict[str, Any]) -> None:
        super().__init__(name=f"leaf-{index}")
        self.index = index
        self.weights = Weights(index)
        self.done = 0
        self.statuses: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._rounds = rounds
        # Every second leaf hears over AMQP where there is a broker.
        broker = place.get("broker") if index % 2 else None
        options = {"rbmq_host": broker[0], "rbmq_port": broker[1]} if broker else {}
        self._client = Client(
            credentials,
            host=place["url"],
            output_dir=os.path.join(folder, "out"),
            retry=_RETRY,
            timeout_s=10.0,
            **options,
        )
        self._options = RoundOptions(
            weighting=weighting_of(index),
            on_error="keep_local",
            timeout_s=_ROUND_S,
            journal=os.path.join(folder, "journal"),
            spool_bytes=0,
        )

    def run(self) -> None:
        """Make all rounds."""
        try:
            with self._client:
                engine = RoundEngine(self._client, self._options)
                try:
                    for step in range(self._rounds):
                        self.weights.train(step)
                        # A half that was skipped did nothing and can be done again.
                        self._until_done(lambda: engine.submit(self.weights).status)
                        self._until_done(lambda: engine.collect(self.weights).status)
                        self.done = step + 1
                finally:
                    engine.close()
        except BaseException as error:  # noqa: BLE001 - told at the end
            self.failure = error

    def _until_done(self, half: Any) -> None:
        for _ in range(_MOST_TRIES):
            status = half()
            self.statuses[status] += 1
            if status != "skipped":
                return
        raise RuntimeError(f"leaf {self.index}: {_MOST_TRIES} tries were skipped")


def closed_rounds(path: str) -> list[tuple[str, str | None, str]]:
    """Read from a journal what became of each round that was sent: status, aggregate, digest of the update."""
    digests: dict[int, str] = {}
    found = []
    with open(path, encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["event"] == "sending":
                digests[line["round"]] = line["digest"]
            elif line["event"] == "closed" and line["status"] != "skipped":
                found.append((line["status"], line["aggregation_id"], digests[line["round"]]))
    return found


def replayed(journals: Sequence[Sequence[tuple[str, str | None, str]]], rounds: int) -> list[Weights]:
    """Do all of it again without a network: train, average in float64, round once, load where the journal says so."""
    leaves = [Weights(index) for index in range(len(journals))]
    total = sum(weighting_of(leaf.leaf) for leaf in leaves)
    for step in range(rounds):
        for leaf in leaves:
            leaf.train(step)
        mean = []
        for name in _SHAPES:
            summed = np.zeros(_SHAPES[name], np.float64)
            for leaf in leaves:
                summed += leaf.arrays[name].astype(np.float64) * weighting_of(leaf.leaf)
            mean.append((summed / total).astype(np.float32))
        for leaf, journal in zip(leaves, journals):
            if journal[step][0] == "applied":
                leaf.write(mean)
    return leaves


def check(account: Account, folder: str, leaves: Sequence[Leaf], credentials: Sequence[Credentials]) -> None:
    """Compare what the branch counted, what the leaves noted and what they hold."""
    rounds = account.rounds
    journals = [closed_rounds(os.path.join(folder, "journal", f"{each.id}.jsonl")) for each in credentials]
    # Only its records are looked at; nobody asks it for anything.
    with Sandbox(len(leaves), directory=os.path.join(folder, "branch")) as sandbox:
        uploads, aggregates = sandbox.uploads, sandbox.aggregates
    account.demand(len(uploads) == rounds * len(leaves), f"{len(uploads)} updates counted, not {rounds * len(leaves)}")
    account.demand(len(aggregates) == rounds, f"{len(aggregates)} aggregates, not {rounds}")
    names = {each.id for each in credentials}
    for step in range(rounds):
        group = uploads[step * len(leaves) : (step + 1) * len(leaves)]
        account.demand({each.leaf_id for each in group} == names, f"round {step}: a leaf is missing or counted twice")
        for index, each in enumerate(credentials):
            mine = [upload.digest for upload in group if upload.leaf_id == each.id]
            noted = journals[index][step] if step < len(journals[index]) else ("missing", None, "")
            account.demand(
                noted[1] == (aggregates[step] if step < len(aggregates) else "") and mine == [noted[2]],
                f"round {step}, leaf {index}: the journal says {noted}, the branch another digest or aggregate",
            )
    account.demand(all(len(journal) == rounds for journal in journals), "a journal has more or fewer rounds")
    if account.problems:
        return
    for leaf, again in zip(leaves, replayed(journals, rounds)):
        same = all(np.array_equal(leaf.weights.arrays[name], again.arrays[name]) for name in _SHAPES)
        account.demand(same, f"leaf {leaf.index}: its weights are not those of the replay")


def soak(rounds: int, leaves: int, level: float, seed: int, *, rabbitmq: bool = False, quiet: bool = True) -> Account:
    """Run it and give the account."""
    account = Account(rounds)
    # What is bounded comes to its bound within the first rounds, so that whatever grows later is a leak.
    noted_module.KEPT_ROUNDS = noted_module.KEPT_IDS = outcome_module.LONGEST_HISTORY = _REMEMBERED
    # The replay needs every round, so that the journal's file alone is left whole.
    journal_module.MOST_LINES = max(journal_module.MOST_LINES, 100 * rounds)
    began = time.monotonic()
    log = logging.getLogger("branchkey_integrations")
    with tempfile.TemporaryDirectory(prefix="branchkey-soak-") as folder:
        with branch(os.path.join(folder, "branch"), leaves, level, seed, rabbitmq) as place:
            credentials = [
                Credentials.load(os.path.join(folder, "branch", f"leaf-{index}.json")) for index in range(leaves)
            ]
            search = _SecretSearch([each.session_token for each in credentials])
            before, propagates = log.level, log.propagate
            log.addHandler(search)
            log.setLevel(logging.DEBUG)
            log.propagate = False
            try:
                threads = [Leaf(index, each, rounds, folder, place) for index, each in enumerate(credentials)]
                for thread in threads:
                    thread.start()
                _watch(account, threads, quiet)
            finally:
                log.setLevel(before)
                log.propagate = propagates
                log.removeHandler(search)
        account.seconds = time.monotonic() - began
        account.faults = place["faults"]
        for thread in threads:
            account.demand(thread.failure is None, f"leaf {thread.index} ended with {thread.failure!r}")
            for status, count in thread.statuses.items():
                account.statuses[status] = account.statuses.get(status, 0) + count
        account.demand(not search.found, f"secrets logged at {search.found[:5]}")
        if not account.problems:
            check(account, folder, threads, credentials)
    _check_flat(account)
    return account


def _watch(account: Account, threads: Sequence[Leaf], quiet: bool) -> None:
    step, next_round = max(1, account.rounds // 40), 0
    while any(thread.is_alive() for thread in threads):
        done = min(thread.done for thread in threads)
        if done >= next_round:
            account.samples.append(Sample.now(done))
            next_round = done + step
            if not quiet:
                print(f"round {done}: {account.samples[-1]}", file=sys.stderr, flush=True)
        threads[0].join(0.1)
        if any(thread.failure is not None for thread in threads) and not quiet:
            print([thread.failure for thread in threads], file=sys.stderr, flush=True)


def _check_flat(account: Account) -> None:
    half = account.samples[len(account.samples) // 2 :]
    early = account.samples[len(account.samples) // 4 : len(account.samples) // 2] or half
    for name, most in (("descriptors", _MOST_FDS), ("threads", _MOST_THREADS), ("memory_bytes", _MOST_MEMORY)):
        grown = max((getattr(each, name) for each in half), default=0) - max(
            (getattr(each, name) for each in early), default=0
        )
        account.demand(grown <= most, f"{name} grew by {grown} in the second half")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--rounds", type=int, default=500, metavar="N")
    parser.add_argument("--leaves", type=int, default=4, metavar="N")
    parser.add_argument("--chaos", type=float, default=0.2, metavar="P")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument(
        "--rabbitmq", action="store_true", help="every second leaf hears over AMQP, and the broker is killed"
    )
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args(argv)
    account = soak(
        arguments.rounds,
        arguments.leaves,
        arguments.chaos,
        arguments.seed,
        rabbitmq=arguments.rabbitmq,
        quiet=not arguments.progress,
    )
    print("\n".join(account.lines()))
    return 1 if account.problems else 0


if __name__ == "__main__":
    sys.exit(main())
