"""Make a Keras 3 script a leaf of a BranchKey federation, on TensorFlow, PyTorch or JAX.

model.fit(x, y, epochs=10, callbacks=[BranchKeyCallback(client)])
"""

import os
import re

from branchkey_integrations.errors import MissingDependencyError

_WORKS = "Keras 3.0.5 or newer, with its backend (KERAS_BACKEND: tensorflow, torch or jax)"

try:
    import keras as _keras
except (ImportError, ValueError) as error:  # ValueError: KERAS_BACKEND names something that Keras does not know
    _named = os.environ.get("KERAS_BACKEND")
    raise MissingDependencyError(
        what="branchkey_integrations.keras",
        expected=_WORKS,
        found=f"{error}" + (f", with KERAS_BACKEND={_named}" if _named else ""),
        fix="Install it with: pip install 'branchkey-integrations[keras]', and the backend that KERAS_BACKEND names. "
        "tf_keras and Keras 2 cannot be served",
    ) from error

if tuple(int(part) for part in re.findall(r"\d+", _keras.__version__)[:3]) < (3, 0, 5):
    raise MissingDependencyError(
        what="branchkey_integrations.keras",
        expected=_WORKS,
        found=f"Keras {_keras.__version__}",
        fix="Upgrade with: pip install -U keras; tf_keras and Keras 2 cannot be served",
    )

from branchkey_integrations.keras.callback import BranchKeyCallback  # noqa: E402
from branchkey_integrations.keras.parameters import KerasParameters  # noqa: E402

__all__ = ["BranchKeyCallback", "KerasParameters"]
