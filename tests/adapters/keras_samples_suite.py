"""The weighting is what an epoch really saw; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras import BranchKeyCallback
from tests.support.keras_branch import BACKEND
from tests.support.keras_models import QUICK, data


class Batches(keras.utils.PyDataset):
    """Batches of 7, 7 and 3."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = data(7)
        return (x, y) if index < 2 else (x[:3], y[:3])


def generator(epochs=1):
    """Batches of 7, 7 and 2."""
    x, y = data(7)
    for _ in range(epochs):
        yield x, y
        yield x, y
        yield x[:2], y[:2]


def own_dataset():
    """Batches of 8, 8 and 4, of a length that is not told, in what the backend's own users have."""
    if BACKEND == "torch":
        import torch

        pairs = torch.utils.data.TensorDataset(*(torch.from_numpy(part) for part in data()))
        return torch.utils.data.DataLoader(pairs, batch_size=8)
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data()).filter(lambda x, y: True).batch(8)


def classes():
    x, y = data()
    return x, (y > 0).astype("int32")


def tiny(**options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "sgd", "loss": "mse", **QUICK, **options})
    return model


@pytest.fixture(scope="module")
def trained():
    """One model for all kinds of data: a step is compiled once for each length of a batch."""
    return tiny()


EACH_WAY = {
    "arrays": (lambda: data(), {"batch_size": 8}, [20, 20]),
    "one batch": (lambda: data(), {"batch_size": 64}, [20, 20]),
    "split": (lambda: data(), {"batch_size": 8, "validation_split": 0.5}, [10, 10]),
    "validated": (lambda: data(), {"batch_size": 8, "validation_data": data(7)}, [20, 20]),
    "validated now and then": (
        lambda: data(),
        {"batch_size": 8, "validation_data": data(7), "validation_freq": 2},
        [20, 20],
    ),
    "steps": (lambda: data(), {"batch_size": 8, "steps_per_epoch": 2}, [16, 4]),  # Keras goes on where it was
    "sample_weight": (lambda: data(), {"batch_size": 8, "sample_weight": np.full(20, 0.5, "f4")}, [20, 20]),
    "class_weight": (classes, {"batch_size": 8, "class_weight": {0: 0.1, 1: 9.0}}, [20, 20]),
    "a later epoch": (lambda: data(), {"batch_size": 8, "initial_epoch": 1}, [20]),
    "pydataset": (lambda: (Batches(),), {}, [17, 17]),
    "generator": (lambda: (generator(epochs=2),), {"steps_per_epoch": 3}, [16, 16]),
    "the backend's own": (lambda: (own_dataset(),), {}, [20, 20]),
}


@pytest.mark.parametrize("way", list(EACH_WAY))
def test_weighting_is_the_samples_really_seen(sandbox, client, trained, way):
    make, options, samples = EACH_WAY[way]
    trained.fit(*make(), epochs=2, verbose=0, callbacks=[BranchKeyCallback(client)], **options)
    assert [upload.weighting for upload in sandbox.uploads] == samples


def test_weighting_counts_in_a_graph_and_eagerly_alike(sandbox, client):
    for eager in (True, False):
        model = tiny(run_eagerly=eager, jit_compile=False)
        model.fit(*data(), batch_size=8, epochs=2, verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [upload.weighting for upload in sandbox.uploads] == [20] * 4


def test_a_generator_that_runs_dry_counts_for_what_it_gave(sandbox, client):
    tiny().fit(generator(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert [upload.weighting for upload in sandbox.uploads] == [16]


def test_epochs_without_a_round_add_up_to_the_next_one(sandbox, client):
    callback = BranchKeyCallback(client, every_n_epochs=2)
    tiny().fit(*data(), initial_epoch=3, epochs=7, verbose=0, callbacks=[callback])
    assert [upload.weighting for upload in sandbox.uploads] == [20, 40]


def test_each_fit_counts_anew(sandbox, client):
    model, callback = tiny(), BranchKeyCallback(client, every_n_epochs=2)
    model.fit(*data(), epochs=3, verbose=0, callbacks=[callback])
    model.train_on_batch(*data(6))
    model.fit(*data(), epochs=2, verbose=0, callbacks=[callback])
    assert [upload.weighting for upload in sandbox.uploads] == [40, 40]


def test_a_loop_of_train_on_batch_is_asked_for_a_number_because_keras_forgets_its_batches(sandbox, client):
    def train(callback):
        model = tiny()
        hooks = keras.callbacks.CallbackList([callback], add_history=True, model=model, verbose=0, epochs=2, steps=2)
        try:
            hooks.on_train_begin()
            for epoch in range(2):
                hooks.on_epoch_begin(epoch)
                for step, size in enumerate((7, 4)):
                    hooks.on_train_batch_begin(step)
                    logs = model.train_on_batch(*data(size), return_dict=True)
                    hooks.on_train_batch_end(step, logs)
                hooks.on_epoch_end(epoch, logs)
        finally:
            hooks.on_train_end()
        return model

    with pytest.raises(ConfigurationError, match=r"a loop that is not fit\(\).*weighting=<a number>"):
        train(BranchKeyCallback(client))
    assert sandbox.uploads == []
    callback = BranchKeyCallback(client, weighting=11)
    model = train(callback)
    assert [upload.weighting for upload in sandbox.uploads] == [11, 11]
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 2
    assert model.history.history["branchkey_status"] == ["applied", "applied"]


def test_many_samples_are_counted_exactly_under_a_narrow_policy(sandbox, client):
    keras.config.set_dtype_policy("bfloat16")  # counting in bfloat16 itself would get stuck at 256
    try:
        model = tiny()
        model.fit(*data(601), batch_size=200, verbose=0, callbacks=[BranchKeyCallback(client)])
    finally:
        keras.config.set_dtype_policy("float32")
    assert [upload.weighting for upload in sandbox.uploads] == [601]


def test_a_count_that_is_kept_in_few_bits_asks_for_a_number(sandbox, client):
    keras.config.set_floatx("float16")
    try:
        model = tiny()
        with pytest.raises(ConfigurationError, match=r"a count kept in float16.*weighting=<a number>"):
            model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
        assert sandbox.uploads == []
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client, weighting=20)])
    finally:
        keras.config.set_floatx("float32")
    assert [upload.weighting for upload in sandbox.uploads] == [20]


def test_model_with_its_own_train_step_asks_for_a_number(sandbox, client):
    class Own(keras.Sequential):
        def train_step(self, *args):
            return super().train_step(*args)

    model = Own([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", **QUICK)
    with pytest.raises(ConfigurationError, match="weighting=<a number>"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert sandbox.uploads == []
    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client, weighting=4)])
    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client, weighting=lambda metrics: 1 + metrics["loss"])])
    assert [upload.weighting for upload in sandbox.uploads] == [4, pytest.approx(1 + model.history.history["loss"][0])]


def test_metrics_that_somebody_reset_are_not_taken_for_samples(sandbox, client):
    class Evaluates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(*data(5), verbose=0)

    with pytest.raises(ConfigurationError, match="before callbacks that evaluate"):
        tiny().fit(*data(), verbose=0, callbacks=[Evaluates(), BranchKeyCallback(client)])
    assert sandbox.uploads == []
    tiny().fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client), Evaluates()])
    assert [upload.weighting for upload in sandbox.uploads] == [20]
