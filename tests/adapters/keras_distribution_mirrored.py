"""Rounds under the strategies of one process on TensorFlow; run by test_keras_distribution.py, with two logical CPUs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from branchkey_integrations import Client
from branchkey_integrations.keras import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support.keras_models import data, make_model, numpy
from tests.support.keras_watch import Watch, awkward, bits

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="module")
def mirrored():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def silent():
    """A branch that never has enough updates, so that a test says what the aggregate is."""
    with Sandbox(leaves=1, quorum=2) as branch:
        yield branch


@pytest.fixture
def client(silent):
    with Client(silent.credentials[0].to_dict(), host=silent.url) as leaf:
        yield leaf


def copies(variable):
    """What each replica holds."""
    value = variable.value
    return [part.numpy() for part in (value.values if isinstance(value, tf.distribute.DistributedValues) else [value])]


def test_both_replicas_hold_the_aggregate_and_all_else_stays(mirrored, silent, client):
    with mirrored.scope():
        model = make_model()
    answers = [awkward(model, seed) for seed in range(3)]
    watch = Watch(silent, answers, copies)
    callback = BranchKeyCallback(client, timeout_s=60)
    model.fit(*data(21), batch_size=8, epochs=3, verbose=0, callbacks=[callback, watch], validation_data=data(9))
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 3
    assert silent.hits("upload") == 3
    assert [upload.weighting for upload in silent.uploads] == [21.0] * 3
    for upload, sent in zip(silent.uploads, watch.sent):
        assert bits(sent) == bits([[layer, layer] for layer in upload.layers])
    assert [bits(held) for held in watch.loaded] == [bits([[layer, layer] for layer in answer]) for answer in answers]
    assert [bits(rest) for rest in watch.rest_after] == [bits(rest) for rest in watch.rest_before]
    # What the line above compares is worth comparing: moments that are not zero, statistics of each replica's own.
    moments = [copies(moment) for moment in model.optimizer._momentums]
    assert all((replica != 0).any() for both in moments for replica in both)
    own = copies(model.layers[1].moving_mean)
    assert (own[0] != own[1]).all()
    assert [replica.tolist() for replica in copies(model.optimizer.iterations)] == [9, 9]


class Factor(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


def test_first_batch_of_the_next_epoch_sees_the_aggregate_on_both_replicas(mirrored, silent, client):
    with mirrored.scope():
        model = keras.Sequential([keras.Input((1,)), Factor()])
        # Learning rate 0: the loss inside the training step tells the weight that both replicas computed with.
        model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)
    watch = Watch(silent, [[np.array(7, "f4")], [np.array(3, "f4")]], copies)
    ones, zeros = np.ones((4, 1), "f4"), np.zeros((4, 1), "f4")
    callbacks = [BranchKeyCallback(client, timeout_s=60), watch]
    model.fit(ones, zeros, epochs=2, batch_size=4, verbose=0, callbacks=callbacks)
    assert watch.losses == [1.0, 49.0]
    assert [replica.tolist() for replica in copies(model.trainable_weights[0])] == [3.0, 3.0]


def test_statistics_and_moments_are_set_on_both_replicas(mirrored, silent, client):
    with mirrored.scope():
        model = make_model()
    statistics = [np.float32([0.1, -3.3]), np.float32([1 / 3, 1e-30])]
    answer = [*awkward(model, 5), *statistics]
    watch = Watch(silent, [answer], copies)
    callback = BranchKeyCallback(client, timeout_s=60, buffers=True, optimizer_state="reset")
    model.fit(*data(), epochs=1, verbose=0, callbacks=[callback, watch])
    norm = model.layers[1]
    # The first replica's statistics travel: those that Keras saves, too.
    for layer, statistic in zip(silent.uploads[0].layers[-2:], (norm.moving_mean, norm.moving_variance)):
        index = [id(variable) for variable in model.non_trainable_variables].index(id(statistic))
        assert layer.tobytes() == watch.rest_before[0][index][0].tobytes()
        assert layer.tobytes() != watch.rest_before[0][index][1].tobytes()
    held = [copies(norm.moving_mean), copies(norm.moving_variance)]
    assert bits(held) == bits([[statistic, statistic] for statistic in statistics])
    moments = [*model.optimizer._momentums, *model.optimizer._velocities]
    assert len(moments) == 8
    assert all((replica == 0).all() for moment in moments for replica in copies(moment))
    assert [replica.tolist() for replica in copies(model.optimizer.iterations)] == [1, 1]


def test_samples_are_counted_once_over_uneven_replicas(mirrored, silent, client):
    with mirrored.scope():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(optimizer="sgd", loss="mse", jit_compile=False)
    watch = Watch(silent, [awkward(model, seed) for seed in range(2)], copies)
    callback = BranchKeyCallback(client, timeout_s=60)
    # 17 = 8 + 8 + 1: the second replica has nothing to do in the last step.
    model.fit(*data(17), batch_size=8, epochs=2, verbose=0, callbacks=[callback, watch])
    assert [upload.weighting for upload in silent.uploads] == [17.0, 17.0]
    assert bits(watch.loaded[-1]) == bits([[layer, layer] for layer in watch.answers[-1]])


@pytest.mark.parametrize("name", ["OneDeviceStrategy", "MultiWorkerMirroredStrategy"])
def test_strategy_of_a_single_replica_is_served(name, silent, client):
    strategy = tf.distribute.OneDeviceStrategy("CPU:1") if name.startswith("One") else getattr(tf.distribute, name)()
    with strategy.scope():
        model = make_model()
    watch = Watch(silent, [awkward(model, 0)], copies)
    model.fit(*data(), batch_size=8, verbose=0, callbacks=[BranchKeyCallback(client, timeout_s=60), watch])
    assert [upload.weighting for upload in silent.uploads] == [20.0]
    assert [numpy(weight).tobytes() for weight in model.trainable_weights] == [a.tobytes() for a in watch.answers[0]]
