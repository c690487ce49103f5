"""Answer each update of a Keras fit with an aggregate of the test's choice, and note what every copy of a weight held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

Copies = Callable[[Any], list[np.ndarray]]


def awkward(model, seed):
    """Aggregates whose values use all bits of float32: nothing that is averaged or converted on the way survives."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=tuple(weight.shape)).astype("f4") / np.float32(3) for weight in model.trainable_weights]


def bits(values):
    """Make nested arrays comparable bit for bit, NaN included."""
    return [[(copy.dtype.str, copy.shape, copy.tobytes()) for copy in copies] for copies in values]


class Watch(keras.callbacks.Callback):
    """Stand behind BranchKeyCallback, in a branch that answers nothing by itself.

    Args:
        branch: the sandbox.
        answers: one aggregate an epoch.
        copies: gives what each replica, shard or device holds of a variable.
    """

    def __init__(self, branch, answers, copies: Copies) -> None:
        super().__init__()
        self.branch, self.answers, self.copies = branch, answers, copies
        #: Per round: weights when they were sent, the rest then, weights after the load, the rest then.
        self.sent, self.rest_before, self.loaded, self.rest_after = [], [], [], []
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self.sent.append(self._weights())
        self.rest_before.append(self._rest())
        self.branch.publish(self.answers[epoch])

    def on_epoch_begin(self, epoch, logs=None):
        if epoch:
            self._note_load()

    def on_train_end(self, logs=None):
        self._note_load()

    def _note_load(self):
        self.loaded.append(self._weights())
        self.rest_after.append(self._rest())

    def _weights(self):
        return [self.copies(weight) for weight in self.model.trainable_weights]

    def _rest(self):
        mine = {id(weight) for weight in self.model.trainable_weights}
        rest = [*self.model.variables, *self.model.optimizer.variables]
        return [self.copies(variable) for variable in rest if id(variable) not in mine]
