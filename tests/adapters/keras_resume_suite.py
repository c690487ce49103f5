"""A fit that ended in the middle goes on with BackupAndRestore; run on every backend by test_keras_backends.py."""

from __future__ import annotations

import json
import os

import keras
import numpy as np
import pytest

from branchkey_integrations import Client
from branchkey_integrations.keras import BranchKeyCallback
from tests.support.halving import Halving
from tests.support.keras_models import numpy

EPOCHS = 4


class Crash(keras.callbacks.Callback):
    """End the fit by an error in one of its hooks."""

    def __init__(self, hook, epoch):
        super().__init__()
        self.hook, self.epoch = hook, epoch

    def on_epoch_begin(self, epoch, logs=None):
        self._fail("begin", epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._fail("end", epoch)

    def _fail(self, hook, epoch):
        if (self.hook, self.epoch) == (hook, epoch):
            raise RuntimeError("crash")


def fit(branch, folder, crash=None, **options):
    """Train as one process would: a model, a client and callbacks of its own."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    x = np.random.default_rng(1).normal(size=(12, 3)).astype("f4")
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    with Client(branch.credentials[0].to_dict(), branch.url, output_dir=folder / "out") as client:
        ours = BranchKeyCallback(client, timeout_s=20, **options)
        callbacks = [ours, backup, *([Crash(*crash)] if crash else [])]
        training = {"epochs": EPOCHS, "batch_size": 4, "verbose": 0, "shuffle": False}
        if crash:
            with pytest.raises(RuntimeError, match="crash"):
                model.fit(x, x.sum(1), callbacks=callbacks, **training)
        else:
            model.fit(x, x.sum(1), callbacks=callbacks, **training)
    return [numpy(weight) for weight in model.weights], ours


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with Halving() as branch:
        weights, _ = fit(branch, tmp_path_factory.mktemp("undisturbed"))
        assert len(branch.uploads) == EPOCHS
    return weights


def same(some, others):
    return len(some) == len(others) and all(np.array_equal(one, two) for one, two in zip(some, others))


@pytest.mark.parametrize("crash", [("end", 0), ("begin", 1), ("end", 2), ("end", EPOCHS - 1)])
def test_a_fit_that_crashed_goes_on_without_a_second_upload_and_without_missing_an_aggregate(
    tmp_path, undisturbed, crash
):
    with Halving() as branch:
        fit(branch, tmp_path, crash)
        weights, callback = fit(branch, tmp_path)
        assert [upload.metadata["custom"]["round"] for upload in branch.uploads] == [1, 2, 3, 4]
        assert callback.round == EPOCHS
    assert same(weights, undisturbed)


def test_what_is_kept_lies_beside_the_backup_in_plain_json_without_secrets(tmp_path):
    with Halving() as branch:
        fit(branch, tmp_path, ("end", 1))
        folder = tmp_path / "backup-branchkey"
        leaf = branch.credentials[0]
        # The lock of the journal stays, as it must.
        assert {*os.listdir(folder)} - {f"{leaf.id}.lock"} == {f"{leaf.id}.epochs.json", f"{leaf.id}.jsonl"}
        text = (folder / f"{leaf.id}.epochs.json").read_text()
        state = json.loads(text)
        assert sorted(state) == ["1", "2"]
        assert state["2"]["rounds"]["pending"]["round"] == 2
        assert leaf.to_dict()["session_token"] not in text
        fit(branch, tmp_path)
        assert not (tmp_path / "backup").exists()
        assert sorted(json.loads((folder / f"{leaf.id}.epochs.json").read_text())) == ["1", "2", "3", "4"]


def test_a_fit_that_was_over_but_for_its_last_aggregate_loads_it_without_training(tmp_path, undisturbed):
    with Halving() as branch:
        fit(branch, tmp_path, ("end", EPOCHS - 1))
        weights, callback = fit(branch, tmp_path)
        assert callback.last_outcome.status == "applied"
        assert callback.last_outcome.round == EPOCHS
        assert same(weights, undisturbed)


def test_without_a_backup_nothing_is_kept(sandbox, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((4, 3), "f4"), np.ones(4, "f4"), verbose=0, callbacks=[BranchKeyCallback(client)])
    assert os.listdir(tmp_path) == []


def test_weights_that_are_loaded_after_a_fit_that_ended_are_not_overwritten_by_its_last_aggregate(tmp_path):
    with Halving() as branch:
        fit(branch, tmp_path)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
        model.layers[-1].bias.assign([7.0])
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: seen.append(numpy(model.layers[-1].bias).tolist())
        )
        with Client(branch.credentials[0].to_dict(), branch.url, output_dir=tmp_path / "out") as client:
            callback = BranchKeyCallback(client, journal=tmp_path / "backup-branchkey", timeout_s=20)
            model.fit(
                np.ones((4, 3), "f4"), np.ones(4, "f4"), verbose=0,
                initial_epoch=EPOCHS, epochs=EPOCHS + 1, callbacks=[callback, look],
            )  # fmt: skip
        assert seen == [[7.0]]
        assert callback.round == EPOCHS + 1


def test_a_fit_that_begins_anew_forgets_what_was_kept(tmp_path):
    with Halving() as branch:
        fit(branch, tmp_path, ("end", 1))
        for name in os.listdir(tmp_path / "backup"):
            os.unlink(tmp_path / "backup" / name)
        fit(branch, tmp_path)
        # Its first update still waited for the aggregate, so it counts as the first of the new fit.
        assert [upload.metadata["custom"]["round"] for upload in branch.uploads] == [1, 2, 2, 3, 4]


def test_a_journal_of_its_own_folder_serves_a_script_that_gives_initial_epoch(sandbox, tmp_path):
    def run(first, last):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", jit_compile=False)
        with Client(sandbox.credentials[0].to_dict(), sandbox.url) as client:
            callback = BranchKeyCallback(client, journal=tmp_path, timeout_s=20)
            crash = [Crash("end", last)]
            with pytest.raises(RuntimeError, match="crash"):
                model.fit(
                    np.ones((4, 3), "f4"),
                    np.ones(4, "f4"),
                    initial_epoch=first,
                    epochs=9,
                    verbose=0,
                    callbacks=[callback, *crash],
                )
        return callback

    assert run(0, 1).round == 2
    assert run(2, 2).round == 3
    assert [upload.metadata["custom"]["round"] for upload in sandbox.uploads] == [1, 2, 3]


def test_a_backup_that_stands_before_is_warned_of(sandbox, client, warned, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model.fit(np.ones((4, 3), "f4"), np.ones(4, "f4"), verbose=0, callbacks=[backup, BranchKeyCallback(client)])
    assert ["BackupAndRestore stands before" in message for message in warned()] == [True]
