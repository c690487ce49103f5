"""What the ranks of a small job under DistributedDataParallel are made of, and how their answers are compared."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from branchkey_integrations import Client
from branchkey_integrations.errors import BranchKeyError
from tests.support.torch_nets import Net

torch.set_num_threads(1)


def where(branch):
    return branch.url, branch.credentials[0].to_dict()


def make(seed=0):
    torch.manual_seed(seed)
    return nn.parallel.DistributedDataParallel(Net())


def train(model, optimizer, rank, steps=2):
    torch.manual_seed(100 + rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()


def connect(at, made=None):
    url, credentials = at

    def client():
        if made is not None:
            made.append(dist.get_rank())
        return Client(credentials, host=url, quarantine_dir=False)

    return client


def values(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def plain(outcome):
    return outcome.status, outcome.round, outcome.upload_id, outcome.aggregation_id, outcome.reason


def caught(work):
    """Type and text of what ``work`` raised: errors are compared across ranks by both."""
    try:
        work()
    except BranchKeyError as error:
        return type(error).__name__, str(error)
    return None
