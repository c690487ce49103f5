"""Say how the leaf and Lightning's averaging callbacks share the model's last weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

_log = logging.getLogger("branchkey_integrations.lightning")


def tell_of_averages(callbacks: Sequence[Any], leaf: Any) -> None:
    """Log which weights the model will end with where another callback writes its average into it in ``on_train_end``.

    The later one in the Trainer's list has the last word. A warning where that is not what such a callback is for.
    """
    mine = next(index for index, callback in enumerate(callbacks) if callback is leaf)
    for index, callback in enumerate(callbacks):
        # By name, since the two flavours have unrelated classes, and versions before 2.6 lack the second.
        names = {cls.__name__ for cls in type(callback).__mro__}
        name = type(callback).__name__
        if "StochasticWeightAveraging" in names:
            if index > mine:
                _log.info("Training ends with the average of %s, which is one of aggregates", name)
            else:
                _log.warning(
                    "%s averages the local weights before the aggregate is loaded, and the last aggregate replaces its "
                    "average. Put BranchKeyCallback before %s in the Trainer's callbacks to average aggregates",
                    *(name, name),
                )
        elif "WeightAveraging" in names:
            if index < mine:
                _log.info("Training ends with the last aggregate; checkpoints hold the average of %s", name)
            else:
                _log.warning(
                    "%s puts its own average over the last aggregate when training ends. Put BranchKeyCallback behind %s "
                    "in the Trainer's callbacks to end with the aggregate",
                    *(name, name),
                )


def trains(trainer: Any) -> bool:
    """Tell whether this pass over the data trains; the last one of ``StochasticWeightAveraging`` gathers statistics."""
    return not getattr(trainer.fit_loop, "_skip_backward", False)
