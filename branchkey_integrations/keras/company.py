"""Know the callbacks that stand beside this one in ``fit``, and what their order does to an aggregate."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import keras

_BEFORE = "Put it before: callbacks=[{name}(...), BranchKeyCallback(...)]"


def company_of(callback: keras.callbacks.Callback) -> list[Any]:
    """Give the callbacks of the ``fit`` that is calling ``callback`` now, in their order; none when nobody lists them.

    Keras tells a callback nothing of the others. The list is a local variable of the caller, so it is found up the
    stack: first the list that names ``callback``, else the nearest (``callback`` is then wrapped in another one).
    """
    nearest: list[Any] = []
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            listed = list(caller.callbacks)
            if any(other is callback for other in listed):
                return listed
            nearest = nearest or listed
    return nearest


def is_fit_of(model: keras.Model) -> bool:
    """Tell whether ``model.fit`` is what is calling, and not a loop that somebody wrote."""
    return any(frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model for frame in _callers())


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  documented, if underlined
    while frame is not None:
        yield frame
        frame = frame.f_back


def hazards(callback: keras.callbacks.Callback, company: Sequence[Any], optimizer: Any) -> list[str]:
    """Say, a sentence each, what would undo an aggregate or give its score to other weights, and what to do instead."""
    place = next((index for index, other in enumerate(company) if other is callback), None)
    found = []
    for index, other in enumerate(company):
        after = place is not None and index > place
        name = type(other).__name__
        if isinstance(other, keras.callbacks.EarlyStopping) and other.restore_best_weights and after:
            found.append(
                f"{name} stands after BranchKeyCallback, so at the end of fit its best weights replace the last "
                f"aggregate. {_BEFORE.format(name=name)}"
            )
        elif isinstance(other, keras.callbacks.BackupAndRestore) and not after and other is not callback:
            found.append(
                f"{name} stands before BranchKeyCallback, so a kill between the two loses the round of that epoch. "
                f"Put it after: callbacks=[BranchKeyCallback(...), {name}(...)]"
            )
        elif isinstance(other, keras.callbacks.SwapEMAWeights):
            found += _swap_hazards(other, name, after)
    return found + [
        f"ema_overwrite_frequency={inner.ema_overwrite_frequency} of optimizer {inner.name!r} puts averages of the "
        "weights before an aggregate over the aggregate. Leave it at None; use_ema alone is no trouble"
        for inner in _plain(optimizer)
        if getattr(inner, "use_ema", False) and getattr(inner, "ema_overwrite_frequency", None)
    ]


def _swap_hazards(swap: Any, name: str, after: bool) -> list[str]:
    if not swap.swap_on_epoch:
        return [
            f"{name} validates the averages, but the weights that are sent are others, under the score of the averages. "
            f"Pass swap_on_epoch=True, before BranchKeyCallback"
        ]
    if after:
        return [
            f"{name} stands after BranchKeyCallback, so it swaps each aggregate out of the model again. "
            f"{_BEFORE.format(name=name)}"
        ]
    if getattr(swap, "_ema_weights_in_model", False):
        # Its last fit left it swapped; the next epoch would swap the averages back over the last aggregate.
        return [f"{name} was in another fit before and would swap its averages over the aggregate. Make a new one"]
    return []


def _plain(optimizer: Any) -> list[Any]:
    """Give the optimizers inside: a loss scale holds one, a MultiOptimizer several."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return [*(getattr(inner, "optimizers", None) or [inner])]
