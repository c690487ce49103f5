"""A small torch model, its training, and every bit of both that a failed round must leave alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def seeded(make=Net, seed=0):
    torch.manual_seed(seed)
    return make()


def train(model, optimizer, steps=2):
    width = next(model.parameters()).shape[-1]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, width)).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer=None):
    """Every bit that a failed round must leave alone: parameters, buffers, gradients, optimizer state, its settings."""

    def raw(tensor):
        return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist(), tensor.dtype, tensor.shape

    picture = {name: raw(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, parameter in model.named_parameters():
        picture[f"{name}.grad"] = None if parameter.grad is None else raw(parameter.grad)
        for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            picture[f"{name}.{key}"] = raw(value) if isinstance(value, torch.Tensor) else value
    for index, group in enumerate(optimizer.param_groups if optimizer else []):
        picture[f"group {index}"] = {key: value for key, value in group.items() if key != "params"}
    return picture


def fitting(model):
    return [np.full(tuple(p.shape), 0.25, np.float32) for p in model.parameters()]
