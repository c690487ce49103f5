"""The Lightning callback with a real branch: when it sends, what it loads, and what checkpoints hold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as lightning
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_nets import (
    PLAIN_ONLY,
    Net,
    Rows,
    connect,
    data,
    held_out,
    make_net,
    make_trainer,
    same,
    weights,
)

torch.set_num_threads(1)


@pytest.fixture
def sandbox():
    with Sandbox(leaves=1) as branch:
        yield branch


# ---- names and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", [lightning, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_one_class_serves_the_trainers_of_both_names(tmp_path, sandbox, flavour):
    callback = BranchKeyCallback(connect(sandbox))
    assert isinstance(callback, flavour.Callback)
    trainer = make_trainer(tmp_path, [callback], flavour, max_epochs=2)
    trainer.fit(make_net(flavour)(), data())
    assert len(sandbox.uploads) == 2
    assert [outcome.status for outcome in callback.history] == ["pending", "applied"] * 2
    assert callback.last_outcome.aggregation_id == sandbox.aggregates[-1]


def test_options_are_checked_when_the_callback_is_made(sandbox):
    with pytest.raises(ConfigurationError, match=r"timeout_s"):
        BranchKeyCallback(connect(sandbox), timeout=3)
    with pytest.raises(ConfigurationError, match=r"every_n_epochs: expected a whole number from 1, found 0"):
        BranchKeyCallback(connect(sandbox), every_n_epochs=0)
    with pytest.raises(ConfigurationError, match=r"client: expected .*Client.*found dict"):
        BranchKeyCallback({"id": "x"})


# ---- uploads are training epochs, and nothing else ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "weightings"),
    [
        ({"max_epochs": 2}, [18, 18]),
        ({"val_check_interval": 0.5}, [18]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [18] * 3),
        ({"limit_train_batches": 0}, []),
        ({"limit_train_batches": 2}, [8]),
        ({"fast_dev_run": True}, []),
        ({"max_steps": 2, "max_epochs": 5}, [8]),
        ({"accumulate_grad_batches": 2}, [18]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_there_is_one_upload_for_a_training_epoch_weighted_by_what_was_seen(tmp_path, sandbox, options, weightings):
    callback = BranchKeyCallback(connect(sandbox))
    trainer = make_trainer(tmp_path, [callback], **options)
    trainer.fit(Net(), data(), held_out())
    assert [upload.weighting for upload in sandbox.uploads] == weightings
    assert callback.round == len(weightings)
    sandbox.wait_for(lambda: sandbox.connected == [])


@pytest.mark.parametrize("kind", ["dict", "tensor"])
def test_samples_are_counted_in_every_kind_of_batch(tmp_path, sandbox, kind):
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox))])
    trainer.fit(Net(), data(kind, drop_last=True))
    assert [upload.weighting for upload in sandbox.uploads] == [16.0]


def test_an_epoch_that_is_stopped_in_the_middle_counts_what_it_saw(tmp_path, sandbox):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    make_trainer(tmp_path, [Stop(), BranchKeyCallback(connect(sandbox))], max_epochs=9).fit(Net(), data())
    assert [upload.weighting for upload in sandbox.uploads] == [12.0]


def test_validate_test_and_predict_send_nothing(tmp_path, sandbox):
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox))])
    model = Net()
    trainer.validate(model, held_out(), verbose=False)
    trainer.test(model, held_out(), verbose=False)
    trainer.predict(model, held_out())
    assert (len(sandbox.uploads), sandbox.hits("run")) == (0, 0)


def test_tuners_send_nothing(tmp_path, sandbox):
    from lightning.pytorch.tuner import Tuner

    class Tuned(Net):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return DataLoader(Rows(), batch_size=self.batch_size)

        def val_dataloader(self):
            return held_out()

    model = Tuned()
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox))])
    tuner = Tuner(trainer)
    assert tuner.lr_find(model, num_training=5, update_attr=False) is not None
    tuner.scale_batch_size(model, max_trials=2, steps_per_trial=1)
    assert (len(sandbox.uploads), sandbox.hits("run")) == (0, 0)
    trainer.fit(model)
    assert len(sandbox.uploads) == 1


def test_every_nth_epoch_makes_a_round_and_counts_the_samples_of_all(tmp_path, sandbox):
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox), every_n_epochs=2)], max_epochs=5)
    trainer.fit(Net(), data())
    assert [upload.weighting for upload in sandbox.uploads] == [36.0, 36.0]


def test_a_second_fit_goes_on_counting_rounds(tmp_path, sandbox):
    callback = BranchKeyCallback(connect(sandbox))
    model = Net()
    make_trainer(tmp_path, [callback]).fit(model, data())
    make_trainer(tmp_path, [callback]).fit(model, data())
    assert (callback.round, len(sandbox.uploads)) == (2, 2)


def test_metrics_of_the_sent_weights_go_to_the_platform(tmp_path, sandbox):
    make_trainer(tmp_path, [BranchKeyCallback(connect(sandbox))], max_epochs=2, check_val_every_n_epoch=2).fit(
        Net(), data(), held_out()
    )
    sent = [json.loads(metric["data"]) for metric in sandbox.metrics]
    assert [sorted(metrics) for metrics in sent] == [["train_loss"], ["train_loss", "val_loss"]]


# ---- weights and checkpoints ----------------------------------------------------------------------------------------


def test_two_leaves_end_with_identical_weights_that_are_the_weighted_mean(tmp_path):
    with Sandbox(leaves=2) as branch, ThreadPoolExecutor(2) as pool:
        models = [Net(), Net()]
        callbacks = [BranchKeyCallback(connect(branch, leaf), timeout_s=30) for leaf in range(2)]
        trainers = [
            make_trainer(tmp_path / str(leaf), [callbacks[leaf]], max_epochs=3, limit_train_batches=leaf + 1)
            for leaf in range(2)
        ]
        jobs = [pool.submit(trainers[leaf].fit, models[leaf], data()) for leaf in range(2)]
        for job in jobs:
            job.result(60)
        assert same(weights(models[0]), weights(models[1]))
        last = branch.uploads[-2:]
        assert sorted(upload.weighting for upload in last) == [4.0, 8.0]
        for index, mine in enumerate(weights(models[0])):
            mean = sum(upload.weighting * upload.layers[index].astype(np.float64) for upload in last) / 12
            np.testing.assert_allclose(mine, mean, rtol=1e-6)
        assert [callback.round for callback in callbacks] == [3, 3]


def score(path):
    model = Net()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        return float(model.loss((torch.ones(4, 3),))), weights(model)


def test_a_monitored_checkpoint_holds_exactly_the_weights_that_had_the_score(tmp_path, sandbox):
    class Shift(lightning.Callback):
        """Make the aggregate differ from what was sent: the branch hands out other weights than the mean."""

        def on_train_epoch_end(self, trainer, module):
            number = len(sandbox.uploads)
            sandbox.publish([np.full((1, 3), number, np.float32), np.zeros(1, np.float32)])

    keep = ModelCheckpoint(str(tmp_path / "best"), monitor="val_loss", save_top_k=-1, filename="{epoch}-{val_loss:.8f}")
    callback = BranchKeyCallback(connect(sandbox))
    model = Net()
    make_trainer(tmp_path, [callback, Shift(), keep], max_epochs=3, enable_checkpointing=True).fit(
        model, data(), held_out()
    )
    files = sorted((tmp_path / "best").iterdir())
    assert len(files) == len(sandbox.uploads) == 3
    for path, upload in zip(files, sandbox.uploads):
        found, kept = score(path)
        assert found == pytest.approx(float(path.stem.split("val_loss=")[1]), abs=1e-6)
        assert same(kept, upload.layers)
    # The last round is loaded after all checkpoints.
    assert callback.last_outcome.status == "applied"
    assert same(weights(model), sandbox.aggregate(callback.last_outcome.aggregation_id))


def plain(value):
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return type(value) is list and all(plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def test_a_resumed_run_counts_on_and_applies_no_aggregate_twice(tmp_path, sandbox):
    first = BranchKeyCallback(connect(sandbox))
    trainer = make_trainer(tmp_path, [first], max_epochs=2)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["BranchKeyCallback"]
    assert plain(state)
    assert sandbox.credentials[0].session_token not in repr(state)

    second = BranchKeyCallback(connect(sandbox))
    resumed = make_trainer(tmp_path, [second], max_epochs=3)
    resumed.fit(Net(seed=5), data(), ckpt_path=str(tmp_path / "two.ckpt"), **PLAIN_ONLY)
    assert (second.round, len(sandbox.uploads)) == (3, 3)
    applied = [outcome.aggregation_id for outcome in first.history + second.history if outcome.status == "applied"]
    assert applied == sandbox.aggregates
    assert len(set(applied)) == 3


def test_a_round_that_was_sent_but_not_loaded_is_loaded_after_the_resume_and_not_sent_again(tmp_path):
    class Dies(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise KeyError("power cut")

    with Sandbox(leaves=2) as branch:
        keep = ModelCheckpoint(str(tmp_path), filename="last", every_n_epochs=1)
        first = BranchKeyCallback(connect(branch))
        with pytest.raises(KeyError, match="power cut"):
            make_trainer(tmp_path, [Dies(), first, keep], max_epochs=2, enable_checkpointing=True).fit(Net(), data())
        assert [upload.weighting for upload in branch.uploads] == [18.0]
        assert first.last_outcome.status == "pending"
        with connect(branch, 1)() as other:
            second = BranchKeyCallback(connect(branch), timeout_s=30)
            resumed = Net(seed=5)
            loaded = []

            class Look(lightning.Callback):
                def on_train_batch_start(self, trainer, module, batch, index):
                    loaded.append(weights(module))
                    trainer.should_stop = True

            other.upload([np.full((1, 3), 8, np.float32), np.zeros(1, np.float32)], 18)
            trainer = make_trainer(tmp_path, [second, Look()], max_epochs=2)
            with ThreadPoolExecutor(1) as pool:
                fit = pool.submit(trainer.fit, resumed, data(), ckpt_path=str(tmp_path / "last.ckpt"))
                branch.wait_for(lambda: len(branch.uploads) == 3, 30)
                other.upload([np.zeros((1, 3), np.float32), np.zeros(1, np.float32)], 4)
                fit.result(30)
            assert same(loaded[0], branch.aggregate(branch.aggregates[0]))
            mine = [upload for upload in branch.uploads if upload.leaf_id == branch.credentials[0].id]
            assert [upload.weighting for upload in mine] == [18.0, 4.0]
            assert second.round == 2


def test_a_checkpoint_of_another_leaf_is_refused_with_both_named(tmp_path):
    with Sandbox(leaves=2, quorum=1) as branch:
        trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(branch, 0))])
        trainer.fit(Net(), data())
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        other = make_trainer(tmp_path, [BranchKeyCallback(connect(branch, 1))], max_epochs=2)
        with pytest.raises(ConfigurationError) as refused:
            other.fit(Net(), data(), ckpt_path=str(tmp_path / "one.ckpt"))
        assert all(branch.credentials[leaf].id in str(refused.value) for leaf in range(2))
        branch.wait_for(lambda: branch.connected == [])
