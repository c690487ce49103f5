"""A model in shards on two processes, and what goes wrong in the middle: no rank is ever left with half of an aggregate."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest
import torch

from branchkey_integrations import Gate
from branchkey_integrations.errors import AggregateRejectedError
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook
from branchkey_integrations.torch.distributed import Coordinator
from branchkey_integrations.torch.sharded import ShardedParameters
from tests.support import sharded_nets as nets
from tests.support.ranks import Ranks
from tests.support.sharded_nets import answer_with, caught, connect, make, moments, pieces, where, whole

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as both:
        yield both


def fail_midway(rank, kind, failing, how):
    model = make(kind)
    coordinator = Coordinator(beat_s=0.05)
    store = ShardedParameters(model, coordinator, buffers=True)
    new = [np.full(layer.shape, 7.0) for layer in store.layout()]
    scatter, calls = store._shards.scatter, []

    def scatter_or_fail(group, values):
        calls.append(group)
        scatter(group, values)
        if len(calls) == 2 and rank == failing:
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            else:
                raise MemoryError("no room")

    store._shards.scatter = scatter_or_fail
    before = pieces(model)
    try:
        coordinator.run_on_main(lambda: store.write(new), store.parts)
    except BaseException as error:  # noqa: BLE001  an interrupt among them
        store.settle()
        raised = type(error).__name__
    else:
        raised = None
    same = pieces(model) == before
    # Nobody is out of step, and the same aggregate can be loaded now.
    coordinator.run_on_main(lambda: store.write(new), store.parts)
    return raised, same, [np.unique(np.ravel(value)).tolist() for value in whole(model)] == [[7.0]] * len(new)


@pytest.mark.parametrize(
    ("kind", "failing", "how", "raised"),
    [
        ("fully_shard", 0, "error", "MemoryError"),
        ("fully_shard", 1, "error", "MemoryError"),
        ("fully_shard", 0, "interrupt", "KeyboardInterrupt"),
        ("fully_shard", 1, "interrupt", "KeyboardInterrupt"),
        ("units", 0, "error", "MemoryError"),
        ("flat units", 1, "error", "MemoryError"),
    ],
)
def test_failure_in_the_middle_leaves_every_shard_as_it_was(ranks, kind, failing, how, raised):
    assert ranks.values(fail_midway, kind, failing, how) == [(raised, True, True)] * 2


def judge(rank, at, limit):
    model = nets.fully_sharded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    nets.train(model, optimizer, rank)
    calls = []

    def metric():
        calls.append(threading.current_thread() is threading.main_thread())
        model.eval()
        with torch.no_grad():
            return -model(torch.arange(7)).square().mean().item()

    gate = Gate(max_metric_drop=limit, metric=metric)
    options = {"optimizer": optimizer, "optimizer_state": "reset", "gate": gate, "on_error": "keep_local"}
    with BranchKeyHook(model, connect(at), timeout_s=60, **options) as hook:
        hook.submit(samples=1)
        before, kept = pieces(model), moments(optimizer)
        outcome = hook.collect()
        after = pieces(model)
    zero = all(not np.any(value) for value in moments(optimizer))
    steps = {float(state["step"]) for state in optimizer.state.values()}
    return outcome.status, calls, before == after, moments(optimizer) == kept, zero, steps


@pytest.mark.parametrize(("limit", "status"), [(0.5, "rejected"), (1e30, "applied")])
def test_users_metric_runs_on_every_rank_and_puts_all_shards_back(ranks, limit, status):
    with Sandbox(leaves=1, quorum=2) as branch:
        answering = answer_with(branch, 7.0)
        first, second = ranks.values(judge, where(branch), limit)
        answering.join()
    rejected = status == "rejected"
    assert first == second == (status, [True, True], rejected, rejected, not rejected, {2.0})


def poison(rank, at, kind):
    model = make(kind)
    with BranchKeyHook(model, connect(at), timeout_s=60) as hook:
        hook.submit(samples=1)
        before = pieces(model)
        error = caught(hook.collect)
        return error, before == pieces(model), hook.last_outcome.status


@pytest.mark.parametrize("kind", ["fully_shard", "units"])
def test_aggregate_that_the_gate_refuses_touches_no_shard(ranks, kind):
    with Sandbox(leaves=1, quorum=2) as branch:
        answering = answer_with(branch, 7.0, last=np.nan)
        first, second = ranks.values(poison, where(branch), kind)
        answering.join()
    assert first == second
    assert first[0][0] == AggregateRejectedError.__name__
    assert "layer_9 (frozen.bias)" in first[0][1]
    assert first[1:] == (True, "rejected")
