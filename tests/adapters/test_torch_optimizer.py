"""Which optimizer state is cleared after an aggregate, and which never is."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.torch.optimizer import check_optimizers, reset_moments

torch.set_num_threads(1)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.25),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
}
MOMENTS = {
    "sgd": {"momentum_buffer"},
    "adam": {"exp_avg", "exp_avg_sq"},
    "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "adamax": {"exp_avg", "exp_inf"},
    "nadam": {"exp_avg", "exp_avg_sq"},
    "radam": {"exp_avg", "exp_avg_sq"},
    "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
    "adadelta": {"square_avg", "acc_delta"},
    "adagrad": {"sum"},
    "adafactor": {"row_var", "col_var", "variance"},
    "rprop": {"prev"},
    "asgd": set(),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 2))
        self.vector = nn.Parameter(torch.randn(2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * (x @ self.matrix + self.vector)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()


def state_of(optimizer, parameter):
    return copy.deepcopy(dict(optimizer.state[parameter]))


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_and_step_counts_and_rates_stay(name):
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    cleared = 0
    before = {parameter: state_of(optimizer, parameter) for parameter in model.parameters()}
    identities = {parameter: {k: id(v) for k, v in optimizer.state[parameter].items()} for parameter in before}
    count = reset_moments([optimizer], list(model.parameters()))
    for parameter, old in before.items():
        new = optimizer.state[parameter]
        assert new.keys() == old.keys()
        assert {k: id(v) for k, v in new.items()} == identities[parameter]
        for key in new:
            if key in MOMENTS[name]:
                assert not torch.equal(old[key], torch.zeros_like(old[key])), key
                start = 0.25 if name == "adagrad" else 0.0
                assert torch.equal(new[key], torch.full_like(new[key], start)), key
                cleared += 1
            else:
                assert same(new[key], old[key]), key
        assert (name == "sgd") or float(new["step"]) == 3
    assert count == cleared
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == groups
    train(model, optimizer)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_only_the_federated_parameters_lose_their_moments():
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    kept = state_of(optimizer, model.matrix)
    reset_moments([optimizer], [model.vector])
    assert all(same(value, kept[key]) for key, value in optimizer.state[model.matrix].items())
    assert not optimizer.state[model.vector]["exp_avg"].any()


def test_optimizer_that_has_not_stepped_has_nothing_to_clear(caplog):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert reset_moments([optimizer], list(model.parameters())) == 0
    train(model, optimizer)  # without momentum there are no moments either
    assert reset_moments([optimizer], list(model.parameters())) == 0
    assert not caplog.records


def test_several_optimizers_are_all_cleared():
    model = Model()
    first = torch.optim.Adam([model.matrix])
    second = torch.optim.SGD([model.vector, model.scale], lr=0.01, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    first.step(), second.step()
    several = check_optimizers([first, second], model.parameters())
    assert reset_moments(several, list(model.parameters())) == 4
    assert not first.state[model.matrix]["exp_avg_sq"].any()
    assert not second.state[model.scale]["momentum_buffer"].any()


def test_state_in_an_unknown_form_is_left_alone_and_said(caplog):
    model = Model()

    class EightBit(torch.optim.SGD):
        pass

    optimizer = EightBit(model.parameters(), lr=0.01)
    codes = torch.full((3, 2), 7, dtype=torch.uint8)
    optimizer.state[model.matrix] = {"step": 1, "state1": codes}
    with caplog.at_level(logging.WARNING):
        assert reset_moments([optimizer], [model.matrix]) == 0
    assert codes.unique().tolist() == [7]
    assert "EightBit" in caplog.text
    assert "cleared nothing" in caplog.text


def test_stranger_to_the_model_is_refused():
    with pytest.raises(ConfigurationError, match="SGD that holds none of the federated parameters"):
        check_optimizers(torch.optim.SGD(Model().parameters(), lr=0.01), Model().parameters())


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda p: None, 'none, with optimizer_state="reset"'),
        (lambda p: "adam", "found str"),
        (lambda p: [], "none"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (lambda p: [torch.optim.Adam(p), None], "none"),
        (lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.Adam(p), 1), "StepLR"),
    ],
)
def test_what_cannot_be_cleared_is_refused(make, found):
    parameters = list(Model().parameters())
    with pytest.raises(ConfigurationError, match=found):
        check_optimizers(make(parameters), parameters)
