"""Checkpoint files tell the truth: each is loaded, scored again, and gets the number in its name."""

from __future__ import annotations

import json
import pickle
import types
from datetime import timedelta

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback, checkpoints
from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_files import partner, rescored, score_in_name
from tests.support.lightning_nets import PLAIN_ONLY, Net, connect, data, held_out, make_trainer, same, weights

torch.set_num_threads(1)

EPOCHS = 4
AGGREGATE = "branchkey/aggregate/val_loss"


def keep(folder, monitor="val_loss", **options):
    """A checkpoint callback that keeps every file, with the score in its name."""
    return ModelCheckpoint(
        str(folder),
        monitor=monitor,
        save_top_k=-1,
        filename=f"{{step}}-{{{monitor}:.8f}}",
        auto_insert_metric_name=False,
        **options,
    )


def files(folder):
    """Checkpoint files in the order of the steps they were made after."""
    return sorted(folder.iterdir(), key=lambda path: int(path.stem.split("-")[0]))


def fit(folder, callbacks, branch, rounds=EPOCHS, **options):
    model = Net()
    settings = {"max_epochs": rounds, "enable_checkpointing": True, **options}
    with partner(branch, rounds):
        make_trainer(folder, callbacks, **settings).fit(model, data(), held_out())
    return model


# An epoch has five batches, so validation at every second one leaves the last batch unscored.
@pytest.mark.parametrize(
    ("saving", "training", "steps"),
    [
        ({}, {}, [5, 10, 15, 20]),
        ({"save_on_train_epoch_end": False}, {}, [5, 10, 15, 20]),
        ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}, [7, 12, 17]),
        ({}, {"val_check_interval": 0.5}, [2, 4, 7, 9, 12, 14, 17, 19]),
        ({"every_n_train_steps": 3}, {"val_check_interval": 0.5}, [4, 7, 9, 12, 17, 19]),
        ({"every_n_train_steps": 1}, {}, [5, 10, 15, 20]),
        ({"train_time_interval": timedelta(microseconds=1)}, {}, [5, 10, 15, 20]),
        ({"train_time_interval": timedelta(microseconds=1)}, {"val_check_interval": 0.5}, [2, 4, 7, 9, 12, 14, 17, 19]),
        ({}, {"check_val_every_n_epoch": 2}, [10, 20]),
        ({"save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2}, [10, 20]),
        ({"every_n_epochs": 2}, {"accumulate_grad_batches": 2}, [6, 12]),
    ],
    ids=lambda value: ",".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, dict) else "",
)
def test_every_file_holds_the_weights_that_had_the_score_in_its_name(tmp_path, saving, training, steps):
    with Sandbox(leaves=2) as branch:
        best = keep(tmp_path / "best", **saving)
        callback = BranchKeyCallback(connect(branch), timeout_s=60)
        model = fit(tmp_path, [callback, best], branch, **training)
        assert [int(path.stem.split("-")[0]) for path in files(tmp_path / "best")] == steps
        for path in files(tmp_path / "best"):
            assert rescored(path)[0] == pytest.approx(score_in_name(path, "-"), abs=1e-6)
        # None of them is an aggregate, and the model ends with one.
        assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * EPOCHS
        assert same(weights(model), branch.aggregate(branch.aggregates[-1]))


def test_a_save_by_the_clock_is_made_when_the_clock_that_was_asked_about_the_score_says_so(tmp_path, monkeypatch):
    # Lightning's own clock says at each batch that it is time; ours leaps once, before the third epoch's third batch is over.
    hours = iter([0.0] * 12 + [1e12] * 100)
    monkeypatch.setattr(checkpoints, "time", types.SimpleNamespace(monotonic=lambda: next(hours)))
    keeps = keep(tmp_path / "best", train_time_interval=timedelta(microseconds=1))
    with Sandbox(leaves=2) as branch:
        fit(tmp_path, [BranchKeyCallback(connect(branch), timeout_s=60), keeps], branch)
    (path,) = files(tmp_path / "best")
    assert path.stem.startswith("15-")
    assert rescored(path)[0] == pytest.approx(score_in_name(path, "-"), abs=1e-6)


def test_a_put_off_save_is_told_of_once_and_the_callbacks_are_as_before_afterwards(tmp_path, caplog):
    with Sandbox(leaves=2) as branch:
        best = keep(tmp_path / "best", every_n_train_steps=3)
        before = dict(vars(best))
        fit(tmp_path, [BranchKeyCallback(connect(branch), timeout_s=60), best], branch, val_check_interval=0.5)
    told = [
        record.getMessage() for record in caplog.records if "saves after the next validation" in record.getMessage()
    ]
    assert len(told) == 1
    assert "ModelCheckpoint(monitor='val_loss')" in told[0]
    assert not [name for name in vars(best) if name not in before and name.startswith("on_")]


def test_a_score_that_the_module_logs_when_an_epoch_ends_is_not_taken_for_one_of_validation(tmp_path):
    class Means(Net):
        def on_train_epoch_end(self):
            self.log("mean", 10.0 + self.current_epoch)

    with Sandbox(leaves=2) as branch, partner(branch, 3):
        callbacks = [BranchKeyCallback(connect(branch), timeout_s=60), keep(tmp_path / "best", "mean")]
        make_trainer(tmp_path, callbacks, max_epochs=3, enable_checkpointing=True).fit(Means(), data(), held_out())
    names = [path.stem for path in files(tmp_path / "best")]
    assert names == ["5-10.00000000", "10-11.00000000", "15-12.00000000"]


# ---- aggregates that are scored ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A fit whose aggregates were scored, beside one checkpoint callback for local weights and two for aggregates."""
    folder = tmp_path_factory.mktemp("scored")
    with Sandbox(leaves=2) as branch:
        from lightning.pytorch.loggers import CSVLogger

        local, every = keep(folder / "local"), keep(folder / "every", AGGREGATE, mode="max")
        best = ModelCheckpoint(str(folder / "best"), monitor=AGGREGATE, filename="best", save_last=True)
        callback = BranchKeyCallback(connect(branch), timeout_s=60, evaluate_aggregate=True)
        logger = CSVLogger(str(folder))
        seen = []

        class Look(lightning.Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                if index == 0 and trainer.current_epoch:
                    # A strategy that spawns processes pickles the callbacks, and so do copies of a Trainer.
                    held = pickle.loads(
                        pickle.dumps({name: vars(best)[name] for name in vars(best) if name[:3] == "on_"})
                    )
                    seen.append((trainer.callback_metrics[AGGREGATE], sorted(held)))

        model = fit(folder, [callback, Look(), local, every, best], branch, logger=logger)
        yield {
            "folder": folder,
            "branch": branch,
            "aggregates": [branch.aggregate(each) for each in branch.aggregates],
            "best": best,
            "seen": seen,
            "model": model,
            "rows": (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines(),
        }


def loss_of(layers):
    model = Net()
    with torch.no_grad():
        for parameter, layer in zip(model.parameters(), layers):
            parameter.copy_(torch.from_numpy(layer))
        return float(model.loss((torch.ones(4, 3),)))


def test_every_aggregate_gets_a_file_with_its_weights_and_its_score(scored):
    paths = files(scored["folder"] / "every")
    assert len(paths) == len(scored["aggregates"]) == EPOCHS
    for path, layers in zip(paths, scored["aggregates"]):
        score, kept = rescored(path)
        assert same(kept, layers)
        assert score == pytest.approx(score_in_name(path, "-"), abs=1e-6)


def test_local_files_stay_local_and_true_beside_them(scored):
    mine = [each for each in scored["branch"].uploads if each.leaf_id == scored["branch"].credentials[0].id]
    for path, upload in zip(files(scored["folder"] / "local"), mine, strict=True):
        score, kept = rescored(path)
        assert same(kept, upload.layers)
        assert score == pytest.approx(score_in_name(path, "-"), abs=1e-6)


def test_the_best_aggregate_is_kept(scored):
    losses = [loss_of(layers) for layers in scored["aggregates"]]
    least = losses.index(min(losses))
    assert float(scored["best"].best_model_score) == pytest.approx(losses[least], abs=1e-6)
    assert same(rescored(scored["best"].best_model_path)[1], scored["aggregates"][least])
    assert len(list((scored["folder"] / "best").iterdir())) == 2
    last = next(path for path in (scored["folder"] / "best").iterdir() if path.stem == "last")
    assert any(same(rescored(last)[1], layers) for layers in scored["aggregates"])


def test_the_platform_is_told_as_test_which_aggregate_had_which_score(scored):
    branch = scored["branch"]
    told = [(each["aggregation_id"], json.loads(each["data"])) for each in branch.metrics if each["mode"] == "test"]
    assert [identifier for identifier, _ in told] == branch.aggregates
    for (_, metrics), layers in zip(told, scored["aggregates"], strict=True):
        assert metrics == {"val_loss": pytest.approx(loss_of(layers), abs=1e-6)}
    trained = [json.loads(each["data"]) for each in branch.metrics if each["mode"] != "test"]
    assert [sorted(metrics) for metrics in trained] == [["train_loss", "val_loss"]] * EPOCHS


def test_loggers_and_callbacks_hear_of_the_score_and_checkpoint_callbacks_stay_picklable(scored):
    losses = [loss_of(layers) for layers in scored["aggregates"]]
    assert [float(value) for value, _ in scored["seen"]] == pytest.approx(losses[:-1], abs=1e-6)
    assert {len(held) for _, held in scored["seen"]} == {5}
    assert not [name for name in vars(scored["best"]) if name.startswith("on_")]
    column = scored["rows"][0].split(",").index(AGGREGATE)
    assert [float(row.split(",")[column]) for row in scored["rows"][1:] if row.split(",")[column]] == pytest.approx(
        losses, abs=1e-6
    )


def test_a_fit_goes_on_from_the_file_of_an_aggregate_and_sends_no_round_again(scored, tmp_path):
    path = files(scored["folder"] / "every")[1]
    branch = scored["branch"]
    before = len(branch.uploads)
    seen = []

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append((trainer.current_epoch, trainer.global_step, weights(module)))
            trainer.should_stop = True

    callback = BranchKeyCallback(connect(branch), timeout_s=0.2, on_error="keep_local", journal=False)
    trainer = make_trainer(tmp_path, [callback, Look()], max_epochs=EPOCHS)
    trainer.fit(Net(seed=9), data(), held_out(), ckpt_path=str(path), **PLAIN_ONLY)
    assert (seen[0][0], seen[0][1]) == (2, 10)
    assert same(seen[0][2], scored["aggregates"][1])
    mine = [each for each in branch.uploads[before:] if each.leaf_id == branch.credentials[0].id]
    assert [each.weighting for each in mine] == [4.0]
    assert callback.round == 3


# ---- what cannot work is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "checkpoint", "loaders", "found"),
    [
        (
            {"evaluate_aggregate": True},
            None,
            [],
            "evaluate_aggregate: expected a fit that validates, found no validation_step",
        ),
        ({"evaluate_aggregate": True}, {}, [[]], "evaluate_aggregate: .* found validation data without a batch"),
        ({}, {}, None, r"ModelCheckpoint\(monitor='branchkey/aggregate/val_loss'\): expected evaluate_aggregate=True"),
        (
            {"evaluate_aggregate": True},
            {"every_n_train_steps": 2},
            None,
            "expected every_n_epochs, found every_n_train_steps",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_connected(tmp_path, options, checkpoint, loaders, found):
    def never():
        raise AssertionError("connected")

    callbacks = [BranchKeyCallback(never, **options)]
    if checkpoint is not None:
        callbacks.append(ModelCheckpoint(str(tmp_path / "files"), monitor=AGGREGATE, **checkpoint))
    trainer = make_trainer(tmp_path, callbacks, enable_checkpointing=checkpoint is not None)
    with pytest.raises(ConfigurationError, match=found):
        trainer.fit(Net(), data(), *([held_out()] if loaders is None else loaders))
    with pytest.raises(ConfigurationError, match="evaluate_aggregate: expected True or False, found 'yes'"):
        BranchKeyCallback(never, evaluate_aggregate="yes")
