"""The Lightning callback beside callbacks that keep a moving average of the weights, which Lightning has from 2.6 on."""

from __future__ import annotations

import importlib
import json
import logging

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.lightning.averages import tell_of_averages
from tests.support.lightning_beside import Answer, Look, batches, lone_branch, near, shifted
from tests.support.lightning_nets import Net, connect, data, held_out, make_trainer, same, weights

torch.set_num_threads(1)


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


def sent_metrics(branch):
    return [json.loads(metric["data"]) for metric in branch.metrics]


def test_moving_average_stays_at_home_and_so_do_its_scores(tmp_path, branch, caplog):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    answer, look, model = Answer(branch, shifted), Look(), Net()
    average = EMAWeightAveraging(decay=0.5)
    trainer = make_trainer(tmp_path, [average, leaf, answer, look], max_epochs=2)
    trainer.fit(model, batches(), held_out())
    # What is trained on is sent; what was validated is the average, so that score is not the update's.
    assert all(not near(upload.layers, seen, 1e-4) for upload, seen in zip(branch.uploads, look.validated))
    assert [sorted(metrics) for metrics in sent_metrics(branch)] == [["train_loss"]] * 2
    assert "val_loss" in caplog.text
    assert caplog.text.count("other weights") == 1
    assert same(look.started[1], answer.given[0])
    # Named last, the leaf has the last word; the average is in the checkpoints.
    assert same(weights(model), answer.given[1])


def test_moving_average_behind_the_leaf_has_the_last_word_and_a_warning_says_so(tmp_path, branch, caplog):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30)
    answer, look, model = Answer(branch, shifted), Look(), Net()
    make_trainer(tmp_path, [leaf, EMAWeightAveraging(decay=0.5), answer, look], max_epochs=2).fit(model, batches())
    assert leaf.last_outcome.status == "applied"
    # Halved with each of the three steps of the second epoch, what the first left is an eighth.
    assert not near(weights(model), answer.given[1], 0.1)
    assert "Put BranchKeyCallback behind EMAWeightAveraging" in caplog.text


@pytest.mark.parametrize("flavour", ["lightning.pytorch", "pytorch_lightning"])
def test_averages_of_both_flavours_are_known(branch, flavour, caplog):
    callbacks = importlib.import_module(f"{flavour}.callbacks")
    leaf = BranchKeyCallback(connect(branch))
    moving, stochastic = callbacks.EMAWeightAveraging(), callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    with caplog.at_level(logging.INFO, "branchkey_integrations.lightning"):
        tell_of_averages([moving, leaf, stochastic], leaf)
        tell_of_averages([stochastic, leaf, moving], leaf)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "INFO", "WARNING", "WARNING"]
    assert "checkpoints hold the average of EMAWeightAveraging" in caplog.text


def test_no_score_of_an_aggregate_is_monitored_where_files_hold_an_average(tmp_path):
    def never():
        raise AssertionError("connected")

    keep = ModelCheckpoint(str(tmp_path / "files"), monitor="branchkey/aggregate/val_loss")
    callbacks = [BranchKeyCallback(never, evaluate_aggregate=True), keep, EMAWeightAveraging()]
    trainer = make_trainer(tmp_path, callbacks, enable_checkpointing=True)
    with pytest.raises(ConfigurationError, match="average into checkpoints, found WeightAveraging"):
        trainer.fit(Net(), data(), held_out())
