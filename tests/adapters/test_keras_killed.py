"""Keras leaves whose processes are killed at random moments go on with BackupAndRestore as if nobody had disturbed them."""

from __future__ import annotations

import multiprocessing
import os
import random

import numpy as np
import pytest

from tests.support.killed_leaf import federate

EPOCHS = 8
KILLS = 6
LEAVES = 2


@pytest.fixture(scope="module")
def context():
    # Its server has Keras imported, so that a process starts in a moment. The torch backend, since JAX must not be forked.
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.support.keras_killed"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KERAS_BACKEND", "torch")
        multiprocessing.forkserver.ensure_running()
    yield made
    multiprocessing.forkserver._forkserver._stop()


def train(*arguments):
    os.environ["KERAS_BACKEND"] = "torch"
    from tests.support import keras_killed

    keras_killed.train(*arguments)


def test_kills_at_random_moments_change_neither_the_weights_nor_the_number_of_updates(context, tmp_path):
    calm, counts, rounds = federate(context, train, tmp_path / "undisturbed", EPOCHS, [[]] * LEAVES)
    assert (counts, rounds) == ([EPOCHS] * LEAVES, EPOCHS)
    chosen = random.Random(3)
    # A round notes five lines or so, and after the last kill a leaf must have something left to do.
    lines = [sorted(chosen.sample(range(1, 5 * EPOCHS - 10), KILLS // LEAVES)) for _ in range(LEAVES)]
    kills = [[(line, chosen.uniform(0, 0.03)) for line in each] for each in lines]
    leaves, counts, rounds = federate(context, train, tmp_path / "killed", EPOCHS, kills)
    assert sum(leaf.kills for leaf in leaves) == KILLS
    assert (counts, rounds) == ([EPOCHS] * LEAVES, EPOCHS)
    with np.load(calm[0].folder / "weights.npz") as wanted:
        for leaf in leaves:
            with np.load(leaf.folder / "weights.npz") as found:
                assert sorted(found) == sorted(wanted)
                for name in wanted:
                    np.testing.assert_array_equal(found[name], wanted[name])
