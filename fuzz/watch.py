"""Run a parser on one input after the other, and keep what the report needs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from branchkey_integrations.errors import BranchKeyError
from fuzz.targets import Target

#: An input that takes longer counts as a hang, seconds.
HANG_S = 1.0
#: Peak memory above what was there before the first input, bytes.
MEMORY_BYTES = 64 << 20
_MOST_FINDINGS = 10


def peak_bytes() -> int:
    """Give the most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Report:
    """What was found; all of it is plain types."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    hangs: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Tell whether nothing was found."""
        return not self.crashes and not self.hangs and self.memory_bytes <= MEMORY_BYTES

    def lines(self) -> list[str]:
        """Word it for people."""
        refused = ", ".join(f"{count} {name}" for name, count in self.refused.most_common(4))
        return [
            f"{self.target} ({self.engine}): {self.inputs} inputs in {self.seconds:.0f} s "
            f"({self.inputs / max(self.seconds, 1e-9):.0f}/s), {self.accepted} accepted, refused: {refused or 'none'}",
            f"  crashes {self.crashes}, hangs over {HANG_S:g} s {self.hangs}, slowest {self.slowest_s * 1000:.1f} ms, "
            f"memory {self.memory_bytes / (1 << 20):.1f} MiB over what was there before",
            *(f"  {finding}" for finding in self.findings),
        ]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Report:
        """Make a report of what :meth:`to_plain` gave."""
        return cls(**{**plain, "refused": Counter(plain["refused"])})

    def to_plain(self) -> dict[str, Any]:
        """Give what JSON can hold."""
        return {**self.__dict__, "refused": dict(self.refused)}


class Watch:
    """Give inputs to a parser and watch it.

    Args:
        target: the parser.
        engine: name of what makes the inputs, for the report.
        keep: folder for inputs that crashed it or hung it; None keeps none.
    """

    def __init__(self, target: Target, engine: str, keep: str | None) -> None:
        self._target = target
        self._keep = keep
        self.report = Report(target.name, engine)
        self._began = time.monotonic()
        self._before = peak_bytes()

    def __call__(self, data: bytes) -> None:
        """Try one input."""
        report = self.report
        report.inputs += 1
        began = time.monotonic()
        try:
            self._target.run(data)
            report.accepted += 1
        except BranchKeyError as error:
            report.refused[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            report.crashes += 1
            self._found(data, f"{type(error).__name__}: {error}"[:200], traceback.format_exc())
        took = time.monotonic() - began
        if took > HANG_S:
            # It may have waited for the processor: what hangs does so again.
            took = min(took, self._again(data))
        report.slowest_s = max(report.slowest_s, took)
        if took > HANG_S:
            report.hangs += 1
            self._found(data, f"took {took:.1f} s", "")

    def _again(self, data: bytes) -> float:
        began = time.monotonic()
        with contextlib.suppress(Exception):
            self._target.run(data)
        return time.monotonic() - began

    def finish(self) -> Report:
        """End the watch."""
        self.report.seconds = time.monotonic() - self._began
        self.report.memory_bytes = max(0, peak_bytes() - self._before)
        return self.report

    def _found(self, data: bytes, what: str, trace: str) -> None:
        if len(self.report.findings) >= _MOST_FINDINGS:
            return
        name = f"{self._target.name}-{hashlib.sha256(data).hexdigest()[:16]}"
        self.report.findings.append(f"{name}: {what}")
        if self._keep is not None:
            os.makedirs(self._keep, exist_ok=True)
            for suffix, content in (("", data), (".txt", trace.encode())):
                with open(os.path.join(self._keep, name + suffix), "wb") as file:
                    file.write(content)
