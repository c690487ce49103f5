"""Run the cases: interleaved rounds against one server, everything that was moved compared bit for bit afterwards."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import aggregates, environments, models, processes
from benchmarks.plan import LINKS, OFFICIAL, Case, Contender

#: Models up to this size make all their rounds in one process; a larger one gets a fresh process a round.
_SMALL_BYTES = 64 * 1024 * 1024


@dataclass
class Result:
    """What one contender took in one case: a dictionary a round (see ``measure.measured``)."""

    case: Case
    contender: Contender
    label: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0

    def median(self, key: str) -> float:
        """Give the median of a figure, or of a stage."""
        return statistics.median(each.get(key, each["stages"].get(key, 0.0)) for each in self.rounds)

    @property
    def extra_bytes(self) -> int:
        """Give the peak of extra memory in a fresh process."""
        return int(max(each["extra_bytes"] for each in self.rounds if each["fresh"]))

    @property
    def link_s(self) -> float:
        """Give the time that the bytes of both directions need on the case's link, by themselves."""
        rate = LINKS[self.case.link]
        return (self.uploaded_bytes + self.downloaded_bytes) * 8 / rate if rate else 0.0


class Runner:
    """Hold the server, the environments and the files of a run.

    Args:
        folder: for everything that is written.
        tell: called with a line now and then.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._pythons: dict[str, tuple[Path, str]] = {}
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()
        self._validator: tuple[str, processes.Lines] | None = None
        self._server = self._stack.enter_context(processes.Server(folder / "sink"))
        warm = folder / "warm.npz"
        aggregates.write(warm, "lenet", "float32", stored=False)
        self._server.set(objects={"warm": str(warm)})
        self.not_run: list[str] = []
        self.verified: list[str] = []

    def close(self) -> None:
        """End the server and what else runs."""
        self._stack.close()

    def run(self, case: Case) -> list[Result]:
        """Measure a case."""
        self._tell(f"{case.name}: {case.rounds} x {', '.join(each.label for each in case.contenders)}")
        answer = self._folder / f"answer-{case.model.replace(':', '-')}-{case.dtype}-{case.answer}.npz"
        if not answer.exists():
            for old in self._folder.glob("answer-*"):
                old.unlink()
            aggregates.write(answer, case.model, case.dtype, stored=case.answer == "stored")
        self._server.set(objects={case.answer: str(answer)}, rate=0, keep="")
        results = []
        for contender in case.contenders:
            try:
                results.append(Result(case, contender, self._label(contender), [], 0, answer.stat().st_size))
            except environments.Unavailable as error:
                note = f"{contender.label}: not run, {error}"
                if note not in self.not_run:
                    self.not_run.append(note)
        expected = models.fingerprint(models.aggregate(case.model, case.dtype))
        small = models.parameters_in(case.model) * 4 <= _SMALL_BYTES
        with contextlib.ExitStack() as stack:
            kept = {each.label: stack.enter_context(self._leaf(each)) for each in results} if small else {}
            for number in range(case.rounds):
                for result in results:
                    if result.contender.series == "2.7" and number and not small:
                        continue
                    with contextlib.ExitStack() as single:
                        leaf = kept.get(result.label) or single.enter_context(self._leaf(result))
                        self._round(result, leaf, fresh=not small or number == 0)
                        if leaf.ask(do="fingerprint") != expected:
                            raise RuntimeError(f"{case.name}: {result.label} did not load what was sent")
        return results

    def _round(self, result: Result, leaf: processes.Lines, fresh: bool) -> None:
        self._server.set(rate=LINKS[result.case.link])
        took = leaf.ask(do="round", aggregate=f"{result.case.answer}-{next(self._numbers)}")
        result.uploaded_bytes = self._server.set(rate=0)["uploaded"][-1]
        result.rounds.append({**took, "fresh": fresh})

    def verify(self, model: str, dtype: str, contender: Contender, official: bool) -> None:
        """Send an update with ``contender`` and read it back: numpy bit for bit, and the official client's validator.

        Raises:
            RuntimeError: they do not agree.
        """
        case = Case(model, dtype, contenders=(contender,))
        kept = self._folder / "kept.bin"
        path = self._folder / "update.npz"
        result = Result(case, contender, contender.label)
        with self._leaf(result) as leaf:
            self._server.set(keep=str(kept), rate=0)
            leaf.ask(do="round", aggregate=self._any(model, dtype))
            self._server.set(keep="")
        unwrap(kept, path)
        with np.load(path, allow_pickle=False) as npz:
            if npz["weighting"].tolist() != [100.0] or npz["weighting"].dtype != np.float64:
                raise RuntimeError("the weighting did not come through")
            for index, wanted in enumerate(models.local(model, dtype)):
                found = npz[f"layer_{index}"]
                same = found.dtype == wanted.dtype and found.shape == wanted.shape
                if not same or found.tobytes() != wanted.tobytes():
                    raise RuntimeError(f"layer_{index} of {model} {dtype} did not come through")
        said = "numpy.load"
        if official:
            label, validator = self._official_validator()
            if validator.ask(do="validate", path=str(path)) is not True:
                raise RuntimeError("the official validator refused an archive")
            said += f" and the validator of the {label} client"
        path.unlink()
        kept.unlink()
        self.verified.append(f"{model} {dtype}, {contender.label}: {said}")

    def _official_validator(self) -> tuple[str, processes.Lines]:
        if self._validator is None:
            label = self._label(OFFICIAL)
            python, _ = self._pythons[OFFICIAL.series]
            leaf = processes.leaf("official", python, self._task("lenet", "float32"), self._folder / "validator")
            self._validator = label, self._stack.enter_context(leaf)
        return self._validator

    def _any(self, model: str, dtype: str) -> str:
        path = self._folder / f"answer-{model.replace(':', '-')}-{dtype}-deflate.npz"
        if not path.exists():
            aggregates.write(path, model, dtype, stored=False)
        self._server.set(objects={"deflate": str(path)})
        return f"deflate-{next(self._numbers)}"

    def _label(self, contender: Contender) -> str:
        if contender.kind == "ours":
            return contender.label
        if contender.series not in self._pythons:
            self._pythons[contender.series] = environments.official(contender.series)
        return f"official {self._pythons[contender.series][1]}"

    def _task(self, model: str, dtype: str) -> dict[str, Any]:
        warm = f"warm-{next(self._numbers)}"
        return {"host": self._server.url, "model": model, "dtype": dtype, "warm": warm}

    def _leaf(self, result: Result) -> contextlib.AbstractContextManager[processes.Lines]:
        contender = result.contender
        python = self._pythons[contender.series][0] if contender.kind == "official" else Path(sys.executable)
        task = {**self._task(result.case.model, result.case.dtype), "compression": contender.compression}
        return processes.leaf(contender.kind, python, task, self._folder / f"leaf-{next(self._numbers)}")


def unwrap(kept: Path, path: Path) -> None:
    """Cut the archive out of a multipart body that was kept."""
    with open(kept, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        boundary = body[: body.find(b"\r\n")]
        second = body.find(b"\r\n" + boundary + b"\r\n")
        start = body.find(b"\r\n\r\n", second) + 4
        end = body.rfind(b"\r\n" + boundary + b"--")
        with open(path, "wb") as target:
            for at in range(start, end, 1 << 24):
                target.write(body[at : min(at + (1 << 24), end)])
