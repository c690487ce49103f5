"""Show rounds where a Lightning user looks: in the Trainer's progress bar, in its loggers, or in plain log lines."""

# ruff: noqa: SLF001  what a running bar is drawn with has no public name
from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from branchkey_integrations.outcome import RoundOutcome

_log = logging.getLogger("branchkey_integrations.lightning")

#: What ``branchkey/status`` is in a logger, which takes numbers only.
STATUS_CODES = {"applied": 0, "pending": 1, "skipped": 2, "timeout": 3, "rejected": 4, "stopped": 5}

_TICK_S = 1.0
_LINE_EVERY_S = 30.0

_Paint = Callable[[Mapping[str, Any]], None]


class Shown:
    """Show the rounds of one callback. Holds nothing but what it was given.

    The progress bar gets one field, ``bk``, since a terminal has 80 columns: the round's number and how it stands, as in
    ``3 sent``, ``3 waiting 12s``, ``3 applied 0.5s`` (the seconds that the leaf waited).

    Args:
        name: tells several callbacks apart; None if there is one.
        progress: True, False, or None: as it fits the place where the script runs.
    """

    def __init__(self, name: str | None, progress: bool | None) -> None:
        self.prefix = "branchkey" if name is None else f"branchkey/{name}"
        self._field = "bk" if name is None else f"bk_{name}"
        self._progress = progress

    @contextmanager
    def waiting(self, trainer: Any, module: Any, number: int) -> Iterator[None]:
        """Show that the leaf waits for the aggregate of round ``number`` while the block runs, second by second."""
        if not trainer.is_global_zero or self._progress is False:
            yield
            return
        paint = self._painter(trainer, module, number)
        if paint is None and not _log.isEnabledFor(logging.INFO):
            # A thread that nobody sees anything of would cost more than all else that an epoch does here.
            yield
            return
        over = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(number, paint, over), name="branchkey-progress", daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()

    def _tick(self, number: int, paint: Callable[[str], None] | None, over: threading.Event) -> None:
        started = time.monotonic()
        told = 0.0
        while not over.wait(_TICK_S):
            waited = time.monotonic() - started
            if paint is not None:
                paint(f"{number} waiting {waited:.0f}s")
            elif waited - told >= _LINE_EVERY_S:
                told = waited
                _log.info("%s: round %d waits for its aggregate since %.0f s", self.prefix, number, waited)

    def _painter(self, trainer: Any, module: Any, number: int) -> Callable[[str], None] | None:
        """Give a function that shows a text in our field of a bar on a terminal; None: there is no such bar."""
        bar = self._bar(trainer)
        paint = _paint(bar) if self._progress or _on_terminal() else None
        self._set(trainer, f"{number} waiting")
        if paint is None:
            return None
        # Asked for here, since the metrics of a step may have to be gathered from all ranks, and never by another thread.
        metrics = dict(bar.get_metrics(trainer, module))
        paint(metrics)

        def show(text: str) -> None:
            # Who took the field out of the bar's metrics does not want to see it.
            if self._field in metrics:
                paint({**metrics, self._field: text})

        return show

    def sent(self, trainer: Any, outcome: RoundOutcome) -> None:
        """Show that an update is under way."""
        if self._progress is not False:
            self._set(trainer, f"{outcome.round} sent")

    def outcome(self, trainer: Any, module: Any, outcome: RoundOutcome, epoch: int) -> None:
        """Show how a round ended, of what ``epoch`` trained. Every rank calls it; loggers and bars know who writes."""
        line = (
            f"{self.prefix}: round {outcome.round} {outcome.status}, {outcome.uploaded_bytes / 1e6:.3g} MB sent, "
            f"{outcome.waited_s:.1f} s waited"
        )
        if trainer.is_global_zero:
            _log.info(line)
        if self._progress is False:
            return
        self.figures(
            trainer,
            {
                "round": float(outcome.round),
                "wait_s": outcome.waited_s,
                "uploaded_mb": outcome.uploaded_bytes / 1e6,
                "status": float(STATUS_CODES[outcome.status]),
            },
            epoch,
        )
        waited = "" if outcome.status == "pending" else f" {_brief(outcome.waited_s)}"
        self._set(trainer, f"{outcome.round} {outcome.status}{waited}")
        bar = self._bar(trainer)
        if bar is None or not trainer.is_global_zero:
            return
        paint = _paint(bar) if self._progress or _on_terminal() else None
        if paint is not None:
            paint(bar.get_metrics(trainer, module))
        if self._progress and not _on_terminal():
            bar.print(line)

    def figures(self, trainer: Any, figures: Mapping[str, float], epoch: int) -> None:
        """Write figures to the loggers, under the step and with the ``epoch`` of Lightning's own row for that epoch."""
        named = {"epoch": epoch, **{f"{self.prefix}/{name}": value for name, value in figures.items()}}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _set(self, trainer: Any, text: str) -> None:
        if self._bar(trainer) is not None:
            trainer.progress_bar_metrics[self._field] = text

    def _bar(self, trainer: Any) -> Any:
        return None if self._progress is False else trainer.progress_bar_callback


def _on_terminal() -> bool:
    # Bars write to standard output; a notebook is no terminal, but redraws its bars all the same. What Rich puts in the place
    # of standard output while it draws a bar denies being a terminal before Rich 14.1.
    out = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return out.isatty() or "ipykernel" in sys.modules


def _brief(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"


def tell_stopped(trainer: Any) -> None:
    """Say that training ends because the run was stopped, and when, if the Trainer has been told to go on for a while."""
    goes_on = [
        f"{name}={least}"
        for name, least, done in (
            ("min_epochs", trainer.min_epochs, trainer.current_epoch + 1),
            ("min_steps", trainer.min_steps, trainer.global_step),
        )
        if least and done < least
    ]
    if goes_on:
        _log.warning(
            "The run was stopped: training goes on alone, as %s asks for, and ends then", " and ".join(goes_on)
        )
    else:
        _log.warning("The run was stopped: training ends")


def _paint(bar: Any) -> _Paint | None:
    """Give what draws metrics into a running bar of training; None for bars that can only draw themselves."""
    if bar is None or not getattr(bar, "is_enabled", False):
        return None
    # By name, since the two flavours have unrelated classes.
    names = {cls.__name__ for cls in type(bar).__mro__}
    if "TQDMProgressBar" in names:
        line = bar._train_progress_bar
        return None if line is None or line.disable else line.set_postfix
    if "RichProgressBar" in names and bar._metric_component is not None:

        def paint(metrics: Mapping[str, Any]) -> None:
            bar._metric_component.update(dict(metrics))
            bar.refresh()

        return paint
    return None
