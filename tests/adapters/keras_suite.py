"""Rounds inside fit; run on every backend by test_keras_backends.py, with KERAS_BACKEND set."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras import BranchKeyCallback, KerasParameters
from tests.support.keras_models import data, make_model, numpy


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
    assert {name for name in fitted.history if not name.startswith("branchkey_")} == set(logs_seen[0])
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 3
    assert callback.last_outcome.aggregation_id == sandbox.aggregates[-1]
    assert callback.round == 3


def test_every_nth_epoch_makes_a_round_of_all_samples_since_the_last(sandbox, client):
    make_model().fit(*data(), epochs=5, verbose=0, callbacks=[BranchKeyCallback(client, every_n_epochs=2)])
    assert [upload.weighting for upload in sandbox.uploads] == [40.0, 40.0]


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
