"""What a leaf's process counts about itself: time by stage, processor seconds, and memory on top of what it held before."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

#: In the order of a round.
STAGES = ("read", "write", "post", "wait", "get", "check", "load")


class Stages:
    """Add up wall and processor seconds of named stages; of stages within each other the inner one's count for it only."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._inner = [(0.0, 0.0)]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block for ``name``."""
        started, began = time.perf_counter(), time.process_time()
        self._inner.append((0.0, 0.0))
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - started, time.process_time() - began
            inner, before = self._inner.pop(), self.seconds.get(name, (0.0, 0.0))
            self.seconds[name] = before[0] + wall - inner[0], before[1] + cpu - inner[1]
            self._inner[-1] = self._inner[-1][0] + wall, self._inner[-1][1] + cpu

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of ``owner.attribute`` for ``name``."""
        function: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            with self(name):
                return function(*args, **options)

        setattr(owner, attribute, counted)


def status_bytes(field: str) -> int:
    """Read one size of this process from the system (``VmRSS``, ``VmHWM``); 0 where it does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


class Memory:
    """Measure the peak of resident memory between two moments, above what was resident at the first."""

    def __init__(self) -> None:
        gc.collect()
        self._resets = True
        try:
            # Sets the system's high-water mark back to what is resident now.
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        except OSError:
            self._resets = False
        self._before = status_bytes("VmRSS") if self._resets else _most_ever()

    def extra_bytes(self) -> int:
        """Give the peak since then."""
        return max(0, (status_bytes("VmHWM") if self._resets else _most_ever()) - self._before)


def _most_ever() -> int:
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor


def measured(round_: Callable[[], None], stages: Stages) -> dict[str, Any]:
    """Run one round and tell what it took."""
    stages.seconds.clear()
    memory = Memory()
    cpu, wall = time.process_time(), time.perf_counter()
    round_()
    total, busy = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "stages": {name: stages.seconds[name][0] for name in STAGES if name in stages.seconds},
        "stages_cpu": {name: stages.seconds[name][1] for name in STAGES if name in stages.seconds},
        "total_s": total,
        "cpu_s": busy,
        "extra_bytes": memory.extra_bytes(),
    }


def serve(out: Any, commands: dict[str, Callable[..., Any]]) -> None:
    """Do what comes on standard input, a line of JSON each, and answer each on ``out`` with a line."""
    for line in sys.stdin:
        order = json.loads(line)
        answer = commands[order.pop("do")](**order)
        out.write(json.dumps(answer) + "\n")
        out.flush()
