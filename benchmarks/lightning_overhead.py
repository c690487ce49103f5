"""What the Lightning callback adds to an epoch outside the exchange itself, on the digits network of the example.

    python -m benchmarks.lightning_overhead

Fits without the callback and fits with one whose client answers at once, from memory, take turns. Each makes some epochs, and
medians over all epochs but the first of each fit are compared. Processor seconds are the measure, because other processes on
the machine disturb them less than the clock; the clock's are printed too. The difference of two medians is still of the size
of what is sought, so the callback's own hooks are timed as well: as a whole, and without the halves of the round in them
(reading, checking and loading the model, which are stages of the exchange; network and archive take no time here).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.outcome import UploadReceipt

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "lightning_digits.py"
GOAL = 0.01


class Layers(list[np.ndarray]):
    """Stands for an archive."""

    size_bytes = 0


class Echo:
    """A client that gives back what it was given, and takes no time for it."""

    leaf_id, branch_id, run_status, wait_for_run = "leaf", "branch", "start", False
    last_upload: UploadReceipt | None = None

    def __init__(self) -> None:
        self.layers, self.number = Layers(), 0

    def mark(self) -> int:
        return self.number

    def upload(self, arrays: list[np.ndarray], *_: Any, **__: Any) -> str:
        self.layers, self.number = Layers(arrays), self.number + 1
        self.last_upload = UploadReceipt(str(self.number), 0, "")
        return str(self.number)

    def wait_for_aggregation(self, *_: Any, **__: Any) -> str:
        return f"aggregate-{self.number}"

    @contextlib.contextmanager
    def open_aggregation(self, *_: Any, **__: Any) -> Iterator[Layers]:
        yield self.layers

    def send_performance_metrics(self, *_: Any) -> None:
        pass


class Watch(lightning.Callback):
    """Take the time from the start of each epoch to the start of the next, clock and processor."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def epochs(self) -> list[tuple[float, float]]:
        """Give clock and processor seconds of each whole epoch but the first, which warms up."""
        pairs = list(zip(self.marks[1:], self.marks[2:]))
        return [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]


def example() -> Any:
    """Import the example script."""
    spec = importlib.util.spec_from_file_location("lightning_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fit(digits: Any, epochs: int, *, with_callback: bool) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Train for ``epochs`` whole epochs; give their seconds, and the callback's of an epoch: in its hooks, in rounds."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits.load_data(range(10))
    train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=len(test_images))
    watch = Watch()
    callbacks: list[lightning.Callback] = [watch]
    inside = {"hooks": 0.0, "rounds": 0.0, "clock": clock_s()}
    if with_callback:
        leaf = BranchKeyCallback(Echo(), journal=False)  # type: ignore[arg-type]
        _count(leaf, inside)
        callbacks.append(leaf)
    trainer = lightning.Trainer(
        max_epochs=epochs + 2,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(digits.Digits(), train, test)
    if with_callback:
        assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * (epochs + 2)
    return watch.epochs(), {name: spent / (epochs + 2) for name, spent in inside.items()}


def clock_s() -> float:
    """Give what a look at the processor's clock takes, which some systems make dear: a hook must not be charged for it."""
    started = time.process_time()
    for _ in range(1000):
        time.process_time()
    return (time.process_time() - started) / 1000


def _count(leaf: Any, inside: dict[str, float]) -> None:
    """Add up the time in the callback's hooks, but for those at the very start and end, and in halves of rounds."""
    for name in dir(type(leaf)):
        if name.startswith("on_") and name not in ("on_train_start", "on_train_end", "on_exception"):
            hook = getattr(leaf, name)
            if not hook.__func__.__qualname__.startswith("Callback."):
                setattr(leaf, name, _timed(hook, inside, "hooks"))
    halves = "_noted"
    setattr(leaf, halves, _timed(getattr(leaf, halves), inside, "rounds"))


def _timed(function: Any, inside: dict[str, float], kind: str) -> Any:
    @functools.wraps(function)
    def timed(*args: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args)
        finally:
            inside[kind] += time.process_time() - started - inside["clock"]

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the Lightning callback adds to an epoch.")
    parser.add_argument("--repeats", type=int, default=9, help="fits of either kind, in turns")
    parser.add_argument("--epochs", type=int, default=6, help="epochs that count in each fit")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    digits = example()
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    hooks = []
    for number in range(args.repeats + 1):
        # Who is first changes from turn to turn; the first turn warms up and does not count.
        for with_callback in (False, True) if number % 2 else (True, False):
            found, inside = fit(digits, args.epochs, with_callback=with_callback)
            if number:
                seconds[with_callback] += found
                if with_callback:
                    hooks.append(inside)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, lightning {lightning.__version__}, 1 thread",
        "epochs": len(seconds[True]),
    }
    for index, kind in enumerate(("clock", "processor")):
        without, with_callback = (statistics.median(each[index] for each in seconds[key]) for key in (False, True))
        result[kind] = {
            "without_s": round(without, 5),
            "with_s": round(with_callback, 5),
            "added_s": round(with_callback - without, 5),
            "added_percent": round(100 * (with_callback / without - 1), 2),
        }
    base = result["processor"]["without_s"]
    for name, found in (
        ("hooks", [each["hooks"] for each in hooks]),
        ("hooks_outside_the_exchange", [each["hooks"] - each["rounds"] for each in hooks]),
    ):
        median = statistics.median(found)
        result[name] = {"s": round(median, 6), "percent": round(100 * median / base, 2)}
    result["goal_percent"] = 100 * GOAL
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
