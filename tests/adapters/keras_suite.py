"""Rounds inside fit; run on every backend by test_keras_backends.py, with KERAS_BACKEND set."""

from __future__ import annotations

import json
import os
import threading

import keras
import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.keras import BranchKeyCallback, KerasParameters
from branchkey_integrations.sandbox import Sandbox
from tests.support.keras_models import Subclassed, data, filled, make_model, numpy

BACKEND = keras.backend.backend()


@pytest.fixture(scope="session", autouse=True)
def backend_is_the_one_asked_for(request):
    assert os.environ["KERAS_BACKEND"] == BACKEND
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"backend: {BACKEND}")


@pytest.fixture
def sandbox():
    """A branch of one leaf that answers each update with itself."""
    with Sandbox(leaves=1) as branch:
        yield branch


@pytest.fixture
def client(sandbox):
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url) as leaf:
        yield leaf


@pytest.fixture
def silent():
    """A branch that never has enough updates, so that a test says what the aggregate is."""
    with Sandbox(leaves=1, quorum=2) as branch:
        yield branch


@pytest.fixture
def waiting(silent):
    with Client(silent.credentials[0].to_dict(), host=silent.url) as leaf:
        yield leaf


def test_each_epoch_makes_a_round_with_the_metrics_of_the_weights_sent(sandbox, client):
    model = make_model(metrics=["mae"])
    x, y = data()
    callback = BranchKeyCallback(client)
    sent, logs_seen = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            sent.append(KerasParameters(self.model).read())
            logs_seen.append(dict(logs))

    fitted = model.fit(x, y, epochs=3, batch_size=8, verbose=0, callbacks=[callback, Watch()], validation_data=(x, y))
    assert [upload.weighting for upload in sandbox.uploads] == [20.0] * 3
    for upload, weights in zip(sandbox.uploads, sent):
        for layer, weight in zip(upload.layers, weights):
            np.testing.assert_array_equal(layer, weight)
    reports = [json.loads(report["data"]) for report in sandbox.metrics]
    assert [set(report) for report in reports] == [{"loss", "mae", "val_loss", "val_mae"}] * 3
    assert reports == [pytest.approx(logs) for logs in logs_seen]
    assert set(fitted.history) == {"loss", "mae", "val_loss", "val_mae"}
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 3
    assert callback.last_outcome.aggregation_id == sandbox.aggregates[-1]
    assert callback.round == 3


def publish_when_uploaded(branch, layers):
    """Answer the next update with ``layers``."""
    known = len(branch.uploads)

    def work():
        done = threading.Event()
        for _ in range(2000):
            if len(branch.uploads) > known:
                branch.publish(layers)
                return
            done.wait(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_first_batch_of_the_next_epoch_sees_the_aggregate(silent, waiting):
    seen = []

    class Probe(keras.layers.Layer):
        def build(self, shape):
            self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

        def call(self, x):
            return x * self.factor

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append(("begin", epoch, float(numpy(self.model.trainable_weights[0]))))

        def on_train_batch_end(self, batch, logs=None):
            seen.append(("loss", logs["loss"]))

    model = keras.Sequential([keras.Input((1,)), Probe()])
    # Learning rate 0: the loss inside the training step tells the weight that the step computed with.
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse", jit_compile=False)
    answers = publish_when_uploaded(silent, [np.array(7.0, "f4")])
    callback = BranchKeyCallback(waiting, timeout_s=20)

    class Second(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.thread = publish_when_uploaded(silent, [np.array(3.0, "f4")])

    second = Second()
    x, y = np.ones((4, 1), "f4"), np.zeros((4, 1), "f4")
    model.fit(x, y, epochs=2, batch_size=4, verbose=0, callbacks=[callback, second, Watch()])
    answers.join()
    second.thread.join()
    assert seen == [("begin", 0, 1.0), ("loss", 1.0), ("begin", 1, 7.0), ("loss", 49.0)]
    assert float(numpy(model.trainable_weights[0])) == 3.0


def test_last_aggregate_stays_after_use_ema_and_the_rest_is_untouched(silent, waiting):
    model = make_model(optimizer=keras.optimizers.SGD(0.1, use_ema=True))
    answer = publish_when_uploaded(silent, filled(model, 5))
    model.fit(*data(), epochs=1, verbose=0, callbacks=[BranchKeyCallback(waiting, timeout_s=20)])
    answer.join()
    assert all((numpy(variable) == 5).all() for variable in model.trainable_weights)
    assert int(numpy(model.optimizer.iterations)) == 1
    assert (numpy(model.layers[1].moving_mean) != 0).all()


def test_every_nth_epoch_makes_a_round_of_all_samples_since_the_last(sandbox, client):
    make_model().fit(*data(), epochs=5, verbose=0, callbacks=[BranchKeyCallback(client, every_n_epochs=2)])
    assert [upload.weighting for upload in sandbox.uploads] == [40.0, 40.0]


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = data(7)
        return (x, y) if index < 2 else (x[:3], y[:3])


def generator():
    x, y = data(7)
    yield x, y
    yield x, y
    yield x[:2], y[:2]


@pytest.mark.parametrize(
    ("make", "options", "samples"),
    [
        (lambda: (*data(),), {"batch_size": 8}, 20),
        (lambda: (*data(),), {"batch_size": 8, "validation_split": 0.5}, 10),
        (lambda: (*data(),), {"batch_size": 8, "steps_per_epoch": 2}, 16),
        (lambda: (*data(),), {"batch_size": 8, "sample_weight": np.full(20, 0.5, "f4")}, 20),
        (lambda: (Batches(),), {}, 17),
        (lambda: (generator(),), {}, 16),
    ],
    ids=["arrays", "split", "steps", "sample_weight", "pydataset", "generator"],
)
def test_weighting_is_the_samples_really_seen(sandbox, client, make, options, samples):
    make_model().fit(*make(), verbose=0, callbacks=[BranchKeyCallback(client)], **options)
    assert [upload.weighting for upload in sandbox.uploads] == [samples]


def test_weighting_counts_when_run_eagerly(sandbox, client):
    make_model(run_eagerly=True).fit(*data(), batch_size=8, verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [upload.weighting for upload in sandbox.uploads] == [20]


def test_weighting_counts_the_backends_own_datasets(sandbox, client):
    if BACKEND == "torch":
        import torch

        pairs = torch.utils.data.TensorDataset(*(torch.from_numpy(part) for part in data()))
        dataset = torch.utils.data.DataLoader(pairs, batch_size=8)
    else:
        import tensorflow as tf

        dataset = tf.data.Dataset.from_tensor_slices(data()).filter(lambda x, y: True).batch(8)  # of unknown length
    make_model().fit(dataset, epochs=2, verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [upload.weighting for upload in sandbox.uploads] == [20, 20]


def test_weighting_counts_with_several_steps_an_execution(sandbox, client):
    several = 1 if BACKEND == "torch" else 4  # Keras refuses more than 1 on torch
    # XLA belongs to the other two; on torch this would start a compiler for most of a minute.
    model = make_model(steps_per_execution=several, jit_compile=BACKEND != "torch")
    model.fit(*data(), batch_size=3, epochs=2, verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [upload.weighting for upload in sandbox.uploads] == [20, 20]


def test_model_with_its_own_train_step_asks_for_a_number(sandbox, client):
    class Own(keras.Sequential):
        def train_step(self, *args):
            return super().train_step(*args)

    model = Own([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", jit_compile=False)
    with pytest.raises(ConfigurationError, match="weighting=<a number>"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert sandbox.uploads == []
    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client, weighting=4)])
    assert [upload.weighting for upload in sandbox.uploads] == [4]


def test_metrics_that_somebody_reset_are_not_taken_for_samples(sandbox, client):
    class Evaluates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(*data(5), verbose=0)

    with pytest.raises(ConfigurationError, match="before callbacks that evaluate"):
        make_model().fit(*data(), verbose=0, callbacks=[Evaluates(), BranchKeyCallback(client)])
    assert sandbox.uploads == []


def test_nothing_to_train_is_refused_when_fit_starts(sandbox, client):
    model = make_model()
    model.trainable = False
    with pytest.raises(LayoutError, match="frozen"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert sandbox.uploads == []


def test_subclassed_model_is_built_by_fit(sandbox, client):
    model = Subclassed()
    model.compile(optimizer="sgd", loss="mse", jit_compile=False)
    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [layer.shape for layer in sandbox.uploads[0].layers] == [(2, 1), (1,)]


def test_stopped_run_stops_fit(sandbox, client):
    class Stop(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs += 1
            if epoch == 1:
                sandbox.stop()

    stop, callback = Stop(), BranchKeyCallback(client)
    model = make_model()
    model.fit(*data(), epochs=9, verbose=0, callbacks=[callback, stop])
    assert callback.last_outcome.status == "stopped"
    assert model.stop_training
    assert (stop.epochs, len(sandbox.uploads)) == (2, 1)


def test_reset_clears_moments_and_neither_steps_nor_rate(sandbox, client):
    model = make_model(optimizer=keras.optimizers.Adam(0.01))
    model.fit(*data(), verbose=0, epochs=2, callbacks=[BranchKeyCallback(client, optimizer_state="reset")])
    rest = {variable.path.split("/")[-1]: numpy(variable) for variable in model.optimizer.variables}
    assert int(rest.pop("iteration")) == 2
    assert float(rest.pop("learning_rate")) == pytest.approx(0.01)
    assert len(rest) == 8
    assert all((value == 0).all() for value in rest.values())


def test_reset_is_refused_for_an_optimizer_whose_state_is_no_moments(sandbox, client):
    with pytest.raises(ConfigurationError, match="Adagrad"):
        make_model(optimizer="adagrad").fit(
            *data(), verbose=0, callbacks=[BranchKeyCallback(client, optimizer_state="reset")]
        )


def test_wrong_option_is_told_at_once(client):
    with pytest.raises(ConfigurationError, match="every_n_epochs"):
        BranchKeyCallback(client, every_n_epoch=2)
    with pytest.raises(ConfigurationError, match="Client"):
        BranchKeyCallback("credentials.json")


@pytest.mark.parametrize("package", ["tf_keras.src.engine.training", "keras.engine.training"])
def test_model_of_keras_2_is_refused_with_the_versions_that_work(package, silent, waiting):
    old = type("Functional", (), {"__module__": package})()
    with pytest.raises(ConfigurationError, match=r"Keras 3 \(3\.0\.5 or newer\)"):
        KerasParameters(old)
    with pytest.raises(ConfigurationError, match=r"Keras 3 \(3\.0\.5 or newer\)"):
        BranchKeyCallback(waiting).set_model(old)
