"""Layers out of a Keras model and into it; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import io

import keras
import ml_dtypes
import numpy as np
import pytest

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import ArchiveError, ConfigurationError, LayoutError, MixedModelError
from branchkey_integrations.keras import KerasParameters
from branchkey_integrations.screening import screen
from tests.support.archives import npz
from tests.support.keras_models import Subclassed, data, everything_else, filled, make_model, numpy


def test_layers_are_the_trainable_weights_in_order_and_copies():
    store = KerasParameters(make_model())
    layout = store.layout()
    assert [str(layer) for layer in layout] == [
        "0/gamma float32[2]", "1/beta float32[2]", "2/kernel float32[2, 1]", "3/bias float32[1]",
    ]  # fmt: skip
    first = store.read()
    first[0][:] = 9
    np.testing.assert_array_equal(store.read()[0], [1, 1])


def test_a_second_model_of_the_same_kind_has_the_same_layout():
    first, second = make_model(), make_model()
    assert first.trainable_weights[0].path != second.trainable_weights[0].path
    assert KerasParameters(first).layout().fingerprint == KerasParameters(second).layout().fingerprint


def test_weights_without_a_name_have_the_same_layout_in_every_model():
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.scale

    def layout():
        return KerasParameters(keras.Sequential([keras.Input((3,)), Scale()])).layout()

    assert layout() == layout()


@pytest.mark.parametrize("dtype", ["float64", ">f4", ">f8", "float16", "int32"])
def test_any_real_type_and_byte_order_is_loaded_and_nothing_else_changes(dtype):
    model = make_model()
    model.fit(*data(), verbose=0)
    before = everything_else(model)
    KerasParameters(model).write([array.astype(dtype) for array in filled(model, 3)])
    for variable in model.trainable_weights:
        np.testing.assert_array_equal(numpy(variable), np.full(tuple(variable.shape), 3, "f4"))
    after = everything_else(model)
    assert len(before) > 10
    assert [value.tobytes() for value in before] == [value.tobytes() for value in after]


def bad_layers():
    good = [np.ones(2, "f4"), np.ones(2, "f4"), np.ones((2, 1), "f4"), np.ones(1, "f4")]
    return {
        "count": good[:3],
        "broadcastable": [*good[:3], np.ones((1, 1), "f4")],
        "scalar": [*good[:3], np.ones((), "f4")],
        "transposed": [*good[:2], np.ones((1, 2), "f4"), good[3]],
        "range": [*good[:3], np.full(1, 1e300)],
        "complex": [*good[:3], np.ones(1, "c8")],
        "list": [*good[:3], [1.0]],
    }


@pytest.mark.parametrize("kind", list(bad_layers()))
def test_layers_that_do_not_fit_change_nothing(kind):
    store = KerasParameters(make_model())
    before = store.read()
    with pytest.raises(LayoutError):
        store.write(bad_layers()[kind])
    for old, new in zip(before, store.read()):
        np.testing.assert_array_equal(old, new)


def test_an_interrupt_midway_is_undone(monkeypatch):
    model = make_model()
    store = KerasParameters(model)
    before = store.read()
    last, assign = model.trainable_weights[-1], type(model.trainable_weights[-1]).assign
    failed = []

    def interrupted(variable, value):
        result = assign(variable, value)
        if variable is last and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(type(last), "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write(filled(model, 5))
    assert failed
    for old, new in zip(before, store.read()):
        np.testing.assert_array_equal(old, new)


def test_bfloat16_weights_are_widened_exactly_and_written_back():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, dtype="bfloat16")])
    store = KerasParameters(model)
    assert [layer.dtype for layer in store.layout()] == ["bfloat16", "bfloat16"]
    values = np.array([[1.0078125, -0.5, 3e38], [0.1, 2, 3]], "f4").astype(ml_dtypes.bfloat16).astype("f4")
    store.write([values, np.zeros(3, "f4")])
    read = store.read()
    assert read[0].dtype == np.float32
    np.testing.assert_array_equal(read[0], values)


def test_buffers_add_moving_statistics_but_no_frozen_weight_and_no_seed():
    model = make_model()
    names = [layer.name for layer in KerasParameters(model, buffers=True).layout()]
    assert names == ["0/gamma", "1/beta", "2/kernel", "3/bias", "4/moving_mean", "5/moving_variance"]
    model.layers[-1].trainable = False
    names = [layer.name for layer in KerasParameters(model, buffers=True).layout()]
    assert names == ["0/gamma", "1/beta", "2/moving_mean", "3/moving_variance"]


def test_patterns_choose_by_path():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3, name="body"), keras.layers.Dense(1, name="head")]
    )
    assert [layer.name for layer in KerasParameters(model, parameters="*head/*").layout()] == ["2/kernel", "3/bias"]
    with pytest.raises(ConfigurationError, match="tail"):
        KerasParameters(model, parameters="*tail/*").layout()


def test_unbuilt_model_is_refused_by_that_word():
    with pytest.raises(LayoutError, match="not built"):
        KerasParameters(Subclassed()).read()


# ---- one layer at a time --------------------------------------------------------------------------------------------


def private(layers, compressed=True):
    return Archive.open(
        io.BytesIO(npz({f"layer_{index}": layer for index, layer in enumerate(layers)}, compressed=compressed)),
        private=True,
    )


def wide_model():
    return keras.Sequential([keras.Input((20,)), keras.layers.Dense(30), keras.layers.Dense(3, dtype="bfloat16")])


def test_a_view_gives_in_pieces_what_would_be_read():
    store = KerasParameters(wide_model())
    for live, whole in zip(store.view(), store.read()):
        assert (live.shape, live.dtype, live.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
        pieces = list(live.pieces(7))
        assert max(piece.size for piece in pieces) <= 7
        assert {piece.dtype for piece in pieces} == {whole.dtype}
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
        assert np.asarray(live).tobytes() == whole.tobytes()
        assert np.asarray(live, dtype="f8").dtype == np.float64


def test_a_view_is_written_to_an_archive_bit_for_bit():
    store = KerasParameters(wide_model())
    plain, streamed = io.BytesIO(), io.BytesIO()
    assert write_archive(plain, store.read(), 2.0).sha256 == write_archive(streamed, store.view(), 2.0).sha256


@pytest.mark.parametrize("dtype", ["f4", ">f4", "f8"])
def test_an_archive_is_assigned_one_layer_at_a_time(dtype, monkeypatch):
    store = KerasParameters(wide_model())
    wanted = [np.random.default_rng(index).normal(size=layer.shape) for index, layer in enumerate(store.read())]
    wanted = [layer.astype("f4").astype(ml_dtypes.bfloat16).astype(dtype) for layer in wanted]
    order = []
    taken, assign = Archive.__getitem__, type(store._model.trainable_weights[0]).assign
    monkeypatch.setattr(Archive, "__getitem__", lambda self, index: order.append(index) or taken(self, index))

    def noted(variable, value):
        order.append("assigned")
        return assign(variable, value)

    monkeypatch.setattr(type(store._model.trainable_weights[0]), "assign", noted)
    store.write(private(wanted))
    assert order == [0, "assigned", 1, "assigned", 2, "assigned", 3, "assigned"]
    assert [layer.tobytes() for layer in store.read()] == [layer.astype("f4").tobytes() for layer in wanted]


def test_an_archive_that_does_not_fit_changes_nothing():
    store = KerasParameters(make_model())
    before = store.read()
    with pytest.raises(LayoutError, match="layer_3"):
        store.write(private([np.ones(2, "f4"), np.ones(2, "f4"), np.ones((2, 1), "f4"), np.full(1, 1e300)]))
    assert [layer.tobytes() for layer in store.read()] == [layer.tobytes() for layer in before]


def test_an_interrupt_waits_until_the_model_is_the_aggregate(monkeypatch):
    model = make_model()
    last, assign = model.trainable_weights[-1], type(model.trainable_weights[-1]).assign
    failed = []

    def interrupted(variable, value):
        if variable is last and not failed:
            failed.append(True)
            raise KeyboardInterrupt
        return assign(variable, value)

    monkeypatch.setattr(type(last), "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        KerasParameters(model).write(private(filled(model, 5)))
    assert failed
    assert [layer.tobytes() for layer in KerasParameters(model).read()] == [
        layer.tobytes() for layer in filled(model, 5)
    ]


def test_a_disk_that_fails_after_the_check_is_told_from_every_other_error(monkeypatch):
    model = make_model()
    archive = private(filled(model, 5))
    screen(archive, KerasParameters(model).layout())
    taken = Archive.__getitem__

    def failing(self, index):
        if index == 2:
            raise ArchiveError(what="file", found="Input/output error")
        return taken(self, index)

    monkeypatch.setattr(Archive, "__getitem__", failing)
    with pytest.raises(MixedModelError, match="some layers of the aggregate and some of before"):
        KerasParameters(model).write(archive)
    monkeypatch.undo()
    KerasParameters(model).write(archive)
    assert KerasParameters(model).read()[2].tobytes() == filled(model, 5)[2].tobytes()
