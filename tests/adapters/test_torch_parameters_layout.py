"""Which parameters and buffers of live modules TorchParameters takes, under which names, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.torch.parameters import TorchParameters
from tests.support.torch_parameters import NET_NAMES, Net, assert_same_bits, bits, compiled, names

torch.set_num_threads(1)


# ---- layout -------------------------------------------------------------------------------------------------------


def test_layout_follows_named_parameters_with_shapes_and_dtypes():
    layout = TorchParameters(Net()).layout()
    assert [str(layer) for layer in layout] == [
        "module.0.weight float32[4, 3]",
        "module.0.bias float32[4]",
        "norm.weight float32[4]",
        "norm.bias float32[4]",
        "head.weight float32[2, 4]",
        "head.bias float32[2]",
    ]


def with_compiled_submodule(module):
    module.module[0] = compiled(module.module[0])
    module.head = compiled(module.head)
    return module


def with_checkpointed_submodule(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module.module = checkpoint_wrapper(module.module)
    return module


def set_up_by_fabric(module):
    import lightning.fabric as fabric

    return fabric.Fabric(accelerator="cpu", devices=1).setup(module)


DDP = nn.parallel.DistributedDataParallel


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        DDP,
        nn.DataParallel,
        compiled,
        lambda m: DDP(compiled(m)),
        lambda m: compiled(DDP(m)),
        with_compiled_submodule,
        lambda m: DDP(with_compiled_submodule(m)),
        with_checkpointed_submodule,
        lambda m: compiled(DDP(with_checkpointed_submodule(m))),
        set_up_by_fabric,
    ],
    ids=[
        *("plain", "ddp", "data_parallel", "compiled", "ddp_of_compiled", "compiled_ddp"),
        *("compiled_submodule", "ddp_of_compiled_submodule", "checkpointed", "all_of_them", "fabric"),
    ],
)
def test_wrappers_do_not_change_the_layout_and_values_go_both_ways(process_group, wrap):
    plain = Net()
    reference = TorchParameters(plain, buffers=True)
    before = reference.read()
    expected = reference.layout()
    assert names(reference) == [*NET_NAMES, "norm.running_mean", "norm.running_var"]

    wrapped = wrap(plain)
    store = TorchParameters(wrapped, buffers=True)
    assert store.layout() == expected
    assert store.layout().fingerprint == expected.fingerprint
    for mine, theirs in zip(store.read(), before):
        np.testing.assert_array_equal(mine, theirs)
    store.write([array + 1 for array in before])
    for mine, theirs in zip(TorchParameters(plain, buffers=True).read(), before):
        np.testing.assert_array_equal(mine, theirs + 1)


def test_users_own_classes_named_like_wrappers_keep_their_names():
    class DataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(1, 1)
            self._orig_mod = nn.Linear(1, 1)

    assert names(TorchParameters(DataParallel())) == [
        *("module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias")
    ]


def test_shared_compiled_submodule_is_listed_once_under_its_first_name():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": compiled(shared), "b": nn.Sequential(shared)})
    assert names(TorchParameters(model)) == ["a.weight"]


def test_module_can_be_compiled_in_place_after_the_store_was_made():
    model = Net()
    store = TorchParameters(model)
    before = store.layout()
    model.compile(backend="eager")
    assert store.layout() == before


def test_compiled_module_computes_with_the_new_values():
    model = nn.Linear(2, 1)
    fast = compiled(model)
    fast(torch.ones(1, 2))
    TorchParameters(fast).write([np.full((1, 2), 3.0), np.full(1, 4.0)])
    assert fast(torch.ones(1, 2)).item() == 10.0


def test_layout_is_that_of_the_model_as_it_is_now():
    model = nn.Sequential(nn.Linear(2, 2))
    store = TorchParameters(model)
    before = store.layout()
    model.append(nn.Linear(2, 2))
    assert len(before) == 2
    assert len(store.layout()) == 4
    with pytest.raises(LayoutError, match="2 layers became 4"):
        before.require_same(store.layout())


# ---- selection ----------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_in_the_default_layout_and_out_of_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    everything, trainable = TorchParameters(model), TorchParameters(model, parameters="trainable")
    assert names(everything) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names(trainable) == ["1.weight", "1.bias"]

    frozen = bits(model[0])
    trainable.write([np.full((2, 2), 5.0), np.full(2, 6.0)])
    assert_same_bits(frozen, model[0])
    assert model[1].weight.tolist() == [[5.0, 5.0], [5.0, 5.0]]
    assert model[1].bias.tolist() == [6.0, 6.0]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]

    before = bits(model)
    with pytest.raises(LayoutError, match="expected 2 layers, found 4"):
        trainable.write([np.zeros((2, 2)), np.zeros(2), np.zeros((2, 2)), np.zeros(2)])
    assert_same_bits(before, model)

    everything.write([np.ones((2, 2)), np.ones(2), np.ones((2, 2)), np.ones(2)])
    assert model[0].weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert not model[0].weight.requires_grad


def test_patterns_and_functions_choose_among_canonical_names_and_buffers():
    model = compiled(Net())
    assert names(TorchParameters(model, parameters="norm.*", buffers=True)) == [
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    ]
    assert names(TorchParameters(model, parameters=["head.*", "module.0.bias"], buffers=True)) == [
        *("module.0.bias", "head.weight", "head.bias")
    ]
    seen = {}

    def matrices(name, tensor):
        seen[name] = tensor
        return tensor.dim() == 2

    assert names(TorchParameters(model, parameters=matrices)) == ["module.0.weight", "head.weight"]
    assert list(seen) == NET_NAMES
    assert seen["head.weight"] is model.head.weight


def test_trainable_keeps_the_buffers_of_frozen_modules():
    model = Net()
    model.norm.requires_grad_(False)
    assert names(TorchParameters(model, parameters="trainable", buffers=True))[-2:] == [
        "norm.running_mean",
        "norm.running_var",
    ]


@pytest.mark.parametrize("selection", ["norn.*", ["a", "b"], lambda name, tensor: False])
def test_selection_that_keeps_nothing_names_some_of_what_there_is(selection):
    with pytest.raises(ConfigurationError, match=r"none among 6 \(module\.0\.weight, module\.0\.bias"):
        TorchParameters(Net(), parameters=selection).layout()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.ParameterList()])
def test_model_without_parameters_is_refused(model):
    with pytest.raises(ConfigurationError, match="a model without parameters"):
        TorchParameters(model).read()


@pytest.mark.parametrize("option", [{"parameters": ""}, {"parameters": []}, {"parameters": 3}, {"buffers": 1}])
def test_malformed_option_is_refused_when_made(option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        TorchParameters(Net(), **option)


# ---- buffers ------------------------------------------------------------------------------------------------------


def test_floating_persistent_buffers_follow_the_parameters_and_others_stay_home():
    class Stats(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor([1.0, 2.0]))
            self.register_buffer("cache", torch.tensor([3.0]), persistent=False)
            self.register_buffer("phase", torch.tensor([1j]))
            self.register_buffer("count", torch.tensor(4))
            self.register_buffer("absent", None)
            self.weight = nn.Parameter(torch.tensor([5.0]))

    model = nn.Sequential(Stats(), nn.BatchNorm1d(2))
    model.append(model[1])
    store = TorchParameters(model, buffers=True)
    assert names(store) == [*("0.weight", "1.weight", "1.bias"), *("0.mean", "1.running_mean", "1.running_var")]
    assert names(TorchParameters(model)) == ["0.weight", "1.weight", "1.bias"]
    model[1](torch.randn(4, 2))
    tracked = model[1].num_batches_tracked.clone()
    store.write([np.full(layer.shape, 9.0) for layer in store.layout()])
    assert model[0].mean.tolist() == [9.0, 9.0]
    assert model[1].running_var.tolist() == [9.0, 9.0]
    assert (model[0].cache.item(), model[0].phase.item(), model[0].count.item()) == (3.0, 1j, 4)
    assert torch.equal(model[1].num_batches_tracked, tracked)
    assert tracked.item() == 1


def test_batchnorm_statistics_are_untouched_without_the_buffers_option():
    model = Net()
    model(torch.randn(8, 3))
    statistics = [buffer.clone() for buffer in model.buffers()]
    store = TorchParameters(model)
    store.write([array * 2 for array in store.read()])
    assert all(torch.equal(now, then) for now, then in zip(model.buffers(), statistics))
