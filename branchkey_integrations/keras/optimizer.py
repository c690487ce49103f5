"""Clear the moments of a Keras optimizer, and nothing else of it."""

from __future__ import annotations

from typing import Any

import keras

from branchkey_integrations.errors import ConfigurationError

#: Where each optimizer keeps moments that start at zero. Others keep state that zero would break (Adagrad, Nadam).
_MOMENTS = {
    "SGD": ("momentums",),
    "Adam": ("_momentums", "_velocities", "_velocity_hats"),
    "AdamW": ("_momentums", "_velocities", "_velocity_hats"),
    "RMSprop": ("_velocities", "_momentums", "_average_gradients"),
    "Lion": ("_momentums",),
}


def moments(optimizer: Any) -> list[Any]:
    """Give the variables that hold moments; step count, learning rate and weight averages are none.

    Raises:
        ConfigurationError: it is not known which variables of this optimizer are moments.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # a loss scale around it has no moments
    names = _MOMENTS.get(type(inner).__name__)
    if names is None or not type(inner).__module__.startswith("keras.") or not isinstance(inner, keras.Optimizer):
        raise ConfigurationError(
            what='optimizer_state="reset"',
            expected=f"one of keras.optimizers: {', '.join(_MOMENTS)}",
            found=type(inner).__name__,
            fix='Leave optimizer_state="keep"',
        )
    return [variable for name in names for variable in getattr(inner, name, None) or [] if variable is not None]


def reset_moments(optimizer: Any) -> None:
    """Set every moment to zero."""
    for variable in moments(optimizer):
        variable.assign(keras.ops.zeros_like(variable.value))
