"""A model for the tests of TorchParameters, and views of all that a module holds."""

from __future__ import annotations

import torch
from torch import nn

torch.set_num_threads(1)


def bits(module):
    """Every parameter and buffer of a module, copied, as bytes."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for name, t in state}


def assert_same_bits(before, module):
    after = bits(module)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def names(store):
    return [layer.name for layer in store.layout()]


class Net(nn.Module):
    """A model with a submodule of the user's own that is called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.module(x)))


NET_NAMES = ["module.0.weight", "module.0.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


def compiled(module):
    return torch.compile(module, backend="eager")
