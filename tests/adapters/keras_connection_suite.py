"""Clients that a function makes when fit begins; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import copy
import gc
import warnings

import keras
import pytest

from branchkey_integrations import Client
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.keras import BranchKeyCallback
from tests.support.keras_models import QUICK, data


def tiny():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse", **QUICK)
    return model


@pytest.fixture
def maker(sandbox):
    """Give a function that makes a client, and the list of those that it made."""
    made = []

    def make():
        made.append(Client(sandbox.credentials[0].to_dict(), host=sandbox.url, quarantine_dir=False))
        return made[-1]

    return make, made


def test_each_fit_makes_a_client_goes_on_counting_and_closes_it(sandbox, maker, tmp_path):
    make, made = maker
    callback = BranchKeyCallback(make, journal=str(tmp_path))
    assert (made, callback.leaf_id, callback.round, callback.history) == ([], None, 0, [])
    model = tiny()
    model.fit(*data(), epochs=2, verbose=0, callbacks=[callback])
    assert [client.is_authenticated for client in made] == [False]
    assert callback.leaf_id == sandbox.credentials[0].id
    model.fit(*data(), verbose=0, callbacks=[callback])
    assert [client.is_authenticated for client in made] == [False, False]
    assert [upload.metadata["custom"]["round"] for upload in sandbox.uploads] == [1, 2, 3]
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 3
    assert (tmp_path / f"{callback.leaf_id}.jsonl").exists()


def test_after_an_error_what_was_made_is_closed_when_the_callback_is_given_up_or_used_again(maker):
    class Fails(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise OSError("power cut")

    make, made = maker
    callback = BranchKeyCallback(make)
    for _ in range(2):
        with pytest.raises(OSError, match="power cut"):
            tiny().fit(*data(), verbose=0, callbacks=[callback, Fails()])
    assert [client.is_authenticated for client in made] == [False, True]
    del callback
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else is given up with it
        gc.collect()
    assert [client.is_authenticated for client in made] == [False, False]


def test_what_was_made_is_closed_when_fit_is_refused_as_it_begins(maker):
    make, made = maker
    model = tiny()
    model.compile(optimizer="adagrad", loss="mse", **QUICK)
    with pytest.raises(ConfigurationError, match="Adagrad"):
        model.fit(*data(), verbose=0, callbacks=[BranchKeyCallback(make, optimizer_state="reset")])
    assert [client.is_authenticated for client in made] == [False]


def test_a_copy_makes_a_client_of_its_own(maker):
    make, made = maker
    first = BranchKeyCallback(make)
    tiny().fit(*data(), verbose=0, callbacks=[first])
    second = copy.deepcopy(first)
    assert (second.leaf_id, second.round) == (None, 0)
    tiny().fit(*data(), verbose=0, callbacks=[second])
    assert len({id(client) for client in made}) == 2
    assert (first.round, second.round) == (1, 1)


def test_a_function_that_makes_something_else_is_told_what_to_make():
    closed = []
    thing = type("Thing", (), {"close": lambda self: closed.append(True)})
    callback = BranchKeyCallback(thing)
    for count in (1, 2):
        with pytest.raises(ConfigurationError, match="or a function that makes one, found Thing"):
            tiny().fit(*data(), verbose=0, callbacks=[callback])
        assert len(closed) == count
