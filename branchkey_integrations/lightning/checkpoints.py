"""Keep the promise of a ``ModelCheckpoint``'s file name: the weights in the file are those that had the score."""

# ruff: noqa: SLF001  a ModelCheckpoint tells in private attributes only when it saves, and how
from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning.scores import Scores
from branchkey_integrations.lightning.strategies import parameters_at_rest

_log = logging.getLogger("branchkey_integrations.lightning")

#: Where a ModelCheckpoint saves.
_SAVING = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_exception")


def journal_folder(trainer: Any) -> str | None:
    """Say where rounds are noted: beside the checkpoints, if the script makes any on a disk; ask before Lightning's setup.

    Without a folder of the user's choice Lightning makes one a run, which a resumed run would not look into.
    """
    if not trainer.checkpoint_callbacks:
        return None
    chosen = [
        str(folder) for folder in (getattr(each, "dirpath", None) for each in trainer.checkpoint_callbacks) if folder
    ]
    place = os.path.dirname(os.path.abspath(chosen[0])) if chosen else str(trainer.default_root_dir)
    place = place if "://" in place else os.path.abspath(place)
    return None if "://" in (chosen or [place])[0] else os.path.join(place, "branchkey")


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a hook that has nothing true to save; a function of a module, so that a callback with it pickles."""


class Checkpoints:
    """Let the Trainer's checkpoint callbacks save where what they monitor is of the weights that they would save.

    Lightning keeps a metric until it is logged again. Between two validations the weights move on, and with a federation
    they leap: a file saved then would hold other weights than those that had the score. Such a save is put off until the
    next validation. Callbacks that monitor an aggregate's score save when an aggregate has been scored, and at no other time.

    Args:
        aggregate: how names of metrics of an aggregate begin.
    """

    def __init__(self, aggregate: str) -> None:
        self._aggregate = aggregate
        self._local: list[Any] = []
        self._others: list[Any] = []
        self._due: list[Any] = []
        self._told = False

    def watch(self, trainer: Any, *, evaluates: bool) -> None:
        """Find the callbacks to be watched; call it when training starts.

        Raises:
            ConfigurationError: one monitors an aggregate's score, which nobody will find, or at times at which there is none.
        """
        self.release()
        averages = any("WeightAveraging" in _names(callback) for callback in trainer.callbacks)
        monitors = [each for each in trainer.callbacks if "ModelCheckpoint" in _names(each) and each.monitor]
        # With a moving average both the validated weights and those in the file are the average's.
        self._local = [] if averages else [each for each in monitors if not each.monitor.startswith("branchkey/")]
        others = [each for each in monitors if each.monitor.startswith(self._aggregate)]
        for each in others:
            _require_possible(each, evaluates=evaluates, averages=averages)
        self._others = others
        for each in others:
            for hook in _SAVING:
                setattr(each, hook, _nothing)

    @property
    def watches(self) -> bool:
        """Whether there is a callback whose saves may have to be put off."""
        return bool(self._local)

    def before_save(self, trainer: Any, module: Any, hook: str, scores: Scores) -> None:
        """Put off the saves of ``hook`` that would tell an untruth; call it in that hook, which comes before theirs."""
        for each in self._local:
            _give_back(each, hook)
            by_time = hook == "on_train_batch_end" and each._train_time_interval is not None
            if by_time and not _time_is_up(each, trainer):
                # Its own clock may say otherwise a moment later.
                setattr(each, hook, _nothing)
                continue
            if not by_time and not _saves(each, trainer, hook):
                continue
            score = trainer.callback_metrics.get(each.monitor)
            if score is not None:
                held = parameters_at_rest(trainer.strategy, module)
                moved = bool(scores.of_other_weights(held, {each.monitor: score}))
                # All ranks save together or not at all, and a rank's share of the weights may be one that has not moved.
                if not trainer.strategy.reduce_boolean_decision(moved, all=False):
                    continue
            if each not in self._due:
                self._due.append(each)
            if score is None:
                # Lightning knows what to do where there is none yet; or the module logs it in this very hook, after us.
                continue
            setattr(each, hook, _nothing)
            if by_time:
                each._last_time_checked = time.monotonic()
            if not self._told:
                self._told = True
                _log.warning(
                    "ModelCheckpoint(monitor=%r) saves after the next validation instead of now: the weights are no more "
                    "those that had the score which is known",
                    each.monitor,
                )

    def after_validation(self, trainer: Any, scores: Scores) -> None:
        """Save what was put off; the weights are those that were just scored."""
        due, self._due = self._due, []
        for each in due:
            _give_back(each, "on_train_batch_end")
            if scores.knows(each.monitor) and each._last_global_step_saved != trainer.global_step:
                candidates = each._monitor_candidates(trainer)
                each._save_topk_checkpoint(trainer, candidates)
                each._save_last_checkpoint(trainer, candidates)

    def save_aggregate(self, trainer: Any, module: Any) -> None:
        """Let those that monitor an aggregate's score save the model, which holds the aggregate."""
        with _between_epochs(trainer):
            for each in self._others:
                # One of the two saves, depending on when the callback would if it were left alone.
                type(each).on_validation_end(each, trainer, module)
                type(each).on_train_epoch_end(each, trainer, module)

    def release(self) -> None:
        """Give the watched callbacks their hooks back."""
        for each in self._local + self._others:
            for hook in _SAVING:
                _give_back(each, hook)
        self._local, self._others, self._due = [], [], []


@contextmanager
def _between_epochs(trainer: Any) -> Iterator[None]:
    """Let the loops' state be that of the end of the last epoch.

    A fit that goes on from a file made in ``on_train_epoch_start`` takes the last epoch's batches for the new one's, and the
    new epoch ends before it has begun (measured with 2.6).
    """
    progress = trainer.fit_loop.epoch_progress
    begun = [part for part in (progress.total, progress.current) if part.ready > part.completed]
    for part in begun:
        part.ready -= 1
    try:
        yield
    finally:
        for part in begun:
            part.ready += 1


def _give_back(checkpoint: Any, hook: str) -> None:
    if vars(checkpoint).get(hook) is _nothing:
        delattr(checkpoint, hook)


def _names(callback: Any) -> set[str]:
    # By name, since the two flavours have unrelated classes.
    return {cls.__name__ for cls in type(callback).__mro__}


def _saves(checkpoint: Any, trainer: Any, hook: str) -> bool:
    """Tell whether ``checkpoint`` would save in ``hook``, as far as its periods go."""
    if hook == "on_train_batch_end":
        steps = checkpoint._every_n_train_steps
        return (
            bool(steps)
            and trainer.global_step % steps == 0
            and checkpoint._last_global_step_saved != trainer.global_step
        )
    epochs = checkpoint._every_n_epochs
    return (
        bool(epochs)
        and (trainer.current_epoch + 1) % epochs == 0
        and checkpoint._should_save_on_train_epoch_end(trainer)
    )


def _time_is_up(checkpoint: Any, trainer: Any) -> bool:
    """Tell whether ``checkpoint`` is to save now by its ``train_time_interval``; collective, since clocks differ."""
    before = checkpoint._last_time_checked
    interval_s = checkpoint._train_time_interval.total_seconds()
    up = before is not None and time.monotonic() - before >= interval_s
    return bool(trainer.strategy.broadcast(up)) and checkpoint._last_global_step_saved != trainer.global_step


def _require_possible(checkpoint: Any, *, evaluates: bool, averages: bool) -> None:
    wrong: Sequence[str] = ()
    if not evaluates:
        wrong = ("evaluate_aggregate=True in BranchKeyCallback", "False", "Pass evaluate_aggregate=True")
    elif not checkpoint.every_n_epochs:
        wrong = (
            "every_n_epochs",
            "every_n_train_steps or train_time_interval",
            "Aggregates come with epochs: count those",
        )
    elif averages:
        wrong = (
            "no callback that puts an average into checkpoints",
            "WeightAveraging",
            "Take one of the two callbacks out",
        )
    if wrong:
        raise ConfigurationError(
            what=f"ModelCheckpoint(monitor={checkpoint.monitor!r})", expected=wrong[0], found=wrong[1], fix=wrong[2]
        )
