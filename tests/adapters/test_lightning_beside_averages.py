"""The Lightning callback beside callbacks that average weights or stop by a metric."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import nn

from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.lightning.scores import Scores
from tests.support.lightning_beside import Answer, Look, batches, lone_branch, mean, near, shifted
from tests.support.lightning_nets import Net, connect, held_out, make_trainer, same, weights

torch.set_num_threads(1)


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


class NormNet(Net):
    """With statistics that StochasticWeightAveraging must gather anew."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def loss(self, batch):
        return (self.layer(self.norm(batch[0])) - 1).square().mean()


def sent_metrics(branch):
    return [json.loads(metric["data"]) for metric in branch.metrics]


def test_early_stopping_judges_the_local_weights_and_keeps_its_count_over_aggregates(tmp_path, branch):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    stop = EarlyStopping("val_loss", patience=2, min_delta=0.0)
    look = Look()
    answer = Answer(branch, lambda number, layers: [np.full(layer.shape, number, layer.dtype) for layer in layers])
    trainer = make_trainer(tmp_path, [stop, leaf, answer, look], max_epochs=20)
    trainer.fit(Net(), batches(), held_out())
    # Worse each time, because each aggregate is farther away: the first epoch is the best, and two more are borne.
    model = Net()
    scores = []
    for upload in branch.uploads:
        weight, bias = map(torch.tensor, upload.layers)
        model.load_state_dict({"layer.weight": weight, "layer.bias": bias})
        with torch.no_grad():
            scores.append(float(model.loss((torch.ones(4, 3),))))
    assert len(scores) == 3
    assert scores == sorted(scores)
    assert float(stop.best_score) == pytest.approx(scores[0], rel=1e-6)
    assert (stop.wait_count, stop.stopped_epoch) == (2, 2)
    assert [round(metrics["val_loss"], 5) for metrics in sent_metrics(branch)] == [round(score, 5) for score in scores]
    # The round of the epoch in which it stopped is loaded all the same.
    assert same(look.ended, answer.given[2])


# ---- StochasticWeightAveraging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Net, NormNet], ids=["plain", "batchnorm"])
def test_stochastic_averaging_behind_the_leaf_averages_aggregates_and_adds_no_round(tmp_path, branch, kind, caplog):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    answer, look, model = Answer(branch, shifted), Look(), kind()
    start = weights(model)
    with caplog.at_level(logging.INFO, "branchkey_integrations"):
        make_trainer(tmp_path, [leaf, average, answer, look], max_epochs=3).fit(model, batches(), held_out())
    # The pass that only gathers statistics trains nothing, so it is no round.
    assert [upload.weighting for upload in branch.uploads] == [18.0] * 3
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 3
    assert near(weights(model), mean([start, answer.given[0], answer.given[1]]))
    assert "ends with the average of StochasticWeightAveraging" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    if kind is NormNet:
        rows = torch.cat([batch[0] for batch in batches()])
        expected = torch.stack([batch[0].mean(0) for batch in batches()]).mean(0)
        assert len(rows) == 18
        torch.testing.assert_close(model.norm.running_mean, expected)
        assert model.norm.momentum == 0.1


@pytest.mark.parametrize("kind", [Net, NormNet], ids=["plain", "batchnorm"])
def test_stochastic_averaging_before_the_leaf_is_warned_of_and_the_last_aggregate_stays(tmp_path, branch, kind, caplog):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    answer, model = Answer(branch, shifted), kind()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    make_trainer(tmp_path, [average, leaf, answer], max_epochs=3).fit(model, batches())
    assert len(branch.uploads) == 3
    assert same(weights(model), answer.given[2])
    assert "Put BranchKeyCallback before StochasticWeightAveraging" in caplog.text


def test_weights_are_told_apart_by_any_change_in_any_precision():
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        large, small = torch.ones(5_000_000, dtype=kind), torch.ones((), dtype=kind)
        scores = Scores()
        scores.open([large, small], {"old": torch.tensor(1.0)})
        scores.close({"old": torch.tensor(2.0), "new": 3.0})
        assert scores.of_other_weights([large, small], {"old": 2.0, "new": 3.0, "other": 1.0}) == set()
        # The next number in bfloat16, which a sum in single precision would lose.
        large.data[-1] = 1.0078125
        assert scores.of_other_weights([large, small], {"old": 2.0, "new": 3.0, "other": 1.0}) == {"old", "new"}
        # A value that training has logged since under the same name is training's.
        assert scores.of_other_weights([large, small], {"new": 4.0}) == set()


def test_scores_of_weights_that_were_trained_on_since_are_not_sent(tmp_path, branch):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    trainer = make_trainer(tmp_path, [leaf, Answer(branch, shifted)], max_epochs=1, val_check_interval=2)
    trainer.fit(Net(), batches(), held_out())
    aligned = make_trainer(tmp_path, [leaf, Answer(branch, shifted)], max_epochs=1, val_check_interval=1)
    aligned.fit(Net(), batches(), held_out())
    assert [sorted(metrics) for metrics in sent_metrics(branch)] == [["train_loss"], ["train_loss", "val_loss"]]
