"""A model that lies in shards on two processes: one leaf like any other, and never half a model."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.torch import BranchKeyHook, TorchParameters
from branchkey_integrations.torch.distributed import Coordinator
from branchkey_integrations.torch.sharded import ShardedParameters
from tests.support import sharded_nets as nets
from tests.support.ranks import Ranks
from tests.support.sharded_nets import KINDS, caught, connect, make, moments, where, whole

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as both:
        yield both


# ---- a federation of one sharded leaf and a plain one -------------------------------------------------------------


def federate(rank, at, kind):
    model = make(kind)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    objects = [id(parameter) for parameter in model.parameters()]
    seen = []
    with BranchKeyHook(model, connect(at), optimizer=optimizer, buffers=True, timeout_s=60) as hook:
        for _ in range(2):
            nets.train(model, optimizer, rank)
            before = moments(optimizer)
            model.eval()
            with torch.no_grad():
                model(torch.arange(7))  # leaves parameters whole until the next backward pass
            status = hook.step(samples=3 + rank).status
            gradients = sum(parameter.grad is not None for parameter in model.parameters())
            with torch.no_grad():
                output = model(torch.arange(7)).float().tolist()
            seen.append((status, gradients, moments(optimizer) == before, whole(model), output))
        history = hook.history
    nets.train(model, optimizer, rank)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    return seen, [o.status for o in history], [id(p) for p in model.parameters()] == objects, steps


def plain_leaf(branch, kind, told):
    model = nets.plain(seed=1, norm=nn.LayerNorm if "bfloat16" in kind else nn.BatchNorm1d)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with BranchKeyHook(model, connect(where(branch, 1)), buffers=True, timeout_s=60) as hook:
        for _ in range(2):
            nets.train(model, optimizer, rank=7)
            status = hook.step(samples=5).status
            values = [parameter.tolist() for parameter in model.parameters()]
            values += [b.tolist() for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")]
            model.eval()
            with torch.no_grad():
                told.append((status, values, model(torch.arange(7)).tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_and_plain_leaf_share_a_branch_and_end_alike(ranks, kind):
    with Sandbox(leaves=2) as branch:
        told: list = []
        other = threading.Thread(target=plain_leaf, args=(branch, kind, told))
        other.start()
        first, second = ranks.values(federate, where(branch), kind)
        other.join()
        uploads = [each for each in branch.uploads if each.leaf_id == branch.credentials[0].id]
        layouts = {each.metadata["custom"]["layout"] for each in branch.uploads}
    assert first[1] == second[1] == ["applied", "applied"]
    for number in range(2):
        for seen in (first[0][number], second[0][number]):
            assert seen[:3] == ("applied", 0, True)
            assert seen[3] == told[number][1]
            np.testing.assert_allclose(seen[4], told[number][2], rtol=0.05 if "bfloat16" in kind else 1e-5, atol=0.05)
    assert [each.weighting for each in uploads] == [7.0, 7.0]
    assert len(layouts) == 1
    for _, _, same_objects, steps in (first, second):
        assert same_objects
        assert steps == {6.0}


# ---- reading and writing ------------------------------------------------------------------------------------------


def read_and_write(rank, kind, options):
    coordinator = Coordinator(beat_s=0.1)
    if kind == "tensor parallel":
        model, twin = nets.tensor_parallel()
    else:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        model, twin = nets.fully_sharded(dtype=dtype), nets.plain(dtype=dtype)
    want = TorchParameters(twin, **options)
    store = ShardedParameters(model, coordinator, **options)
    names = [layer.name for layer in store.layout()]
    new = [np.full(layer.shape, index + 2.25, np.float64) for index, layer in enumerate(want.layout())]

    def work():
        read = store.read()
        same = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(read, want.read()))
        store.write(new)
        return same, all(np.array_equal(a, b) for a, b in zip(store.read(), new))

    before = whole(model)
    sames = coordinator.run_on_main(work, store.parts)
    changed = sum(a != b for a, b in zip(before, whole(model)))
    return store.layout() == want.layout(), names, sames, changed


@pytest.mark.parametrize(
    ("kind", "options", "names", "changed"),
    [
        ("tensor parallel", {}, ["0.weight", "0.bias", "2.weight", "2.bias"], 4),
        ("bfloat16", {"parameters": "frozen.*"}, ["frozen.weight", "frozen.bias"], 2),
        ("bfloat16", {"parameters": "trainable", "buffers": True}, None, 10),
        ("float32", {"parameters": "scale"}, ["scale"], 1),
    ],
)
def test_layers_are_those_of_the_whole_model(ranks, kind, options, names, changed):
    first, second = ranks.values(read_and_write, kind, options)
    assert first == second
    assert first[0]
    assert names is None or first[1] == names
    assert len(first[1]) == changed == first[3]
    assert first[2] == (True, True)


def refuse(rank, kind):
    if kind == "nothing selected":
        return caught(lambda: ShardedParameters(nets.fully_sharded(), Coordinator(), parameters="no_such"))
    model = nets.fully_sharded()
    if kind == "not by the hook":
        with torch.no_grad():
            model.eval()(torch.arange(7))  # parameters lie there whole, but nothing written into them would last
        return caught(lambda: TorchParameters(model).layout())
    coordinator = Coordinator(beat_s=0.1)
    store = ShardedParameters(model, coordinator, parameters="words.*")
    return caught(lambda: coordinator.run_on_main(lambda: store.write([np.zeros((7, 4))]), store.parts))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("nothing selected", ConfigurationError, "at least one parameter of the model"),
        ("not by the hook", LayoutError, "Give the model to BranchKeyHook"),
        ("wrong shape", LayoutError, "layer_0 (words.weight): expected shape (7, 5), found shape (7, 4)"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(ranks, kind, error, message):
    for found in ranks.values(refuse, kind):
        assert found[0] == error.__name__
        assert message in found[1]


def freeze_later(rank, at):
    model = nets.fully_sharded()
    with BranchKeyHook(model, connect(at), parameters="trainable", timeout_s=60) as hook:
        first = hook.step(samples=1).status
        model.body[0].requires_grad_(False)
        return first, caught(lambda: hook.step(samples=1))


def test_layers_that_are_frozen_between_rounds_are_noticed_before_the_upload(ranks):
    with Sandbox(leaves=1) as branch:
        first, second = ranks.values(freeze_later, where(branch))
        assert len(branch.uploads) == 1
    assert first == second
    assert first[0] == "applied"
    assert first[1][0] == LayoutError.__name__


# ---- moments ------------------------------------------------------------------------------------------------------


def reset_flat(rank, at, parameters):
    model = nets.in_units(original=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    nets.train(model, optimizer, rank)
    options = {"optimizer": optimizer, "optimizer_state": "reset", "parameters": parameters}
    hooks = []
    error = caught(lambda: hooks.append(BranchKeyHook(model, connect(at), timeout_s=60, **options)))
    if error is not None:
        return error
    with hooks[0] as hook:
        return hook.step(samples=1).status, all(not np.any(value) for value in moments(optimizer))


def test_moments_of_flat_parameters_are_cleared_as_a_whole_or_not_at_all(ranks):
    with Sandbox(leaves=1) as branch:
        assert ranks.values(reset_flat, where(branch), "all") == [("applied", True)] * 2
        for name, message in ranks.values(reset_flat, where(branch), ["words.*", "body.0.*"]):
            assert name == ConfigurationError.__name__
            assert "use_orig_params=True" in message


# ---- memory -------------------------------------------------------------------------------------------------------

LAYERS, ROWS = 24, 1024


def anonymous_bytes():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def grow(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(ROWS, ROWS, bias=False) for _ in range(LAYERS)))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    coordinator = Coordinator(beat_s=5.0)
    store = ShardedParameters(model, coordinator)
    over, highest = threading.Event(), [0]

    def watch():
        while not over.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes())

    def work():
        store.write(store.read())

    coordinator.run_on_main(work, store.parts)  # what torch loads and keeps when it does this first is not meant
    start = anonymous_bytes()
    watching = threading.Thread(target=watch)
    watching.start()
    coordinator.run_on_main(work, store.parts)
    over.set()
    watching.join()
    return highest[0] - start


def test_no_rank_holds_much_more_than_its_shard_and_a_layer(ranks):
    layer = ROWS * ROWS * 4
    for grown in ranks.values(grow):
        assert grown < 8 * layer < LAYERS * layer / 2


def test_large_arrays_lie_in_files_as_long_as_there_is_room(monkeypatch):
    from branchkey_integrations.torch import scratch

    before = len(os.listdir("/proc/self/fd"))
    large = scratch.scratch_array((3, 1024, 1024), "<f2")
    large[:] = 3
    assert (large.shape, large.dtype, large.flags.writeable) == ((3, 1024, 1024), np.float16, True)
    assert type(large.base.base).__name__ in ("mmap", "memoryview")
    del large
    assert len(os.listdir("/proc/self/fd")) == before

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert scratch.scratch_array((2, 1024, 1024), np.float64).base is None
    small = scratch.scratch_array((), np.int64)
    assert (small.shape, small.base) == ((), None)


# ---- one process --------------------------------------------------------------------------------------------------


def alone(rank, at):
    dist.destroy_process_group()
    if rank:
        return None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nets.fully_sharded()
    sent = whole(model)[:10]
    with BranchKeyHook(model, connect(at), timeout_s=60) as hook:
        return hook.step(samples=1).status, sent, whole(model)[:10]


def test_a_group_of_one_works_as_well(ranks):
    with Sandbox(leaves=1) as branch:
        (status, sent, after), _ = ranks.values(alone, where(branch))
        assert status == "applied"
        assert [layer.tolist() for layer in branch.uploads[0].layers] == sent == after
