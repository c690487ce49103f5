"""Rounds under keras.distribution on JAX; run by test_keras_distribution.py, in a process with two host devices."""

from __future__ import annotations

import jax
import keras
import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.keras import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support.keras_models import data
from tests.support.keras_watch import Watch, awkward, bits


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    assert (keras.backend.backend(), len(jax.devices()), jax.process_count()) == ("jax", 2, 1)


@pytest.fixture
def silent():
    """A branch that never has enough updates, so that a test says what the aggregate is."""
    with Sandbox(leaves=1, quorum=2) as branch:
        yield branch


@pytest.fixture
def client(silent):
    with Client(silent.credentials[0].to_dict(), host=silent.url) as leaf:
        yield leaf


def data_parallel():
    return keras.distribution.DataParallel()


def model_parallel():
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*wide.*kernel"] = (None, "model")
    layouts[".*wide.*bias"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def shards(variable):
    """What each device holds, and where."""
    parts = sorted(variable.value.addressable_shards, key=lambda shard: shard.device.id)
    return [np.array(shard.data) for shard in parts]


def layouts_of(model):
    return [str(variable.value.sharding) for variable in [*model.variables, *model.optimizer.variables]]


class Layouts(keras.callbacks.Callback):
    """Note on which devices everything lies, before and after each load."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(layouts_of(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(layouts_of(self.model))

    def on_train_end(self, logs=None):
        self.seen.append(layouts_of(self.model))


def fit(distribution, branch, client, **options):
    """Train two epochs of 20 samples, each answered, and see that nothing moved to another device."""
    with distribution.scope():
        keras.utils.set_random_seed(1)
        layers = [keras.Input((2,)), keras.layers.Dense(4, name="wide"), keras.layers.BatchNormalization()]
        model = keras.Sequential([*layers, keras.layers.Dense(1, name="head")])
        model.compile(optimizer="adam", loss="mse", jit_compile=True, steps_per_execution=2)
        watch = Watch(branch, [awkward(model, seed) for seed in range(2)], shards)
        layouts = Layouts()
        callback = BranchKeyCallback(client, timeout_s=60, **options)
        model.fit(*data(), batch_size=8, epochs=2, verbose=0, callbacks=[callback, watch, layouts])
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 2
    assert branch.hits("upload") == 2
    assert [upload.weighting for upload in branch.uploads] == [20.0, 20.0]
    assert layouts.seen[0] == layouts.seen[1] == layouts.seen[2] == layouts.seen[3] == layouts.seen[4]
    return model, watch, layouts.seen[0]


def test_data_parallel_holds_the_aggregate_on_both_devices(silent, client):
    _, watch, layouts = fit(data_parallel(), silent, client)
    assert all("NamedSharding" in layout and "'batch': 2" in layout for layout in layouts)
    for upload, sent in zip(silent.uploads, watch.sent):
        assert bits(sent) == bits([[layer, layer] for layer in upload.layers])
    wanted = [bits([[layer, layer] for layer in answer]) for answer in watch.answers]
    assert [bits(held) for held in watch.loaded] == wanted
    assert [bits(rest) for rest in watch.rest_after] == [bits(rest) for rest in watch.rest_before]


def test_model_parallel_gathers_for_the_update_and_shards_the_aggregate(silent, client):
    model, watch, _ = fit(model_parallel(), silent, client)
    names = [weight.path.split("/", 1)[1] for weight in model.trainable_weights]
    assert names[:2] == ["wide/kernel", "wide/bias"]

    def halves(layers):
        kernel, bias, *rest = layers
        return [[kernel[:, :2], kernel[:, 2:]], [bias[:2], bias[2:]], *([layer, layer] for layer in rest)]

    assert [layer.shape for layer in silent.uploads[0].layers[:2]] == [(2, 4), (4,)]
    for upload, sent in zip(silent.uploads, watch.sent):
        assert bits(sent) == bits(halves(upload.layers))
    assert [bits(held) for held in watch.loaded] == [bits(halves(answer)) for answer in watch.answers]
    assert [bits(rest) for rest in watch.rest_after] == [bits(rest) for rest in watch.rest_before]


def test_reset_clears_moments_on_both_devices_where_they_lie(silent, client):
    model, _, _ = fit(model_parallel(), silent, client, optimizer_state="reset")
    moments = [*model.optimizer._momentums, *model.optimizer._velocities]
    assert len(moments) == 12
    assert all((shard == 0).all() for moment in moments for shard in shards(moment))
    assert [int(shard) for shard in shards(model.optimizer.iterations)] == [6, 6]


class Factor(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


def test_first_batch_of_the_next_epoch_sees_the_aggregate_on_both_devices(silent, client):
    with data_parallel().scope():
        model = keras.Sequential([keras.Input((1,)), Factor()])
        # Learning rate 0: the loss inside the training step tells the weight that both devices computed with.
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
        watch = Watch(silent, [[np.array(7, "f4")], [np.array(3, "f4")]], shards)
        ones, zeros = np.ones((4, 1), "f4"), np.zeros((4, 1), "f4")
        callbacks = [BranchKeyCallback(client, timeout_s=60), watch]
        model.fit(ones, zeros, epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
    assert watch.losses == [1.0, 49.0]
    assert [float(shard) for shard in shards(model.trainable_weights[0])] == [3.0, 3.0]
