"""When a round happens inside fit, and beside which callbacks; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import re

import keras
import numpy as np
import pytest

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras import BranchKeyCallback
from tests.support.keras_branch import BACKEND, Answers
from tests.support.keras_models import QUICK, data, filled, make_model, numpy

#: How a training step is run. Several steps an execution and XLA are for two of the backends; on torch jit_compile=True
#: starts another compiler, which takes most of a minute for whatever model, so it has this one test only.
WAYS = {
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True, "jit_compile": False},
    "compiled": {"jit_compile": True},
    "four steps": {"jit_compile": False, "steps_per_execution": 4},
    "four compiled steps": {"jit_compile": True, "steps_per_execution": 4},
}
WAYS = {name: way for name, way in WAYS.items() if BACKEND != "torch" or "steps_per_execution" not in way}


class Probe(keras.layers.Layer):
    """Multiply by one weight, and note what it was in each training step that is run eagerly."""

    def __init__(self, *, eager) -> None:
        super().__init__()
        self.eager, self.seen = eager, []

    def build(self, shape):
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x, training=False):
        if self.eager and training:
            self.seen.append(float(keras.ops.convert_to_numpy(keras.ops.stop_gradient(self.factor.value))))
        return x * self.factor


class Losses(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", list(WAYS))
def test_the_first_batch_of_the_next_epoch_is_trained_on_the_aggregate(silent, waiting, way, monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # torch's compiler leaves it set; to be put back
    eager, several = "run_eagerly" in WAYS[way], WAYS[way].get("steps_per_execution", 1)
    probe, losses = Probe(eager=eager), Losses()
    model = keras.Sequential([keras.Input((1,)), probe])
    # Output factor * 1, wanted 0: the loss is factor^2 with the factor that the step itself saw, and each step takes a
    # quarter of the factor away. All in powers of two, so exactly. Several steps are told as one mean; there the factor
    # stands still, so that each of the steps has to see it.
    rate = 0.125 if several == 1 else 0.0
    model.compile(optimizer=keras.optimizers.SGD(rate), loss="mse", **WAYS[way])
    answers = Answers(silent, [[np.array(value, "f4")] for value in (7, 3, -2)])
    steps = max(2, several)
    x, y = np.ones((2 * steps, 1), "f4"), np.zeros((2 * steps, 1), "f4")
    callbacks = [BranchKeyCallback(waiting, timeout_s=20), answers, losses]
    model.fit(x, y, epochs=3, batch_size=2, verbose=0, shuffle=False, callbacks=callbacks)

    if several == 1:
        # Within an epoch Keras tells the mean so far.
        assert losses.values == [value for f in (1, 7, 3) for value in (f**2, (f**2 + (0.75 * f) ** 2) / 2)]
        assert [float(upload.layers[0]) for upload in silent.uploads] == [0.5625 * f for f in (1, 7, 3)]
    else:
        assert losses.values == [1, 49, 9]
        assert [float(upload.layers[0]) for upload in silent.uploads] == [1, 7, 3]
    assert probe.seen == ([1, 0.75, 7, 5.25, 3, 2.25] if eager else [])
    assert float(numpy(probe.factor)) == -2


def test_several_steps_an_execution_are_counted_and_on_torch_refused_by_keras(sandbox, client):
    model = make_model(steps_per_execution=4, jit_compile=BACKEND != "torch")
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client)])
        assert sandbox.uploads == []
    else:
        model.fit(*data(), batch_size=3, epochs=2, verbose=0, callbacks=[BranchKeyCallback(client)])
        assert [upload.weighting for upload in sandbox.uploads] == [20, 20]


def test_checkpoints_on_both_sides_hold_the_weights_that_had_the_score(silent, waiting, warned, tmp_path):
    model = make_model(optimizer=keras.optimizers.SGD(0.1))
    validation = data(9)

    def checkpoint(side):
        name = str(tmp_path / (side + "-{epoch}-{val_loss:.6f}.weights.h5"))
        return keras.callbacks.ModelCheckpoint(name, save_weights_only=True)

    answers = Answers(silent, [filled(model, value) for value in (2, -3, 5)])
    callbacks = [checkpoint("before"), BranchKeyCallback(waiting, timeout_s=20), checkpoint("after"), answers]
    history = model.fit(*data(), epochs=3, verbose=0, validation_data=validation, callbacks=callbacks)

    files = sorted(path for path in tmp_path.iterdir() if path.name.endswith(".weights.h5"))
    assert len(files) == 6
    fresh = make_model()
    scores = []
    for path in files:
        _, epoch, score = path.name[: -len(".weights.h5")].split("-")
        fresh.load_weights(path)
        assert fresh.evaluate(*validation, verbose=0) == pytest.approx(float(score), abs=2e-6)
        assert float(score) == pytest.approx(history.history["val_loss"][int(epoch) - 1], abs=1e-6)
        for weight, sent in zip(fresh.trainable_weights, silent.uploads[int(epoch) - 1].layers):
            np.testing.assert_array_equal(numpy(weight), sent)
        scores.append(float(score))
    assert len(set(scores)) == 3
    assert [weights[0][0] for weights in answers.found] == [1, 2, -3, 5]
    assert warned() == []


@pytest.mark.parametrize("overwrite", [None, 2])
def test_the_last_aggregate_stays_after_use_ema_has_finished(silent, waiting, warned, overwrite):
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=overwrite)
    model = make_model(optimizer=optimizer, **QUICK)
    answers = Answers(silent, [filled(model, 4), filled(model, 5)])
    model.fit(*data(), epochs=2, verbose=0, callbacks=[BranchKeyCallback(waiting, timeout_s=20), answers])
    assert [[float(array.min()) for array in answers.found[index]] for index in (1, 2)] == [[4] * 4, [5] * 4]
    assert all((numpy(variable) == 5).all() for variable in model.trainable_weights)
    assert int(numpy(model.optimizer.iterations)) == 2
    assert (numpy(model.layers[1].moving_mean) != 0).all()
    assert len(warned()) == (0 if overwrite is None else 1)
    assert all("ema_overwrite_frequency=2" in message for message in warned())


def fit_beside(silent, waiting, make, *, before, optimizer="sgd"):
    """Fit three epochs with another callback before or after this one; give the weights found and the aggregates."""
    model = make_model(optimizer=optimizer, **QUICK)
    layers = [filled(model, value) for value in (2, -3, 5)]
    answers = Answers(silent, layers)
    mine = BranchKeyCallback(waiting, timeout_s=20)
    order = [make(), mine] if before else [mine, make()]
    model.fit(*data(), epochs=3, batch_size=10, verbose=0, validation_data=data(9), callbacks=[*order, answers])
    found = [{float(value) for array in weights for value in array.ravel()} for weights in answers.found]
    return [values == {value} for values, value in zip(found[1:], (2, -3, 5))]


def stopping():
    return keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)


def test_early_stopping_keeps_the_aggregate_when_it_stands_before(silent, waiting, warned):
    assert fit_beside(silent, waiting, stopping, before=True) == [True] * 3
    assert warned() == []


def test_early_stopping_after_this_one_is_warned_of_because_it_undoes_the_last_aggregate(silent, waiting, warned):
    assert fit_beside(silent, waiting, stopping, before=False) == [True, True, False]
    assert [re.sub(r"\s+", " ", message) for message in warned()] == [
        "EarlyStopping stands after BranchKeyCallback, so at the end of fit its best weights replace the last aggregate. "
        "Put it before: callbacks=[EarlyStopping(...), BranchKeyCallback(...)]"
    ]


def averaging():
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)


def test_swapped_averages_are_sent_and_aggregates_kept_when_the_swap_stands_before(silent, waiting, warned):
    def swap():
        return keras.callbacks.SwapEMAWeights(swap_on_epoch=True)

    assert fit_beside(silent, waiting, swap, before=True, optimizer=averaging()) == [True] * 3
    assert warned() == []


def test_a_swap_after_this_one_is_warned_of_because_it_undoes_aggregates(silent, waiting, warned):
    def swap():
        return keras.callbacks.SwapEMAWeights(swap_on_epoch=True)

    assert fit_beside(silent, waiting, swap, before=False, optimizer=averaging())[:2] == [False, False]
    assert len(warned()) == 1
    assert "SwapEMAWeights stands after BranchKeyCallback" in warned()[0]
    assert "callbacks=[SwapEMAWeights(...), BranchKeyCallback(...)]" in warned()[0]


@pytest.mark.parametrize("before", [True, False])
def test_a_swap_for_validation_only_is_warned_of_because_its_score_is_of_other_weights(silent, waiting, warned, before):
    assert fit_beside(
        silent, waiting, keras.callbacks.SwapEMAWeights, before=before, optimizer=averaging()
    ) == [True] * 3  # fmt: skip
    assert len(warned()) == 1
    assert "Pass swap_on_epoch=True, before BranchKeyCallback" in warned()[0]


def test_a_swap_that_was_in_a_fit_before_is_warned_of(silent, waiting, warned):
    model = make_model(optimizer=averaging(), **QUICK)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    answers = Answers(silent, [filled(model, 2)])
    callbacks = [swap, BranchKeyCallback(waiting, timeout_s=20), answers]
    model.fit(*data(), verbose=0, callbacks=callbacks)
    assert warned() == []
    assert {float(value) for array in answers.found[-1] for value in array.ravel()} == {2}
    model.fit(*data(), verbose=0, callbacks=callbacks)
    assert {float(value) for array in answers.found[-2] for value in array.ravel()} != {2}
    assert ["Make a new one" in message for message in warned()] == [True]


def test_other_callbacks_stand_where_they_like(sandbox, client, warned, tmp_path):
    def others(name):
        return [
            keras.callbacks.EarlyStopping(patience=9),
            keras.callbacks.ReduceLROnPlateau(),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.CSVLogger(tmp_path / f"{name}.csv"),
            keras.callbacks.LambdaCallback(),
        ]

    model = make_model(**QUICK)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    callbacks = [*others("a"), BranchKeyCallback(client), *others("b"), backup]
    model.fit(*data(), epochs=2, verbose=0, validation_data=data(9), callbacks=callbacks)
    assert len(sandbox.uploads) == 2
    assert warned() == []


def test_the_same_leaf_twice_is_refused_before_anything_is_sent(sandbox, client):
    with pytest.raises(ConfigurationError, match=f"leaf {client.leaf_id} twice"):
        make_model().fit(*data(), verbose=0, callbacks=[BranchKeyCallback(client), BranchKeyCallback(client)])
    assert sandbox.uploads == []


def test_a_stopped_run_stops_fit_and_what_is_trained_then_is_not_sent(sandbox, client):
    class Stop(keras.callbacks.Callback):
        epochs = batches = 0

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs += 1
            if epoch == 1:
                sandbox.stop()

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1

    stop, callback = Stop(), BranchKeyCallback(client)
    model = make_model(**QUICK)
    model.fit(*data(), epochs=9, batch_size=4, verbose=0, callbacks=[callback, stop])
    assert callback.last_outcome.status == "stopped"
    assert model.stop_training
    assert (stop.epochs, stop.batches, len(sandbox.uploads)) == (2, 10, 1)


def test_a_run_that_is_stopped_while_an_aggregate_is_awaited_costs_one_batch_and_sends_nothing(silent, waiting):
    class Stop(keras.callbacks.Callback):
        batches = 0

        def on_epoch_end(self, epoch, logs=None):
            silent.stop()

        def on_train_batch_end(self, batch, logs=None):
            self.batches += 1

    stop, callback = Stop(), BranchKeyCallback(waiting, timeout_s=20)
    model = make_model(**QUICK)
    fitted = model.fit(*data(), epochs=9, batch_size=4, verbose=0, callbacks=[callback, stop])
    assert [outcome.status for outcome in callback.history] == ["pending", "stopped"]
    assert (stop.batches, len(silent.uploads)) == (6, 1)
    assert fitted.history["branchkey_status"] == ["stopped", None]
