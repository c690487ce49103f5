"""Leaves whose processes are killed at random moments and started again end as leaves that nobody disturbed."""

from __future__ import annotations

import multiprocessing
import random

import pytest
import torch

from tests.support import lightning_killed
from tests.support.killed_leaf import federate

EPOCHS = 10
KILLS = 10
LEAVES = 2


@pytest.fixture(scope="module")
def context():
    # Its server has Lightning imported, so that a process starts in a moment.
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.support.lightning_killed"])
    yield made
    multiprocessing.forkserver._forkserver._stop()


def test_ten_kills_at_random_moments_change_neither_the_weights_nor_the_number_of_updates(context, tmp_path):
    train = lightning_killed.train
    calm, counts, rounds = federate(context, train, tmp_path / "undisturbed", EPOCHS, [[]] * LEAVES)
    assert (counts, rounds) == ([EPOCHS] * LEAVES, EPOCHS)
    chosen = random.Random(7)
    # A round notes five lines or so, and after the last kill a leaf must have something left to do.
    lines = [sorted(chosen.sample(range(1, 5 * EPOCHS - 10), KILLS // LEAVES)) for _ in range(LEAVES)]
    kills = [[(line, chosen.uniform(0, 0.03)) for line in each] for each in lines]
    leaves, counts, rounds = federate(context, train, tmp_path / "killed", EPOCHS, kills)
    assert sum(leaf.kills for leaf in leaves) == KILLS
    assert (counts, rounds) == ([EPOCHS] * LEAVES, EPOCHS)
    wanted = torch.load(calm[0].folder / "weights.pt", weights_only=True)
    for leaf in leaves:
        found = torch.load(leaf.folder / "weights.pt", weights_only=True)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
