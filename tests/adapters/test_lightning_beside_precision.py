"""The Lightning callback beside every precision, compiled and lazy modules: what travels, and what comes back, exactly."""

from __future__ import annotations

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.lightning_beside import Answer, batches, lone_branch
from tests.support.lightning_nets import Net, connect, held_out, make_trainer, same

torch.set_num_threads(1)

#: Trainer's precision: type of the parameters, type of the layers.
PRECISIONS = {
    "32-true": (torch.float32, np.float32),
    "bf16-mixed": (torch.float32, np.float32),
    "bf16-true": (torch.bfloat16, np.float32),
    "16-true": (torch.float16, np.float16),
    "64-true": (torch.float64, np.float64),
}
#: What a branch may make of narrow layers: a mean in double precision that no narrow type holds.
THIRD = 1 / 3


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


class Note(lightning.Callback):
    """Copy the parameters when they are sent and when training ends; both hooks come after the leaf's."""

    def __init__(self):
        self.sent, self.ended, self.kept = [], None, None

    def on_train_start(self, trainer, module):
        self.kept = [(id(parameter), parameter.data_ptr()) for parameter in module.parameters()]

    def on_train_epoch_end(self, trainer, module):
        self.sent.append([parameter.detach().clone() for parameter in module.parameters()])

    def on_train_end(self, trainer, module):
        self.ended = [parameter.detach().clone() for parameter in module.parameters()]
        assert self.kept == [(id(parameter), parameter.data_ptr()) for parameter in module.parameters()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_hold_each_value_exactly_and_what_comes_back_is_rounded_once(tmp_path, branch, precision):
    held, layer_type = PRECISIONS[precision]
    leaf, note = BranchKeyCallback(connect(branch), timeout_s=30), Note()
    answer = Answer(branch, lambda number, layers: [np.full(layer.shape, THIRD * number) for layer in layers])
    trainer = make_trainer(tmp_path, [leaf, answer, note], max_epochs=2, precision=precision)
    trainer.fit(Net(), batches(), held_out())
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 2
    for upload, live in zip(branch.uploads, note.sent, strict=True):
        assert [layer.dtype for layer in upload.layers] == [layer_type] * 2
        assert [parameter.dtype for parameter in live] == [held] * 2
        # In double precision nothing is rounded, so equal there is equal bit for bit.
        assert same([layer.astype(np.float64) for layer in upload.layers], [each.double().numpy() for each in live])
    assert not same(branch.uploads[0].layers, branch.uploads[1].layers)
    for parameter in note.ended:
        assert parameter.dtype == held
        assert torch.equal(parameter, torch.full(parameter.shape, THIRD * 2, dtype=torch.float64).to(held))


def test_update_that_comes_back_as_it_is_changes_no_bit_of_a_half_precision_model(tmp_path, branch):
    for precision in ("bf16-true", "16-true"):
        leaf, note = BranchKeyCallback(connect(branch), timeout_s=30), Note()
        given = len(branch.uploads)
        answer = Answer(branch, lambda number, layers: layers)
        answer.given = [None] * given
        make_trainer(tmp_path, [leaf, answer, note], precision=precision).fit(Net(), batches())
        assert leaf.last_outcome.status == "applied"
        assert all(torch.equal(before, after) for before, after in zip(note.sent[0], note.ended, strict=True))


class Silent(Net):
    """Logs nothing: the compiler of this torch cannot follow Lightning's log()."""

    def training_step(self, batch, index):
        return self.loss(batch)


@pytest.mark.parametrize("how", ["whole", "in place", "part"])
def test_compiled_modules_have_the_layers_of_plain_ones_and_train_on_what_is_loaded(tmp_path, branch, how):
    torch._dynamo.reset()
    plain = model = Silent()
    if how == "whole":
        model = torch.compile(plain, backend="eager")
    elif how == "in place":
        plain.layer.compile(backend="eager")
    else:
        plain.layer = torch.compile(plain.layer, backend="aot_eager")
    leaf, note = BranchKeyCallback(connect(branch), timeout_s=60), Note()
    answer = Answer(branch, lambda number, layers: [np.full(layer.shape, 4.0, np.float32) for layer in layers])
    make_trainer(tmp_path, [leaf, answer, note], max_epochs=2).fit(model, batches())
    assert [layer.shape for layer in branch.uploads[0].layers] == [(1, 3), (1,)]
    # What is compiled computes with the loaded weights: three steps from them, as without compiling.
    witness = Net()
    with torch.no_grad():
        for parameter in witness.parameters():
            parameter.fill_(4.0)
    for batch in batches():
        witness.zero_grad()
        witness.loss(batch).backward()
        with torch.no_grad():
            for parameter in witness.parameters():
                parameter -= 0.1 * parameter.grad
    for layer, parameter in zip(branch.uploads[1].layers, witness.parameters(), strict=True):
        np.testing.assert_allclose(layer, parameter.detach().numpy(), rtol=1e-6)
    assert [parameter.tolist() for parameter in plain.parameters()] == [[[4.0] * 3], [4.0]]


def test_lazy_module_is_asked_for_its_layers_when_it_has_seen_data(tmp_path, branch):
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(1)

    leaf, answer, model = (
        BranchKeyCallback(connect(branch), timeout_s=30),
        Answer(branch, lambda n, layers: layers),
        Lazy(),
    )
    make_trainer(tmp_path, [leaf, answer], max_epochs=2).fit(model, batches())
    assert [[layer.shape for layer in upload.layers] for upload in branch.uploads] == [[(1, 3), (1,)]] * 2
    assert not same(branch.uploads[0].layers, branch.uploads[1].layers)
