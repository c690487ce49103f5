"""A fit that is resumed from any checkpoint, whenever in an epoch it was made, repeats the rounds as they were."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.halving import Halving
from tests.support.lightning_beside import Seen
from tests.support.lightning_nets import Net, connect, data, held_out, make_trainer, same, weights

torch.set_num_threads(1)

EPOCHS = 3
#: When files are made: with the end of an epoch, after validation, in the middle, and with the last batch of five.
WAYS = {
    "epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"save_on_train_epoch_end": False},
    "three steps": {"every_n_train_steps": 3},
    "last batch": {"every_n_train_steps": 5},
}


def fit(branch, folder, checkpoints=(), **options):
    net = Net(seed=1)
    callback = BranchKeyCallback(connect(branch), timeout_s=20)
    trainer = make_trainer(
        folder, [callback, *checkpoints], max_epochs=EPOCHS, num_sanity_val_steps=0, enable_checkpointing=True
    )
    trainer.fit(net, data(), held_out(), **options)
    return weights(net), callback


@pytest.mark.parametrize("way", WAYS)
def test_resuming_from_any_file_repeats_its_rounds_without_an_upload(tmp_path, way):
    kept = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{step}", **WAYS[way])
    with Halving() as branch:
        wanted, _ = fit(branch, tmp_path, [kept])
        assert [upload.metadata["custom"]["round"] for upload in branch.uploads] == [1, 2, 3]
        files = sorted((tmp_path / "files").iterdir())
        assert len(files) >= EPOCHS
        for file in files:
            found, callback = fit(branch, tmp_path, ckpt_path=file)
            assert callback.round == EPOCHS, file.name
            assert callback.last_outcome.status == "applied", file.name
            assert same(found, wanted), file.name
        assert branch.hits("upload") == 3


def test_an_epoch_whose_end_the_checkpoint_missed_is_sent_when_the_fit_goes_on(tmp_path):
    kept = ModelCheckpoint(tmp_path / "files", save_top_k=-1, filename="{step}", every_n_train_steps=5)
    with Halving() as branch:
        fit(branch, tmp_path / "first", [kept])
    with Halving() as branch:
        # Another branch, which has heard nothing: the state is of another leaf, so only the weights are taken along.
        file = torch.load(tmp_path / "files" / "step=5.ckpt", weights_only=True)
        state = file["callbacks"]["BranchKeyCallback"]
        leaf = branch.credentials[0]
        assert state["batches"] == 5
        state["hook"]["rounds"].update(leaf_id=leaf.id, branch_id=leaf.branch_id)
        torch.save(file, tmp_path / "moved.ckpt")
        seen = Seen()
        fit(branch, tmp_path / "second", [seen], ckpt_path=tmp_path / "moved.ckpt")
        # Lightning 2.4 repeats the last batch of such an epoch; versions after it do not come back to it at all.
        repeated = seen.counts.get(0, 0)
        assert [(upload.metadata["custom"]["round"], upload.weighting) for upload in branch.uploads] == [
            (1, 18 + repeated),
            (2, 18),
            (3, 18),
        ]
        stored = file["state_dict"]["layer.weight"].numpy()
        assert (branch.uploads[0].layers[0] == stored).all() == (repeated == 0)


@pytest.mark.parametrize(
    ("chosen", "place"), [("run/files", "run/branchkey"), (None, "root/branchkey")], ids=["dirpath", "root"]
)
def test_the_journal_lies_beside_the_checkpoints(tmp_path, chosen, place):
    kept = ModelCheckpoint(tmp_path / chosen if chosen else None)
    with Halving() as branch:
        fit(branch, tmp_path / "root", [kept])
        assert (tmp_path / place / f"{branch.credentials[0].id}.jsonl").exists()
    assert len([*tmp_path.rglob("*.jsonl")]) == 1
