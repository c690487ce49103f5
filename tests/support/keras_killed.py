"""A Keras leaf that goes on from its last backup, in a process that a test may kill at any moment."""

from __future__ import annotations

import warnings
from pathlib import Path

import keras
import numpy as np

from branchkey_integrations import Client, RetryPolicy
from branchkey_integrations.keras import BranchKeyCallback


def train(leaf: int, credentials: dict[str, str], url: str, folder: str, epochs: int) -> None:
    """Train to the end, from the backup if there is one, and leave the weights in ``weights.npz``."""
    warnings.simplefilter("ignore")
    root = Path(folder)
    root.mkdir(exist_ok=True)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, "tanh"), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    made = np.random.default_rng(leaf)
    count = 20 + 4 * leaf
    x, y = made.normal(size=(count, 5)).astype("f4"), made.normal(size=(count, 2)).astype("f4")
    with Client(credentials, url, retry=RetryPolicy(backoff_s=0.05), output_dir=root / "out") as client:
        # Keras writes its backup in place; a kill in the middle of that needs the one before.
        backup = keras.callbacks.BackupAndRestore(root / "backup", double_checkpoint=True)
        callbacks = [BranchKeyCallback(client, timeout_s=60), backup]
        model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    np.savez(root / "weights.npz", *[keras.ops.convert_to_numpy(weight) for weight in model.weights])
