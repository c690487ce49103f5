"""The Lightning callback beside every way to step: accumulation, manual optimisation, several optimizers, schedulers."""

from __future__ import annotations

import copy

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from torch import nn

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.lightning import BranchKeyCallback
from tests.support.lightning_beside import Answer, Look, batches, lone_branch, near, shifted
from tests.support.lightning_nets import Net, connect, make_trainer, same, weights

torch.set_num_threads(1)


@pytest.fixture
def branch():
    with lone_branch() as sandbox:
        yield sandbox


def stepped(layers, rows, lr=0.1):
    """One step of plain SGD from given weights, on the mean loss of several batches."""
    model = Net()
    model.load_state_dict(dict(zip(("layer.weight", "layer.bias"), map(torch.tensor, layers), strict=True)))
    torch.stack([model.loss(batch) for batch in rows]).mean().backward()
    return [(p - lr * p.grad).detach().numpy() for p in model.parameters()]


class Steps(lightning.Callback):
    """Note the weights after each batch, by epoch."""

    def __init__(self):
        self.after = []

    def on_train_epoch_start(self, trainer, module):
        self.after.append([])

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.after[-1].append(weights(module))


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_epoch_that_ends_in_the_middle_of_an_accumulation_leaves_no_gradient_for_the_aggregate(tmp_path, branch):
    leaf, look, steps = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Steps()
    answer = Answer(branch, shifted)
    trainer = make_trainer(tmp_path, [leaf, answer, look, steps], max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Net(), batches())
    rows = list(batches())
    assert look.gradients[1] == [None, None]
    assert same(look.started[1], answer.given[0])
    # Of three batches the first two make a step, and the last alone another.
    assert same(steps.after[1][0], answer.given[0])
    assert near(steps.after[1][1], stepped(answer.given[0], rows[:2]))
    assert trainer.global_step == 4
    assert same(branch.uploads[1].layers, steps.after[1][2])
    assert same(look.ended, answer.given[1])


def test_scheduled_accumulation_changes_between_rounds_and_loses_nothing(tmp_path, branch):
    leaf, steps, answer = BranchKeyCallback(connect(branch), timeout_s=30), Steps(), Answer(branch, shifted)
    accumulate = GradientAccumulationScheduler(scheduling={0: 1, 1: 3})
    trainer = make_trainer(tmp_path, [leaf, accumulate, answer, steps], max_epochs=2)
    trainer.fit(Net(), batches())
    assert trainer.global_step == 4
    assert [upload.weighting for upload in branch.uploads] == [18.0, 18.0]
    assert near(steps.after[1][2], stepped(answer.given[0], list(batches())))


class Manual(Net):
    """Steps by hand on every second batch, whatever the epoch: the third batch's gradient waits for the next one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = 0

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.seen += 1
        if self.seen % 2 == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


def test_gradient_that_waits_over_the_end_of_an_epoch_never_meets_the_aggregate(tmp_path, branch):
    leaf, look, steps = BranchKeyCallback(connect(branch), timeout_s=30), Look(), Steps()
    answer = Answer(branch, shifted)
    trainer = make_trainer(tmp_path, [leaf, answer, look, steps], max_epochs=2)
    trainer.fit(Manual(), batches())
    assert [upload.weighting for upload in branch.uploads] == [18.0, 18.0]
    assert look.gradients[1] == [None, None]
    # The step on the first batch of the second epoch knows of that batch alone.
    assert near(steps.after[1][0], stepped(answer.given[0], list(batches())[:1]))


def test_gradients_stay_where_no_aggregate_was_loaded(tmp_path, branch):
    leaf = BranchKeyCallback(connect(branch), timeout_s=0.2, on_error="keep_local")
    look = Look()
    make_trainer(tmp_path, [leaf, look], max_epochs=2).fit(Manual(), batches())
    assert [outcome.status for outcome in leaf.history] == ["pending", "timeout"] * 2
    assert all(gradient is not None and gradient.any() for gradient in look.gradients[1])


# ---- several optimizers, schedulers ---------------------------------------------------------------------------------


class Several(Net):
    """Two optimizers by hand, each with a scheduler; one Adam, one SGD with momentum."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.Adam([self.layer.weight], lr=0.1)
        second = torch.optim.SGD([self.layer.bias], lr=0.2, momentum=0.9)
        schedules = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (first, second)]
        return [first, second], schedules

    def training_step(self, batch, index):
        first, second = self.optimizers()
        loss = self.loss(batch)
        first.zero_grad(), second.zero_grad()
        self.manual_backward(loss)
        first.step(), second.step()
        if self.trainer.is_last_batch:
            for schedule in self.lr_schedulers():
                schedule.step()


class States(lightning.Callback):
    """Note what optimizers and schedulers hold before and after the aggregate is loaded at the end of training."""

    def __init__(self):
        self.noted = []

    def on_train_end(self, trainer, module):
        self.note(trainer)

    def note(self, trainer):
        schedules = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self.noted.append(([copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers], schedules))


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_reset_clears_the_moments_of_all_optimizers_and_nothing_else(tmp_path, branch, state):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30, optimizer_state=state)
    before, after, answer = States(), States(), Answer(branch, shifted)
    trainer = make_trainer(tmp_path, [before, leaf, answer, after], max_epochs=2)
    trainer.fit(Several(), batches())
    (old, old_schedules), (new, new_schedules) = before.noted[0], after.noted[0]
    assert old_schedules == new_schedules
    assert [schedule["last_epoch"] for schedule in new_schedules] == [2, 2]
    assert [one["param_groups"] for one in old] == [one["param_groups"] for one in new]
    assert [one["param_groups"][0]["lr"] for one in new] == [0.025, 0.05]
    adam, momentum = new[0]["state"][0], new[1]["state"][0]
    assert float(adam["step"]) == float(old[0]["state"][0]["step"]) == 6.0
    moments = [adam["exp_avg"], adam["exp_avg_sq"], momentum["momentum_buffer"]]
    earlier = [old[0]["state"][0]["exp_avg"], old[0]["state"][0]["exp_avg_sq"], old[1]["state"][0]["momentum_buffer"]]
    for mine, previous in zip(moments, earlier, strict=True):
        assert previous.any()
        assert torch.equal(mine, previous if state == "keep" else torch.zeros_like(previous))


def test_reset_goes_by_the_selection_where_another_optimizer_has_none_of_it(tmp_path, branch):
    leaf = BranchKeyCallback(connect(branch), timeout_s=30, optimizer_state="reset", parameters=["layer.weight"])
    trainer = make_trainer(tmp_path, [leaf, Answer(branch, shifted)], max_epochs=1)
    model = Several()
    trainer.fit(model, batches())
    adam, momentum = trainer.optimizers
    assert not adam.state[model.layer.weight]["exp_avg"].any()
    assert momentum.state[model.layer.bias]["momentum_buffer"].any()
    model.extra = nn.Parameter(torch.ones(1), requires_grad=False)
    stranger = BranchKeyCallback(connect(branch), optimizer_state="reset", parameters=["extra"])
    trainer = make_trainer(tmp_path, [stranger])
    with pytest.raises(ConfigurationError, match=r"Adam, SGD that hold none of the federated parameters"):
        trainer.fit(model, batches())


OPTIMIZERS = {
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), amsgrad=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
}
COUNTED = {"adam-foreach", "adamw-fused", "adamw-capturable", "rmsprop"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_reset_leaves_an_optimizer_that_steps_as_one_that_has_just_begun_but_for_its_count(tmp_path, branch, kind):
    class Chosen(Net):
        def configure_optimizers(self):
            optimizer = OPTIMIZERS[kind](self.parameters())
            plan = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "interval": "step"}}

    class Moments(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.current_epoch == 1 and index == 0:
                self.states = [copy.deepcopy(dict(state)) for state in trainer.optimizers[0].state.values()]
                self.last_epoch = trainer.lr_scheduler_configs[0].scheduler.last_epoch

    noted = Moments()
    leaf = BranchKeyCallback(connect(branch), timeout_s=30, optimizer_state="reset")
    trainer = make_trainer(tmp_path, [leaf, Answer(branch, shifted), noted], max_epochs=2)
    trainer.fit(Chosen(), batches())
    assert len(noted.states) == 2
    for state in noted.states:
        moments = {key: value for key, value in state.items() if key != "step"}
        assert moments
        assert not any(value.any() for value in moments.values())
        assert [float(state["step"])] == [3.0] if kind in COUNTED else "step" not in state
    assert noted.last_epoch == 3
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6


def test_learning_rate_monitor_and_plateau_scheduler_go_by_their_own_counts(tmp_path, branch):
    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            plan = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan, "monitor": "train_loss"}}

    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path))
    leaf, monitor = BranchKeyCallback(connect(branch), timeout_s=30), LearningRateMonitor()
    answer = Answer(branch, shifted)
    trainer = make_trainer(tmp_path, [monitor, leaf, answer], max_epochs=3, logger=logger)
    trainer.fit(Plateau(), batches())
    plan = trainer.lr_scheduler_configs[0].scheduler
    # Each aggregate is farther away than the one before, so every loss after the first is worse.
    assert (plan.last_epoch, plan.num_bad_epochs) == (3, 0)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0025)
    assert monitor.lrs["lr-SGD"] == pytest.approx([0.01, 0.01, 0.005])
    assert [outcome.status for outcome in leaf.history] == ["pending", "applied"] * 3


def test_parameters_that_no_optimizer_has_travel_too(tmp_path, branch):
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((2,), 3.0), requires_grad=False)

    leaf, answer, model = BranchKeyCallback(connect(branch), timeout_s=30), Answer(branch, shifted), Frozen()
    make_trainer(tmp_path, [leaf, answer]).fit(model, batches())
    assert branch.uploads[0].layers[0].tolist() == [3.0, 3.0]
    assert model.scale.tolist() == [2.0, 2.0]
    assert not model.scale.requires_grad
