"""What leaves a site and what is loaded, for every kind of model; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest

from branchkey_integrations.errors import LayoutError
from branchkey_integrations.keras import BranchKeyCallback, KerasParameters
from tests.support.keras_models import QUICK, Subclassed, data, everything_else, make_model, numpy
from tests.support.keras_watch import Watch, awkward, bits

layers = keras.layers


def compiled(model, optimizer="adam"):
    model.compile(optimizer=optimizer, loss="mse", **QUICK)
    return model


def plain():
    return make_model(**QUICK)


def frozen():
    model = make_model(**QUICK)
    model.layers[-1].trainable = False
    return compiled(model)


def lora():
    model = make_model(**QUICK)
    model.layers[-1].enable_lora(1)
    return compiled(model)


def int8():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)])
    model.layers[0].quantize("int8")
    return compiled(model)


def nested_and_shared():
    shared = layers.Dense(2, name="shared")
    inner = keras.Sequential([layers.Dense(2, name="first"), layers.BatchNormalization()], name="inner")
    x = keras.Input((2,))
    return compiled(keras.Model(x, layers.Dense(1, name="head")(shared(inner(shared(x))))))


def two_inputs():
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([layers.Dense(3, name="of_a")(a), layers.Dense(2, name="of_b")(b)])
    return compiled(keras.Model({"a": a, "b": b}, layers.Dense(1)(joined)))


def under(policy):
    def make():
        keras.config.set_dtype_policy(policy)
        try:
            return compiled(keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dense(1)]))
        finally:
            keras.config.set_dtype_policy("float32")

    return make


#: Each kind of model: how it is made, what it sends, and what buffers=True adds.
MODELS = {
    "plain": (plain, "gamma[2] beta[2] kernel[2, 1] bias[1]", "moving_mean[2] moving_variance[2]"),
    "frozen": (frozen, "gamma[2] beta[2]", "moving_mean[2] moving_variance[2]"),
    "lora": (
        lora,
        "gamma[2] beta[2] bias[1] lora_kernel_a[2, 1] lora_kernel_b[1, 1]",
        "moving_mean[2] moving_variance[2]",
    ),
    "int8": (int8, "bias[4] gamma[4] beta[4] kernel[4, 1] bias[1]", "moving_mean[4] moving_variance[4]"),
    "nested and shared": (
        nested_and_shared,
        "kernel[2, 2] bias[2] kernel[2, 2] bias[2] gamma[2] beta[2] kernel[2, 1] bias[1]",
        "moving_mean[2] moving_variance[2]",
    ),
    "two inputs": (two_inputs, "kernel[2, 3] bias[3] kernel[2, 2] bias[2] kernel[5, 1] bias[1]", ""),
    "mixed_float16": (
        under("mixed_float16"),
        "gamma[2] beta[2] kernel[2, 1] bias[1]",
        "moving_mean[2] moving_variance[2]",
    ),
    "mixed_bfloat16": (
        under("mixed_bfloat16"),
        "gamma[2] beta[2] kernel[2, 1] bias[1]",
        "moving_mean[2] moving_variance[2]",
    ),
    "bfloat16": (under("bfloat16"), "gamma[2] beta[2] kernel[2, 1] bias[1]", "moving_mean[2] moving_variance[2]"),
    "float16": (under("float16"), "gamma[2] beta[2] kernel[2, 1] bias[1]", "moving_mean[2] moving_variance[2]"),
}


def described(layout):
    return " ".join(f"{layer.name.split('/')[-1]}{list(layer.shape)}" for layer in layout)


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_layout_is_the_trainable_weights_in_order_then_statistics(kind):
    make, trainable, statistics = MODELS[kind]
    model = make()
    assert described(KerasParameters(model).layout()) == trainable
    assert described(KerasParameters(model, buffers=True).layout()) == f"{trainable} {statistics}".strip()
    stored = {"bfloat16": "bfloat16", "float16": "float16"}.get(kind, "float32")
    assert {layer.dtype for layer in KerasParameters(model, buffers=True).layout()} == {stored}


def as_stored(arrays, kind):
    """What a model of this kind makes of float32: itself, or the nearest value of its own type."""
    stored = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(kind)
    return arrays if stored is None else [array.astype(stored) for array in arrays]


@pytest.mark.parametrize("kind", list(MODELS))
def test_exactly_the_weights_are_sent_and_replaced_and_no_other_bit_changes(silent, waiting, kind):
    model = MODELS[kind][0]()
    answers = [awkward(model, seed) for seed in (1, 2)]
    watch = Watch(silent, answers, lambda variable: [numpy(variable)])
    x, y = data(12)
    inputs = {"a": x, "b": -x} if kind == "two inputs" else x
    callback = BranchKeyCallback(waiting, timeout_s=20)
    model.fit(inputs, y, epochs=2, batch_size=4, verbose=0, callbacks=[callback, watch])

    assert [upload.weighting for upload in silent.uploads] == [12, 12]
    for upload, weights in zip(silent.uploads, watch.sent):
        assert {layer.dtype.str for layer in upload.layers} == {"<f2" if kind == "float16" else "<f4"}
        sent = as_stored(list(upload.layers), kind)
        assert [layer.tobytes() for layer in sent] == [copies[0].tobytes() for copies in weights]
        # What went out is what a local epoch made of the last aggregate, not that aggregate.
        assert upload.layers[0].tobytes() not in {answer[0].tobytes() for answer in answers}
    for answer, weights in zip(answers, watch.loaded):
        assert [layer.tobytes() for layer in as_stored(answer, kind)] == [copies[0].tobytes() for copies in weights]
    assert len(watch.rest_before[0]) >= 5
    assert [bits(rest) for rest in watch.rest_before] == [bits(rest) for rest in watch.rest_after]


def test_buffers_travel_through_fit_and_land_in_the_statistics(silent, waiting):
    model = make_model(**QUICK)
    rng = np.random.default_rng(3)
    answer = [rng.random(tuple(layer.shape)).astype("f4") for layer in KerasParameters(model, buffers=True).layout()]
    sent = []

    class Publish(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            sent.append([numpy(model.layers[1].moving_mean), numpy(model.layers[1].moving_variance)])
            silent.publish(answer)

    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(waiting, timeout_s=20, buffers=True), Publish()])
    for layer, local in zip(silent.uploads[0].layers[4:], sent[0]):
        np.testing.assert_array_equal(layer, local)
        assert not set(local) & {0.0, 1.0}  # neither was as it began
    np.testing.assert_array_equal(numpy(model.layers[1].moving_mean), answer[4])
    np.testing.assert_array_equal(numpy(model.layers[1].moving_variance), answer[5])


def test_metrics_and_seeds_stay_as_they_are_in_a_load(silent, waiting):
    model = make_model(**QUICK)
    model.fit(*data(), verbose=0)
    seeds = [numpy(variable) for variable in model.non_trainable_variables if "int" in str(variable.dtype)]
    assert len(seeds) == 1
    assert len(model.metrics_variables) >= 2
    before = everything_else(model)
    KerasParameters(model, buffers=False).write(awkward(model, 4))
    assert [value.tobytes() for value in before] == [value.tobytes() for value in everything_else(model)]


class Changes(keras.callbacks.Callback):
    """Change the model after the second epoch, before the update is sent."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            self.change(self.model)


CHANGES = {
    "lora": lambda model: model.layers[-1].enable_lora(1),
    "freeze": lambda model: setattr(model.layers[-1], "trainable", False),
    "quantize": lambda model: model.layers[-1].quantize("int8"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_weights_that_change_between_rounds_are_refused_before_the_upload(sandbox, client, change):
    model = make_model(**QUICK)
    with pytest.raises(LayoutError, match=r"4 layers became|layer_2 was 2/kernel"):
        model.fit(*data(), epochs=3, verbose=0, callbacks=[Changes(CHANGES[change]), BranchKeyCallback(client)])
    assert len(sandbox.uploads) == 1


@pytest.mark.parametrize("change", ["lora", "freeze"])
def test_weights_that_change_between_fits_are_refused_before_training(sandbox, client, change):
    model, callback = make_model(**QUICK), BranchKeyCallback(client)
    model.fit(*data(), verbose=0, callbacks=[callback])
    CHANGES[change](model)
    compiled(model)
    before = [numpy(variable).tobytes() for variable in model.weights]
    with pytest.raises(LayoutError, match=r"4 layers became|layer_2 was 2/kernel"):
        model.fit(*data(), verbose=0, callbacks=[callback])
    assert [numpy(variable).tobytes() for variable in model.weights] == before
    assert len(sandbox.uploads) == 1


def test_a_model_that_changed_before_any_round_is_taken_as_it_is(sandbox, client):
    model, callback = make_model(**QUICK), BranchKeyCallback(client, every_n_epochs=2)
    model.fit(*data(), verbose=0, callbacks=[callback])
    model.layers[-1].trainable = False
    compiled(model).fit(*data(), epochs=2, verbose=0, callbacks=[callback])
    assert [len(upload.layers) for upload in sandbox.uploads] == [2]


# --- models without weights --------------------------------------------------------------------------------------------


def test_an_unbuilt_model_says_so_for_every_way_of_reading_and_writing():
    for use in (
        lambda store: store.read(),
        lambda store: store.layout(),
        lambda store: store.write([np.ones((2, 1), "f4"), np.ones(1, "f4")]),
    ):
        with pytest.raises(LayoutError, match=r"expected a built model, found 0 weights.*build\(input_shape\)"):
            use(KerasParameters(Subclassed()))


def test_a_subclassed_model_is_built_by_fit_and_gets_the_aggregate(silent, waiting):
    model = compiled(Subclassed(), "sgd")

    class Publish(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            silent.publish([np.full((2, 1), 4, "f4"), np.full(1, 5, "f4")])

    model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(waiting, timeout_s=20), Publish()])
    assert [layer.shape for layer in silent.uploads[0].layers] == [(2, 1), (1,)]
    assert [numpy(variable).ravel().tolist() for variable in model.trainable_weights] == [[4, 4], [5]]


@pytest.mark.parametrize(
    "make", [lambda: make_model(**QUICK), lambda: compiled(Subclassed())], ids=["built", "unbuilt"]
)
def test_nothing_to_train_is_refused_when_fit_starts(sandbox, client, make):
    model = make()
    model.trainable = False
    with pytest.raises(LayoutError, match="all of them frozen"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert sandbox.uploads == []


def test_a_model_without_any_weights_is_refused_when_its_first_round_starts(sandbox, client):
    model = compiled(keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x[:, :1])]))
    with pytest.raises(LayoutError, match="0 weights"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert sandbox.uploads == []
