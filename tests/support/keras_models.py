"""Small Keras models, data for them, and views of everything they hold."""

from __future__ import annotations

import keras
import numpy as np

#: For tests to which it does not matter how a step is run: TensorFlow would trace for longer than such a fit takes, and
#: JAX compiles a whole step faster than each operation by itself.
QUICK = {
    "run_eagerly": keras.backend.backend() == "tensorflow",
    "jit_compile": keras.backend.backend() == "jax",
}


def make_model(**options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dropout(0.25),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(**{"optimizer": "adam", "loss": "mse", "jit_compile": False, **options})
    return model


def data(count=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 2)).astype("f4"), rng.normal(size=(count, 1)).astype("f4")


def numpy(variable):
    return np.array(keras.ops.convert_to_numpy(variable.value))


def everything_else(model):
    mine = {id(variable) for variable in model.trainable_weights}
    rest = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [numpy(variable) for variable in rest if id(variable) not in mine]


def filled(model, value):
    return [np.full(tuple(variable.shape), value, "f4") for variable in model.trainable_weights]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)
