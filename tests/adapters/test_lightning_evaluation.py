"""Scoring an aggregate leaves no trace: a fit with it is, bit by bit and word by word, the fit without it."""

from __future__ import annotations

import random
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.lightning_beside import Answer, lone_branch, shifted
from tests.support.lightning_nets import Rows, connect, make_trainer, same, weights

torch.set_num_threads(1)

EPOCHS = 3


class Busy(lightning.LightningModule):
    """Draws random numbers everywhere, keeps metrics and statistics, and is not careful about modes."""

    def __init__(self, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=True), nn.Dropout(0.5))
        self.head, self.frozen = nn.Linear(4, 1), nn.Dropout(0.5).eval()
        self.mean, self.least = torchmetrics.MeanMetric(), torchmetrics.MinMetric()
        self.together = torchmetrics.MetricCollection(
            [torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()]
        )
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.fails_at, self.validations, self.noise, self.asked = fails_at, 0, [], 0

    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=6, shuffle=True)

    def val_dataloader(self):
        self.asked += 1
        rows = TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(2)))
        return DataLoader(rows, 4, shuffle=True, generator=self.generator)

    def loss(self, batch):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        if self.training:
            self.noise.append(noise)
        return (self.frozen(self.head(self.net(batch[0]))) - 1 + 0.01 * noise).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.mean.update(loss)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=1)
        return loss

    def on_validation_model_train(self):
        self.train()
        self.frozen.eval()

    def validation_step(self, batch, index):
        loss = self.loss(batch)
        self.calls += 1
        self.mean.update(loss)
        self.together.update(loss.reshape(1), torch.zeros(1))
        self.least.update(loss)
        self.log("val_loss", loss, prog_bar=True, batch_size=1)
        # A module that writes pictures takes it for granted that its logger has an experiment.
        self.logger.experiment.log_metrics({"picture": loss}, step=self.global_step)

    def on_validation_epoch_end(self):
        self.validations += 1
        if self.validations == self.fails_at:
            raise KeyError("no space left")
        # Over all validations of the fit: one more would be counted too.
        self.log("least", self.least.compute())
        self.log_dict(self.together.compute())

    def on_train_epoch_end(self):
        self.log("mean", self.mean.compute())
        self.mean.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Diary(lightning.Callback):
    """Write down each hook that is called, and what the Trainer says of itself."""

    def __init__(self):
        self.pages = []

    def note(self, hook, trainer, module, *_):
        modes = "".join("t" if part.training else "e" for part in module.modules())
        metrics = sorted(name for name in trainer.callback_metrics if not name.startswith("branchkey/"))
        self.pages.append((hook, trainer.state.fn, trainer.state.stage, trainer.global_step, modes, metrics))

    def on_train_epoch_start(self, trainer, module):
        self.note("epoch", trainer, module)
        assert trainer.training
        assert [type(logger) for logger in trainer.loggers] == [CSVLogger]
        assert self in trainer.callbacks
        self.pages.append({name: value for name, value in trainer.progress_bar_metrics.items() if name[:2] != "bk"})
        self.pages.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.pages.append([int(module.calls), float(module.least.min_value), module.least.update_called])

    def on_train_end(self, trainer, module):
        self.on_train_epoch_start(trainer, module)


for _hook in ("batch_start", "batch_end", "epoch_start", "epoch_end", "start", "end"):
    setattr(
        Diary,
        f"on_validation_{_hook}",
        lambda self, trainer, module, *_, _hook=_hook: self.note(_hook, trainer, module),
    )


def fit(folder, evaluate, fails_at=None, **options):
    random.seed(1)
    np.random.seed(1)
    model = Busy(fails_at)
    with lone_branch() as branch:
        diary, stop = Diary(), EarlyStopping("val_loss", patience=2)
        keep = ModelCheckpoint(str(folder / "files"), monitor="val_loss", save_top_k=-1)
        leaf = BranchKeyCallback(connect(branch), timeout_s=30, evaluate_aggregate=evaluate)
        logger = CSVLogger(str(folder))
        # Aggregates get worse and worse: EarlyStopping would end the fit if it heard of them.
        trainer = make_trainer(
            folder,
            [leaf, Answer(branch, shifted), diary, stop, keep],
            max_epochs=EPOCHS,
            logger=logger,
            enable_checkpointing=True,
            log_every_n_steps=1,
            **options,
        )
        try:
            trainer.fit(model)
            error = None
        except KeyError as caught:
            error = str(caught)
        logger.finalize("success")
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    return {
        "model": model,
        "diary": diary,
        "stop": stop,
        "trainer": trainer,
        "error": error,
        "files": sorted(path.name for path in (folder / "files").iterdir()),
        "rows": rows,
        "next": (random.random(), np.random.rand(), float(torch.rand(())), model.generator.get_state().tolist()),
    }


@pytest.fixture(
    scope="module",
    params=[{"reload_dataloaders_every_n_epochs": 1}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}],
    ids=["each", "second"],
)
def both(tmp_path_factory, request):
    """The same fit twice, without and with scored aggregates; validation after each epoch, or after each second one."""
    return [fit(tmp_path_factory.mktemp("fit"), evaluate, **request.param) for evaluate in (False, True)]


def test_training_goes_the_same_way_to_the_last_bit(both):
    without, with_scores = (each["model"] for each in both)
    assert same(weights(without), weights(with_scores))
    assert without.noise == with_scores.noise
    assert [value.tolist() for value in without.buffers()] == [value.tolist() for value in with_scores.buffers()]
    assert both[0]["next"] == both[1]["next"]
    assert without.asked == with_scores.asked


def test_no_callback_hears_of_it_and_the_trainer_shows_no_trace(both):
    without, with_scores = both
    assert without["diary"].pages == with_scores["diary"].pages
    assert without["stop"].state_dict() == with_scores["stop"].state_dict()
    assert without["trainer"].current_epoch == with_scores["trainer"].current_epoch
    assert without["files"] == with_scores["files"]
    mine = {name: float(value) for name, value in with_scores["trainer"].callback_metrics.items()}
    theirs = {name: float(value) for name, value in without["trainer"].callback_metrics.items()}
    assert {name: value for name, value in mine.items() if not name.startswith("branchkey/")} == theirs
    assert "branchkey/aggregate/val_loss" in mine


def test_metrics_that_add_up_over_the_fit_count_its_own_validations_only(both):
    without, with_scores = (each["model"] for each in both)
    # The sanity check and three epochs; or the second one of three epochs alone.
    assert without.validations == {1: 4, 2: 1}[both[0]["trainer"].check_val_every_n_epoch]
    assert with_scores.validations == without.validations + EPOCHS
    assert float(without.least.compute()) == float(with_scores.least.compute())
    assert without.together.compute() == with_scores.together.compute()


def test_loggers_get_the_scores_and_otherwise_the_same_lines(both):
    def table(rows):
        head = rows[0].split(",")
        lines = [dict(zip(head, row.split(","))) for row in rows[1:]]
        # Waiting takes another time each time.
        return [{k: v for k, v in line.items() if v and "aggregate" not in k and "wait_s" not in k} for line in lines]

    without, with_scores = (table(each["rows"]) for each in both)
    assert [line for line in with_scores if set(line) != {"step", "epoch"}] == without
    scored = [line for line in with_scores if set(line) == {"step", "epoch"}]
    assert [line["epoch"] for line in scored] == [str(epoch) for epoch in range(EPOCHS)]
    columns = [name for name in both[1]["rows"][0].split(",") if name.startswith("branchkey/aggregate/")]
    assert columns == [
        f"branchkey/aggregate/{name}" for name in sorted(["val_loss", "least", "MeanSquaredError", "MeanAbsoluteError"])
    ]


def test_a_validation_that_fails_leaves_the_trainer_with_its_callbacks_and_loggers(tmp_path):
    # The sanity check is the first, the fit's own the second, that of the aggregate the third.
    broken = fit(tmp_path, True, fails_at=3)
    trainer = broken["trainer"]
    assert broken["error"] == "'no space left'"
    assert [type(logger) for logger in trainer.loggers] == [CSVLogger]
    assert broken["diary"] in trainer.callbacks
    assert trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed > 0
    assert [each.training for each in broken["model"].modules()].count(False) == 1
