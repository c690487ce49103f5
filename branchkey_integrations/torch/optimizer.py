"""Clear an optimizer's moments after an aggregate has replaced the weights they were gathered for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from branchkey_integrations.errors import ConfigurationError

_log = logging.getLogger("branchkey_integrations.torch")

#: Kept although they may have the parameter's shape: step counts, ``Rprop``'s step sizes (its learning rates), ``ASGD``'s
#: average of the parameters, and ``NAdam``'s running product and ``ASGD``'s rates, which are 0-d as a 0-d parameter is.
_NO_MOMENTS = frozenset({"step", "step_size", "ax", "mu_product", "eta", "mu"})
#: ``Adafactor`` keeps the second moment of a matrix as a row and a column.
_FACTORED_MOMENTS = frozenset({"row_var", "col_var"})


def check_optimizers(optimizer: object, tensors: Iterable[Tensor]) -> tuple[torch.optim.Optimizer, ...]:
    """Return those of the optimizers that hold moments for ``tensors``.

    With a selection of parameters some of several optimizers may hold none of them; those are left alone.

    Args:
        optimizer: one optimizer or several.
        tensors: the federated parameters.

    Raises:
        ConfigurationError: none given, no optimizer, none that holds a federated parameter, or LBFGS (it keeps one
            history for all parameters).
    """
    several = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    problem = ConfigurationError(
        what="optimizer", expected="the optimizer that trains the model", fix="Pass optimizer=optimizer to the hook"
    )
    for one in several or (None,):
        if not isinstance(one, torch.optim.Optimizer):
            problem.found = type(one).__name__ if one is not None else 'none, with optimizer_state="reset"'
            raise problem
    known = {id(tensor) for tensor in tensors}
    concerned = tuple(
        one
        for one in several
        if any(id(parameter) in known for group in one.param_groups for parameter in group["params"])
    )
    if not concerned:
        names = ", ".join(type(one).__name__ for one in several)
        problem.found = f"{names} that {'holds' if len(several) == 1 else 'hold'} none of the federated parameters"
        problem.fix = "Build the optimizer from this model's parameters, and the hook after it"
        raise problem
    if any(isinstance(one, torch.optim.LBFGS) for one in concerned):
        problem.found = "LBFGS, which keeps one history for all parameters"
        problem.fix = 'Use optimizer_state="keep" with it'
        raise problem
    return concerned


def reset_moments(optimizers: Sequence[torch.optim.Optimizer], tensors: Iterable[Tensor]) -> int:
    """Set the moments kept for ``tensors`` to what they were at the start, in place; return how many were.

    Every floating-point state of the parameter's shape counts as a moment (``exp_avg``, ``exp_avg_sq``,
    ``max_exp_avg_sq``, ``momentum_buffer``, ``square_avg``…). Step counts, learning rates and step sizes stay.
    """
    wanted = {id(tensor) for tensor in tensors}
    cleared = 0
    for optimizer in optimizers:
        kept_apart = 0
        before = cleared
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in wanted:
                    continue
                for key, value in optimizer.state.get(parameter, {}).items():
                    if _is_moment(key, value, parameter):
                        start = group.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0
                        with torch.no_grad():
                            value.fill_(start)
                        cleared += 1
                    elif isinstance(value, Tensor) and value.dim() > 0 and key not in _NO_MOMENTS:
                        kept_apart += 1
        if kept_apart and cleared == before:
            _log.warning(
                "%s keeps its state in a form that is not known here; optimizer_state='reset' cleared nothing",
                type(optimizer).__name__,
            )
    return cleared


def _is_moment(key: Any, value: object, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and key not in _NO_MOMENTS
        and (value.shape == parameter.shape or key in _FACTORED_MOMENTS)
    )
