"""The Lightning callback beside callbacks that change what is trained, load weights of their own, save or write down."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from branchkey_integrations.errors import BranchKeyError, LayoutError
from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.lightning_beside import Answer, Look, batches, lone_branch, shifted
from tests.support.lightning_nets import Net, connect, held_out, make_trainer, same, weights

torch.set_num_threads(1)


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


# ---- what is trained changes ----------------------------------------------------------------------------------------


class Backed(Net):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 3)

    def loss(self, batch):
        return (self.layer(self.backbone(batch[0])) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.01)


def thaw():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)


@pytest.mark.parametrize("leaf_first", [True, False])
def test_layers_are_the_same_whatever_is_frozen_when_all_parameters_are_federated(tmp_path, branch, leaf_first):
    leaf, look, model = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Backed()
    answer = Answer(
        branch, lambda number, layers: [np.full(layer.shape, 0.25 * number, np.float32) for layer in layers]
    )
    both = [leaf, thaw()] if leaf_first else [thaw(), leaf]
    before = weights(model.backbone)
    trainer = make_trainer(tmp_path, [*both, answer, look], max_epochs=3)
    trainer.fit(model, batches())
    assert [len(upload.layers) for upload in branch.uploads] == [4, 4, 4]
    # Frozen in the first epoch, so it is sent as it was; trained from the aggregate in the second.
    assert same(branch.uploads[0].layers[2:], before)
    assert same(look.started[1], answer.given[0])
    assert not same(branch.uploads[1].layers[2:], answer.given[0][2:])
    assert same(weights(model), answer.given[2])
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 3


@pytest.mark.parametrize("leaf_first", [True, False])
def test_layers_that_appear_between_rounds_are_refused_by_name_when_the_trainable_ones_are_federated(
    tmp_path, branch, leaf_first
):
    leaf, model = BranchKeyCallback(connect(branch), timeout_s=30, parameters="trainable"), Backed()
    both = [leaf, thaw()] if leaf_first else [thaw(), leaf]
    with pytest.raises(LayoutError, match=r"backbone\.weight") as refused:
        make_trainer(tmp_path, [*both, Answer(branch, shifted)], max_epochs=3).fit(model, batches())
    assert "Keep the model and the selection of parameters" in str(refused.value)
    assert [[layer.shape for layer in upload.layers] for upload in branch.uploads] == [[(1, 3), (1,)]]


class Twins(Net):
    """Two parameters of one shape: nothing but their names tells them apart."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LayerNorm(3)

    def loss(self, batch):
        return (self.layer(batch[0]) - 1).square().mean()


def prune(**options):
    return ModelPruning(
        "l1_unstructured", amount=0.34, parameter_names=["weight"], use_global_unstructured=False, **options
    )


def test_pruning_from_the_first_epoch_on_is_federated_with_its_masks_left_at_home(tmp_path, branch):
    leaf, look, model = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Net()
    answer = Answer(branch, shifted)
    trainer = make_trainer(tmp_path, [prune(make_pruning_permanent=False), leaf, answer, look], max_epochs=2)
    trainer.fit(model, batches())
    assert [[layer.shape for layer in upload.layers] for upload in branch.uploads] == [[(1,), (1, 3)]] * 2
    assert same(look.started[1], answer.given[0])
    assert model.layer.weight_orig.tolist() == [[4.0] * 3]
    assert int(model.layer.weight_mask.sum()) < 3


@pytest.mark.parametrize("order", ["pruning begins after a round was sent", "pruning ends before a round is loaded"])
def test_parameters_that_change_places_never_take_each_others_values(tmp_path, branch, order):
    leaf, model, early = BranchKeyCallback(connect(branch), timeout_s=30), Twins(), order.startswith("pruning begins")
    callbacks = [leaf, prune(), Answer(branch, shifted)] if early else [prune(), leaf, Answer(branch, shifted)]
    with pytest.raises(BranchKeyError, match=r"weight") as refused:
        make_trainer(tmp_path, callbacks).fit(model, batches())
    assert isinstance(refused.value, LayoutError)
    assert 2.0 not in np.concatenate([each.ravel() for each in weights(model)])


# ---- weights from elsewhere, and files ------------------------------------------------------------------------------


class Best(lightning.Callback):
    """What many scripts do: end with the weights of the best checkpoint."""

    def on_train_end(self, trainer, module):
        best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
        module.load_state_dict(best["state_dict"])


@pytest.mark.parametrize("leaf_last", [True, False])
def test_last_callback_that_loads_weights_in_the_end_has_the_last_word(tmp_path, branch, leaf_last):
    leaf, answer, model = BranchKeyCallback(connect(branch), timeout_s=30), Answer(branch, shifted), Net()
    keep = ModelCheckpoint(str(tmp_path / "files"), monitor="val_loss", save_top_k=-1, save_last=True)
    both = [Best(), leaf] if leaf_last else [leaf, Best()]
    trainer = make_trainer(tmp_path, [*both, answer, keep], max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, batches(), held_out())
    assert leaf.last_outcome.status == "applied"
    # The first epoch is the best: the second starts from an aggregate that is far away.
    assert same(weights(model), answer.given[1] if leaf_last else branch.uploads[0].layers)
    last = torch.load(tmp_path / "files" / "last.ckpt", weights_only=True)
    assert same([each.numpy() for each in last["state_dict"].values()], branch.uploads[1].layers)
    assert last["callbacks"]["BranchKeyCallback"]["hook"]["rounds"]["pending"]["upload_id"] == branch.uploads[1].file_id


def test_files_with_weights_only_hold_the_local_weights_and_nothing_of_the_federation(tmp_path, branch):
    leaf, answer = BranchKeyCallback(connect(branch), timeout_s=30), Answer(branch, shifted)
    keep = ModelCheckpoint(str(tmp_path / "files"), save_weights_only=True, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer(tmp_path, [keep, leaf, answer], max_epochs=2, enable_checkpointing=True)
    trainer.fit(Net(), batches())
    for epoch, upload in enumerate(branch.uploads):
        found = torch.load(tmp_path / "files" / f"epoch={epoch}.ckpt", weights_only=True)
        assert "callbacks" not in found
        assert same([each.numpy() for each in found["state_dict"].values()], upload.layers)
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert same([each.numpy() for each in after.values()], answer.given[1])


# ---- loggers and watchers -------------------------------------------------------------------------------------------


class Recorder(Logger):
    """A logger that somebody wrote: it gets plain numbers, under names of its own for each leaf."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "recorder", 0

    def log_hyperparams(self, params, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def test_every_logger_gets_the_rows_of_every_leaf_as_plain_numbers(tmp_path, branch):
    with lone_branch() as second:
        leaves = [
            BranchKeyCallback(connect(branch), timeout_s=30),
            BranchKeyCallback(connect(second), name="b", timeout_s=30, parameters=["*.bias"]),
        ]
        recorder, table = Recorder(), CSVLogger(str(tmp_path))
        answers = [Answer(branch, shifted), Answer(second, shifted)]
        extras = [ModelSummary(max_depth=-1), DeviceStatsMonitor(cpu_stats=False), Timer("00:01:00:00")]
        trainer = make_trainer(tmp_path, [*leaves, *answers, *extras], max_epochs=2, logger=[recorder, table])
        trainer.fit(Net(), batches())
        for prefix, leaf in (("branchkey/", leaves[0]), ("branchkey/b/", leaves[1])):
            rows = [row for _, row in recorder.rows if f"{prefix}round" in row]
            assert [row[f"{prefix}round"] for row in rows] == [1.0, 2.0]
            assert [row[f"{prefix}status"] for row in rows] == [0.0, 0.0]
            sent = [outcome.uploaded_bytes / 1e6 for outcome in leaf.history if outcome.status == "applied"]
            assert [row[f"{prefix}uploaded_mb"] for row in rows] == sent
            # The epoch that each round is of, as in the row that Lightning itself wrote for it.
            assert [row["epoch"] for row in rows] == [0, 1]
            assert all(type(row[name]) is float for row in rows for name in row if name != "epoch")
            with open(Path(table.log_dir) / "metrics.csv", encoding="utf-8") as file:
                written = [row for row in csv.DictReader(file) if row.get(f"{prefix}round")]
            assert [float(row[f"{prefix}round"]) for row in written] == [1.0, 2.0]
            assert [row["epoch"] for row in written] == ["0", "1"]


def test_nothing_is_said_of_averages_where_there_are_none(tmp_path, branch, caplog):
    with caplog.at_level(logging.INFO, "branchkey_integrations.lightning"):
        leaf = BranchKeyCallback(connect(branch), timeout_s=30)
        make_trainer(tmp_path, [leaf, Answer(branch, shifted)]).fit(Net(), batches(), held_out())
    assert "average" not in caplog.text
    assert "left out" not in caplog.text
