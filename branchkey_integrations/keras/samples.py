"""Count the samples that an epoch of ``fit`` really saw, from what Keras itself counted."""

from __future__ import annotations

import math
from typing import Any

import keras

from branchkey_integrations.errors import ConfigurationError

_FIX = "Pass weighting=<a number>, for example the number of samples of an epoch, or weighting=f(metrics)"


def check_countable(model: keras.Model, *, inside_fit: bool = True) -> None:
    """Demand that Keras counts the samples of ``model``: its own train step weighs the loss by each batch's length.

    That count is made inside the (compiled) step, so it is right for every kind of data, for a partial last batch and
    for ``steps_per_execution``. A callback that evaluates in the middle of an epoch makes Keras forget the count so far,
    and the loss so far with it.

    Args:
        model: a compiled model.
        inside_fit: whether ``fit`` trains it; ``train_on_batch`` forgets the count with each batch.

    Raises:
        ConfigurationError: the count cannot be trusted; says what to do instead.
    """
    step = getattr(model.train_step, "__func__", model.train_step)
    tracker: Any = getattr(model, "_loss_tracker", None)
    version = tuple(int(part) for part in keras.__version__.split(".")[:2])
    found = None
    if not inside_fit:
        found = "a loop that is not fit()"
    elif not str(getattr(step, "__module__", "")).startswith("keras."):
        found = f"{type(model).__name__} with a train_step of its own"
    elif version < (3, 3):
        found = f"Keras {keras.__version__}, which counts batches"
    elif not hasattr(tracker, "count"):
        found = "a model that keeps no mean loss"
    elif keras.backend.standardize_dtype(tracker.count.dtype) not in ("float32", "float64"):
        found = f"a count kept in {keras.backend.standardize_dtype(tracker.count.dtype)}, which cannot count far"
    if found is not None:
        raise ConfigurationError(
            what='weighting="samples"', expected="a model whose samples Keras counts", found=found, fix=_FIX
        )


def counted(model: keras.Model, loss: Any = None) -> int:
    """Give the number of samples since the metrics were reset.

    Exact up to 2^24 samples (float32); beyond, right to seven digits.

    Args:
        model: a model for which :func:`check_countable` holds.
        loss: the epoch's loss as Keras reports it; if given, the count must belong to it.

    Raises:
        ConfigurationError: the metrics are no longer those of the training epoch.
    """
    tracker = model._loss_tracker  # noqa: SLF001  the only place where Keras keeps the count
    if loss is not None:
        now = float(keras.ops.convert_to_numpy(tracker.result()))
        if not (math.isclose(now, float(loss), rel_tol=1e-5, abs_tol=1e-12) or now != now):
            raise ConfigurationError(
                what='weighting="samples"',
                expected="the metrics of the training epoch",
                found="other metrics: something evaluated the model before this callback",
                fix="Put BranchKeyCallback before callbacks that evaluate, or pass weighting=<a number>",
            )
    return round(float(keras.ops.convert_to_numpy(tracker.count)))
