"""Make a Keras 3 script a leaf of a BranchKey federation, on TensorFlow, PyTorch or JAX.

model.fit(x, y, epochs=10, callbacks=[BranchKeyCallback(client)])
"""

from branchkey_integrations.errors import MissingDependencyError

_WORKS = "Keras 3.0.5 or newer, with its backend (KERAS_BACKEND: tensorflow, torch or jax)"

try:
    import keras as _keras
except ImportError as error:
    raise MissingDependencyError(
        what="branchkey_integrations.keras",
        expected=_WORKS,
        found=str(error),
        fix="Install it with: pip install 'branchkey-integrations[keras]', and the backend that KERAS_BACKEND names",
    ) from error

if int(_keras.__version__.split(".")[0]) < 3:
    raise MissingDependencyError(
        what="branchkey_integrations.keras",
        expected=_WORKS,
        found=f"Keras {_keras.__version__}",
        fix="Upgrade with: pip install -U keras; tf_keras and Keras 2 cannot be served",
    )

from branchkey_integrations.keras.callback import BranchKeyCallback  # noqa: E402
from branchkey_integrations.keras.parameters import KerasParameters  # noqa: E402

__all__ = ["BranchKeyCallback", "KerasParameters"]
