"""Several Lightning callbacks in one Trainer, their copies and pickles, and tuners that run the loops for themselves."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from branchkey_integrations import Client, RetryPolicy
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.lightning_beside import Answer, Look, Seen, batches, lone_branch, shifted
from tests.support.lightning_nets import Net, Rows, connect, held_out, make_trainer, same, weights

torch.set_num_threads(1)


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


def open_client(path, url):
    return Client(path, host=url, retry=RetryPolicy(backoff_s=0.05))


def maker(branch, tmp_path):
    """A maker of clients that pickles, because it knows where the secret is and not the secret."""
    path = tmp_path / "leaf.json"
    path.write_text(json.dumps(branch.credentials[0].to_dict()), encoding="utf-8")
    path.chmod(0o600)
    return functools.partial(open_client, str(path), branch.url)


# ---- several --------------------------------------------------------------------------------------------------------


def test_two_branches_federate_a_part_each_of_one_model(tmp_path, branch):
    with lone_branch() as second:
        first = BranchKeyCallback(connect(branch), parameters=["layer.weight"], timeout_s=30)
        other = BranchKeyCallback(connect(second), name="bias", parameters=["layer.bias"], weighting=5, timeout_s=30)
        answers = [Answer(branch, shifted), Answer(second, lambda number, layers: [np.float32([number / 2])])]
        look, model = Look(), Net()
        trainer = make_trainer(tmp_path, [first, other, *answers, look], max_epochs=3)
        trainer.fit(model, batches())
        assert [[layer.shape for layer in upload.layers] for upload in branch.uploads] == [[(1, 3)]] * 3
        assert [[layer.shape for layer in upload.layers] for upload in second.uploads] == [[(1,)]] * 3
        assert [upload.weighting for upload in second.uploads] == [5.0] * 3
        assert [each[0].tolist() for each in look.started[1:]] == [[[2.0] * 3], [[4.0] * 3]]
        assert [each[1].tolist() for each in look.started[1:]] == [[0.5], [1.0]]
        assert [each.tolist() for each in weights(model)] == [[[6.0] * 3], [1.5]]
        trainer.save_checkpoint(tmp_path / "both.ckpt")
        kept = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
        leaves = {key: state["hook"]["rounds"]["leaf_id"] for key, state in kept.items()}
        assert leaves == {
            "BranchKeyCallback": branch.credentials[0].id,
            "BranchKeyCallback[bias]": second.credentials[0].id,
        }


def test_one_leaf_twice_is_refused_with_both_places(tmp_path, branch):
    with connect(branch)() as client:
        twice = [BranchKeyCallback(client), Look(), BranchKeyCallback(client, name="again")]
        with pytest.raises(ConfigurationError) as refused:
            make_trainer(tmp_path, twice).fit(Net(), batches())
    message = str(refused.value)
    assert branch.credentials[0].id in message
    assert "number 1 (BranchKeyCallback) and number 2 (BranchKeyCallback[again])" in message
    assert branch.uploads == []


def test_one_name_twice_is_refused_when_the_trainer_is_made(tmp_path, branch):
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(tmp_path, [BranchKeyCallback(connect(branch)), BranchKeyCallback(connect(branch))])


# ---- copies and pickles ---------------------------------------------------------------------------------------------

WAYS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_made_before_during_and_after_training_stand_for_themselves(tmp_path, branch, way):
    duplicate = WAYS[way]
    made = {}

    class During(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            made["during"] = duplicate(leaf)

    leaf = BranchKeyCallback(maker(branch, tmp_path), timeout_s=30, name="x")
    made["before"] = duplicate(leaf)
    answer = Answer(branch, shifted)
    make_trainer(tmp_path, [leaf, During(), answer]).fit(Net(), batches())
    made["after"] = duplicate(leaf)
    assert [made[when].round for when in ("before", "during", "after")] == [0, 1, 1]
    assert [len(made[when].history) for when in ("before", "during", "after")] == [0, 1, 2]
    assert {twin.state_key for twin in made.values()} == {"BranchKeyCallback[x]"}
    assert made["after"].options == leaf.options
    # Lightning puts methods of the module into callbacks; a copy that took them along would hold module and Trainer.
    assert not {"log", "log_dict"} & vars(made["during"]).keys()
    assert made["after"].state_dict() == leaf.state_dict()
    # Only the one that was copied while an update was on its way knows of one.
    pending = {
        when: (twin.state_dict()["hook"] or {"rounds": {}})["rounds"].get("pending") for when, twin in made.items()
    }
    assert pending["before"] is pending["after"] is None
    assert pending["during"]["upload_id"] == branch.uploads[0].file_id
    # From another start, since a second update of the same bits in one round counts as a repeat of the first.
    look, model = Look(), Net(seed=5)
    twin = made["after"]
    make_trainer(tmp_path, [twin, answer, look], max_epochs=2).fit(model, batches())
    assert (twin.round, leaf.round, len(leaf.history), len(branch.uploads)) == (3, 1, 2, 3)
    assert same(weights(model), answer.given[2])


def test_callbacks_of_a_trainer_can_be_sent_to_a_spawned_process(tmp_path, branch):
    trainer = make_trainer(tmp_path, [BranchKeyCallback(maker(branch, tmp_path), timeout_s=7)])
    sent = pickle.loads(pickle.dumps(trainer.callbacks))
    leaf = next(each for each in sent if isinstance(each, BranchKeyCallback))
    assert leaf.options.timeout_s == 7
    assert isinstance(leaf, lightning.Callback)


def test_pickling_with_an_open_client_says_what_to_pass_instead(branch):
    with connect(branch)() as client, pytest.raises(TypeError, match="does not pickle: pass "):
        pickle.dumps(BranchKeyCallback(client))


# ---- tuners ---------------------------------------------------------------------------------------------------------


class Tuned(Net):
    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=self.batch_size)

    def val_dataloader(self):
        return held_out()


def test_tuners_find_and_leave_what_they_would_without_a_leaf(tmp_path, branch):
    found = []
    for callbacks in ([], [BranchKeyCallback(connect(branch))]):
        model = Tuned()
        tuner = Tuner(make_trainer(tmp_path, callbacks))
        finder = tuner.lr_find(model, num_training=8, early_stop_threshold=None)
        size = tuner.scale_batch_size(model, max_trials=2, steps_per_trial=1)
        found.append((finder.results, finder.suggestion(), model.lr, size, model.batch_size, weights(model)))
    assert found[0][:5] == found[1][:5]
    assert same(found[0][5], found[1][5])
    assert same(found[0][5], weights(Tuned()))
    assert branch.hits("run") == 0


def test_finders_among_the_callbacks_send_nothing_and_the_fit_after_them_does(tmp_path, branch):
    leaf, look, seen = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Seen()
    finders = [BatchSizeFinder(max_trials=1, steps_per_trial=1), LearningRateFinder(num_training_steps=4)]
    trainer = make_trainer(tmp_path, [leaf, *finders, Answer(branch, shifted), look, seen], max_epochs=2)
    trainer.fit(Tuned())
    # Before 2.5.2 Lightning goes on with its first epoch where the finder of learning rates has left off.
    assert [upload.weighting for upload in branch.uploads] == list(seen.counts.values())
    assert list(seen.counts) == [0, 1]
    assert seen.counts[1] == 18
    assert seen.counts[0] < 18 or same(look.started[0], weights(Tuned()))
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 2


@pytest.mark.parametrize("leaf_first", [True, False])
def test_finder_that_runs_between_epochs_does_not_disturb_the_round_that_is_on_its_way(tmp_path, branch, leaf_first):
    class Again(LearningRateFinder):
        def on_fit_start(self, trainer, module):
            pass

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch > 0:
                self.lr_find(trainer, module)

    leaf, look, answer = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Answer(branch, shifted)
    again = Again(num_training_steps=4, update_attr=False)
    both = [leaf, again] if leaf_first else [again, leaf]
    trainer = make_trainer(tmp_path, [*both, answer, look], max_epochs=3)
    trainer.fit(Net(), batches())
    assert [upload.weighting for upload in branch.uploads] == [18.0] * 3
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 3
    assert same(look.started[1], answer.given[0])
    assert same(look.started[2], answer.given[1])
