"""The weighting is what was really seen: samples of every kind of batch, loader and fit."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from branchkey_integrations.lightning.samples import count_in_each, count_samples
from branchkey_integrations.sandbox import Sandbox
from tests.support.lightning_nets import Net, Rows, connect, data, held_out, make_trainer

torch.set_num_threads(1)

FOUR = torch.zeros(4, 3)
Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    name: str
    scale: torch.Tensor
    x: torch.Tensor


class Plain:
    """What a collate function of somebody's own may give."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (FOUR, 4),
        (np.zeros((5, 2)), 5),
        ((FOUR, torch.zeros(4)), 4),
        ([FOUR, FOUR], 4),
        (Pair(FOUR, None), 4),
        ({"text": "of all", "x": FOUR}, 4),
        (UserDict(x=FOUR), 4),
        ({"scale": torch.tensor(2.0), "x": FOUR}, 4),
        ({"inner": {"deep": [FOUR]}}, 4),
        (Record("of all", torch.tensor(1), FOUR), 4),
        (Plain(label="of all", x=FOUR), 4),
        (Plain(num_graphs=3, x=torch.zeros(40, 2)), 3),
        (Plain(batch_size=6, x=torch.zeros(40, 2)), 6),
        (pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)]), 2),
        (torch.zeros(4, 3).to_sparse(), 4),
        (torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=torch.jagged), 2),
        (torch.tensor(3.0), 1),
        ((torch.tensor(3.0), torch.tensor(4.0)), 1),
        (["a", "b", "c"], 3),
        (torch.zeros(0, 3), 0),
        (object(), None),
        ([], None),
        (None, None),
        (Plain(), None),
        (Record, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_samples_are_found_in_every_kind_of_batch(batch, found):
    assert count_samples(batch) == found


def test_batches_of_several_loaders_count_together():
    one, other = object(), object()
    assert count_in_each({"a": one, "b": other}, {"a": (FOUR, FOUR), "b": torch.zeros(6, 3)}) == 10
    assert count_in_each([one, [other, one]], [FOUR, [FOUR, torch.zeros(1)]]) == 9
    # A loader that has run out gives nothing, and one without a number leaves none for the whole.
    assert count_in_each([one, other], [FOUR, None]) == 4
    assert count_in_each([one, other], [FOUR, object()]) is None
    # One loader whose batches are pairs is one loader.
    assert count_in_each(one, (FOUR, torch.zeros(4))) == 4
    assert count_in_each([one], [(FOUR, torch.zeros(4))]) == 4


class Stream(IterableDataset):
    """11 rows of unknown number."""

    def __iter__(self):
        return iter(torch.zeros(11, 3))


class Records(Rows):
    def __getitem__(self, index):
        return Record("row", torch.tensor(1.0), self.x[index])


def collated(rows):
    return Record("batch", torch.tensor(1.0), torch.stack([row.x for row in rows]))


class Either(Net):
    """Trains on whatever a loader gives."""

    def training_step(self, batch, index):
        batch = batch if not isinstance(batch, Record) else batch.x
        if isinstance(batch, dict) and "b" in batch:
            batch = batch["a"] if batch["a"] is not None else batch["b"]
        return super().training_step(batch, index)

    def transfer_batch_to_device(self, batch, device, index):
        return batch if isinstance(batch, Record) else super().transfer_batch_to_device(batch, device, index)


@pytest.fixture(scope="module")
def branch():
    with Sandbox(leaves=1) as sandbox:
        yield sandbox


def both(mode):
    """18 rows in batches of 4, beside 6 rows in batches of 3."""
    few = torch.utils.data.Subset(Rows("tensor"), range(6))
    return CombinedLoader({"a": data("tensor"), "b": DataLoader(few, batch_size=3)}, mode)


@pytest.mark.parametrize(
    ("loader", "options", "weighting"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), {}, 11.0),
        (lambda: DataLoader(Stream(), batch_size=4, drop_last=True), {}, 8.0),
        (lambda: DataLoader(Stream(), batch_size=4), {"limit_train_batches": 2}, 8.0),
        (lambda: data("tensor"), {"limit_train_batches": 0.5}, 8.0),
        (lambda: data("dict", drop_last=True), {"accumulate_grad_batches": 3}, 16.0),
        (lambda: data("tensor"), {"overfit_batches": 1}, 4.0),
        (lambda: DataLoader(Records(), batch_size=4, collate_fn=collated), {}, 18.0),
        (lambda: both("min_size"), {}, 14.0),
        (lambda: both("max_size"), {}, 24.0),
        (lambda: both("max_size_cycle"), {}, 33.0),
        (lambda: {"a": data("tensor"), "b": data("tensor")}, {}, 36.0),
        (lambda: [data("tensor"), data("tuple")], {}, 36.0),
    ],
    ids=[
        "stream,11",
        "stream,drop_last,8",
        "stream,limit,8",
        "limit,8",
        "dict,accumulate,drop_last,16",
        "overfit,4",
        "dataclass,18",
        "min_size,14",
        "max_size,24",
        "max_size_cycle,33",
        "dict of loaders,36",
        "list of loaders,36",
    ],
)
def test_a_fit_weighs_what_its_loaders_gave(tmp_path, branch, loader, options, weighting):
    before = len(branch.uploads)
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(branch), journal=False)], **options)
    trainer.fit(Either(), loader())
    assert [upload.weighting for upload in branch.uploads[before:]] == [weighting]


def test_a_second_fit_starts_to_count_again_and_an_own_count_is_taken(tmp_path, branch):
    class Thirds(BranchKeyCallback):
        def count_samples(self, batch):
            return 3 * super().count_samples(batch)

    before = len(branch.uploads)
    callback = Thirds(connect(branch), every_n_epochs=2, journal=False)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    model = Net()
    trainer.fit(model, data())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, data("dict"))
    assert [upload.weighting for upload in branch.uploads[before:]] == [3 * 36.0] * 2


def test_nothing_to_count_by_is_an_error_that_says_what_to_do_unless_a_number_is_given(tmp_path, branch):
    class Odd:
        __slots__ = ("rows",)

        def __init__(self, rows):
            self.rows = rows

    class Slotted(Net):
        def training_step(self, batch, index):
            return super().training_step(batch.rows, index)

        def transfer_batch_to_device(self, batch, device, index):
            return batch

    def odd():
        return DataLoader(Rows("tensor"), batch_size=4, collate_fn=lambda rows: Odd(torch.stack(rows)))

    with pytest.raises(ConfigurationError, match="samples: expected how many samples were trained on"):
        make_trainer(tmp_path, [BranchKeyCallback(connect(branch), journal=False)]).fit(Slotted(), odd())
    before = len(branch.uploads)
    make_trainer(tmp_path, [BranchKeyCallback(connect(branch), weighting=2.5, journal=False)]).fit(Slotted(), odd())
    assert [upload.weighting for upload in branch.uploads[before:]] == [2.5]


def test_validation_between_batches_and_sanity_checks_are_no_training(tmp_path, branch):
    before = len(branch.uploads)
    options = {"max_epochs": 2, "val_check_interval": 1, "num_sanity_val_steps": 1}
    trainer = make_trainer(tmp_path, [BranchKeyCallback(connect(branch), journal=False)], **options)
    trainer.fit(Net(), data(), held_out())
    assert [upload.weighting for upload in branch.uploads[before:]] == [18.0, 18.0]
