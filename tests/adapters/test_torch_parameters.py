"""What TorchParameters reads from live modules, what it writes, and what it refuses without touching anything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.torch.parameters import TorchParameters

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


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()
    patch.undo()


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


def compiled(module):
    return torch.compile(module, backend="eager")


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


# ---- reading ------------------------------------------------------------------------------------------------------


def test_arrays_read_are_owned_writeable_c_ordered_copies():
    model = Net()
    store = TorchParameters(model)
    arrays = store.read()
    kept = [array.copy() for array in arrays]
    for array in arrays:
        assert array.flags.owndata
        assert array.flags.writeable
        assert array.flags.c_contiguous
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for array, copied in zip(arrays, kept):
        np.testing.assert_array_equal(array, copied)
    before = bits(model)
    for array in arrays:
        array[...] = 99
    assert_same_bits(before, model)


def test_reading_leaves_autograd_and_gradients_alone():
    model = nn.Linear(2, 1)
    loss = model(torch.ones(1, 2)).sum()
    TorchParameters(model).read()
    loss.backward()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_numpy_lacks_round_trip_exactly_through_float32(dtype):
    # Every bit pattern of the type, NaN and inf included.
    if dtype is torch.bfloat16:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    else:
        patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    model = nn.ParameterDict({"w": nn.Parameter(patterns.clone(), requires_grad=False)})
    store = TorchParameters(model)
    (array,) = store.read()
    assert array.dtype == np.float32
    finite = np.isfinite(array)
    assert torch.equal(
        torch.from_numpy(array).to(dtype).float()[torch.from_numpy(finite)],
        patterns.float()[torch.from_numpy(finite)],
    )
    before = bits(model)
    store.write([np.where(finite, array, 0).astype(np.float32)])
    kept = torch.from_numpy(finite)
    width = patterns.element_size()
    assert torch.equal(bits(model)["w"].view(-1, width)[kept], before["w"].view(-1, width)[kept])
    assert model["w"].dtype is dtype


def test_bfloat16_model_keeps_its_type_and_values():
    model = nn.Linear(4, 2).to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    store = TorchParameters(model)
    arrays = store.read()
    assert [array.dtype for array in arrays] == [np.float32, np.float32]
    store.write(arrays)
    for parameter, old in zip(model.parameters(), before):
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, old)
    assert [layer.dtype for layer in store.layout()] == ["bfloat16", "bfloat16"]


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_types_that_numpy_has_stay_as_they_are(name):
    model = nn.Linear(3, 2).to(getattr(torch, name))
    store = TorchParameters(model)
    arrays = store.read()
    assert [array.dtype.name for array in arrays] == [name, name]
    before = bits(model)
    store.write(arrays)
    assert_same_bits(before, model)


@pytest.mark.parametrize("name", ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integer_parameters_travel_as_they_are(name):
    value = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, name))
    model = nn.ParameterDict({"q": nn.Parameter(value, requires_grad=False), "w": nn.Parameter(torch.ones(2))})
    store = TorchParameters(model)
    arrays = store.read()
    assert [array.dtype.name for array in arrays] == [name, "float32"]
    store.write([1 - arrays[0].astype(np.int64), arrays[1]])
    assert model["q"].to(torch.int64).tolist() == [[1, 0], [0, 1]]
    assert model["q"].dtype is getattr(torch, name)


# ---- writing ------------------------------------------------------------------------------------------------------


def test_tied_weights_are_one_layer_and_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.emb.weight

        def forward(self, x):
            return self.out(self.emb(x))

    model = Tied()
    store = TorchParameters(model)
    assert names(store) == ["emb.weight"]
    assert len(store.read()) == 1
    assert len(model.state_dict()) == 2
    store.write([np.full((5, 3), 2.0, "f4")])
    assert model.out.weight is model.emb.weight
    assert model.out.weight.eq(2.0).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert not model.emb.weight.eq(2.0).all()
    assert torch.equal(model.emb.weight, model.out.weight)


def test_float64_aggregate_leaves_types_and_training_as_they_were():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    rng = np.random.default_rng(0)
    aggregate = [rng.standard_normal((2, 3)), rng.standard_normal(2)]
    TorchParameters(model).write(aggregate)
    for parameter, array in zip(model.parameters(), aggregate):
        assert parameter.dtype is torch.float32
        np.testing.assert_array_equal(parameter.detach().numpy(), array.astype(np.float32))
        assert optimizer.state[parameter]["exp_avg"].dtype is torch.float32
    moved = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, moved)
    assert optimizer.state[model.weight]["step"].item() == 2


def test_writing_is_in_place_into_the_same_storage():
    model = nn.Conv2d(4, 3, 2).to(memory_format=torch.channels_last)
    model.bias.requires_grad_(False)
    before = [(p.data_ptr(), p.stride(), p.dtype, p.device, p.requires_grad, id(p)) for p in model.parameters()]
    values = np.arange(48, dtype=np.float64).reshape(3, 4, 2, 2)
    store = TorchParameters(model)
    store.write([values, np.arange(3)])
    assert [(p.data_ptr(), p.stride(), p.dtype, p.device, p.requires_grad, id(p)) for p in model.parameters()] == before
    assert not model.weight.is_contiguous()
    np.testing.assert_array_equal(model.weight.detach().numpy(), values)
    np.testing.assert_array_equal(store.read()[0], values)
    assert store.read()[0].flags.c_contiguous
    assert model.weight.is_leaf
    assert model.weight.grad_fn is None


def test_strided_views_are_read_and_written_through_and_nothing_beside_them():
    backing = torch.arange(24.0).reshape(6, 4)
    model = nn.ParameterDict(
        {"odd": nn.Parameter(backing[1::2, ::3]), "t": nn.Parameter(torch.arange(6.0).view(2, 3).T)}
    )
    store = TorchParameters(model)
    odd, transposed = store.read()
    np.testing.assert_array_equal(odd, [[4, 7], [12, 15], [20, 23]])
    np.testing.assert_array_equal(transposed, [[0, 3], [1, 4], [2, 5]])
    store.write([-odd, -transposed])
    expected = torch.arange(24.0).reshape(6, 4)
    expected[1::2, ::3] *= -1
    assert torch.equal(backing, expected)
    assert model["t"].tolist() == [[0, -3], [-1, -4], [-2, -5]]
    assert model["t"].stride() == (1, 3)


def test_parameters_on_one_storage_are_each_a_layer():
    backing = torch.zeros(4)
    model = nn.ParameterDict({"a": nn.Parameter(backing[:2]), "b": nn.Parameter(backing[2:])})
    TorchParameters(model).write([np.ones(2), np.full(2, 2.0)])
    assert backing.tolist() == [1, 1, 2, 2]


def test_scalars_and_empty_parameters_keep_their_shape():
    model = nn.ParameterDict({"empty": nn.Parameter(torch.empty(0, 3)), "scale": nn.Parameter(torch.tensor(2.0))})
    store = TorchParameters(model)
    arrays = store.read()
    assert [array.shape for array in arrays] == [(0, 3), ()]
    assert all(isinstance(array, np.ndarray) for array in arrays)
    store.write([np.empty((0, 3)), np.float64(7.0)])
    assert model["scale"].item() == 7.0
    assert model["scale"].shape == ()
    with pytest.raises(LayoutError, match=r"layer_1 \(scale\): expected shape \(\), found shape \(1,\)"):
        store.write([np.empty((0, 3)), np.zeros(1)])


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", ">i4", "f8", "longdouble", "?", "u1"])
def test_any_real_type_and_byte_order_is_taken_for_floats(dtype):
    model = nn.Linear(2, 1)
    arrays = [np.array([[1, 0]], dtype=dtype), np.array([1], dtype=dtype)]
    for array in arrays:
        array.flags.writeable = False
    TorchParameters(model).write(arrays)
    assert model.weight.tolist() == [[1.0, 0.0]]
    assert model.bias.tolist() == [1.0]


def test_big_endian_values_fit_narrow_and_integer_types():
    model = nn.ParameterDict(
        {
            "b": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
            "i": nn.Parameter(torch.zeros(2, dtype=torch.int16), False),
        }
    )
    TorchParameters(model).write([np.array([1.5, -2.0], ">f8"), np.array([258, -3], ">i8")])
    assert model["b"].tolist() == [1.5, -2.0]
    assert model["i"].tolist() == [258, -3]


def test_reversed_and_fortran_arrays_are_taken():
    model = nn.Linear(2, 2, bias=False)
    values = np.arange(4.0).reshape(2, 2)
    TorchParameters(model).write([np.asfortranarray(values)])
    assert model.weight.tolist() == [[0, 1], [2, 3]]
    TorchParameters(model).write([values[::-1, ::-1]])
    assert model.weight.tolist() == [[3, 2], [1, 0]]


def test_written_arrays_are_not_kept():
    model = nn.Linear(2, 1, bias=False)
    array = np.ones((1, 2), np.float32)
    TorchParameters(model).write([array])
    array[...] = 5
    assert model.weight.tolist() == [[1.0, 1.0]]


def test_twelve_equal_layers_come_back_in_numeric_order(tmp_path):
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(12)])
    for index, layer in enumerate(model):
        nn.init.constant_(layer.weight, index)
    store = TorchParameters(model)
    path = tmp_path / "aggregate.npz"
    write_archive(str(path), store.read())
    for layer in model:
        nn.init.constant_(layer.weight, -1)
    with Archive.open(str(path)) as archive:
        store.write(archive)
    assert [layer.weight.unique().tolist() for layer in model] == [[float(index)] for index in range(12)]


def test_archive_is_decoded_once_a_layer():
    class Lazy:
        def __init__(self, arrays):
            self.arrays = arrays
            self.headers = tuple(arrays)
            self.taken = []

        def __len__(self):
            return len(self.arrays)

        def __getitem__(self, index):
            self.taken.append(index)
            return self.arrays[index]

    lazy = Lazy([np.ones((2, 2)), np.ones(2)])
    TorchParameters(nn.Linear(2, 2)).write(lazy)
    assert lazy.taken == [0, 1]


def test_parameters_made_in_inference_mode_can_be_written():
    with torch.inference_mode():
        model = nn.Linear(2, 1)
    TorchParameters(model).write([np.full((1, 2), 3.0), np.zeros(1)])
    assert model.weight.tolist() == [[3.0, 3.0]]
    assert model.weight.is_inference()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_ordinary_parameters_can_be_read_and_written_in_any_mode_and_still_train(mode):
    model = nn.Linear(2, 1)
    with mode():
        store = TorchParameters(model)
        store.write([array + 1 for array in store.read()])
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        store.write(store.read())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
    assert not model.weight.is_inference()
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_modules_travel_as_their_originals(norm):
    torch.manual_seed(0)
    source, target = norm(nn.Linear(3, 3)), norm(nn.Linear(3, 3))
    store = TorchParameters(source, buffers=True)
    assert all(name == "bias" or name.startswith("parametrizations.weight.") for name in names(store))
    TorchParameters(target, buffers=True).write(store.read())
    source.eval(), target.eval()
    assert torch.equal(source.weight, target.weight)


def test_recurrent_and_listed_parameters_are_written_in_place():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "more": nn.ParameterList([torch.zeros(1), torch.zeros(2)])})
    store = TorchParameters(model)
    assert names(store)[-2:] == ["more.0", "more.1"]
    other = copy.deepcopy(model)
    store.write([array + 0.5 for array in store.read()])
    x = torch.ones(1, 1, 2)
    assert not torch.equal(model["rnn"](x)[0], other["rnn"](x)[0])
    TorchParameters(other).write(store.read())
    assert torch.equal(model["rnn"](x)[0], other["rnn"](x)[0])


# ---- refused, with nothing written --------------------------------------------------------------------------------


def object_array():
    array = np.empty((2, 2), dtype=object)
    array[...] = 1.0
    return array


W, B = np.zeros((2, 2), "f4"), np.zeros(2, "f4")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([W, np.zeros(1)], r"layer_1 \(bias\): expected shape \(2,\), found shape \(1,\)"),
        ([W, np.float32(0)], r"layer_1 \(bias\): expected shape \(2,\), found shape \(\)"),
        ([np.zeros((7, 7)), B], r"layer_0 \(weight\): expected shape \(2, 2\), found shape \(7, 7\)"),
        ([np.zeros((1, 2)), B], r"layer_0 \(weight\): expected shape \(2, 2\), found shape \(1, 2\)"),
        ([np.zeros(4), B], r"layer_0 \(weight\): expected shape \(2, 2\), found shape \(4,\)"),
        ([W], "expected 2 layers, found 1"),
        ([W, B, B], "expected 2 layers, found 3"),
        ([], "expected 2 layers, found 0"),
        ([B, W], r"layer_0 \(weight\)"),
        ([W, B.astype(complex)], r"layer_1 \(bias\): .*complex128"),
        ([W, np.array(["a", "b"])], r"layer_1 \(bias\): .*<U1"),
        ([W, np.zeros(2, "M8[s]")], r"layer_1 \(bias\): .*datetime64"),
        ([W, np.zeros(2, "V4")], r"layer_1 \(bias\): .*V4"),
        ([object_array(), B], r"layer_0 \(weight\): .*object"),
        ([W, [0.0, 0.0]], "layer_1: expected a numpy array, found list"),
        ([W, torch.zeros(2)], "layer_1: expected a numpy array, found Tensor"),
        ([W, None], "layer_1: expected a numpy array, found NoneType"),
        ([W, np.array([0.0, 1e39])], r"layer_1 \(bias\): expected values from -3.40282e\+38 to 3.40282e\+38"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_written(arrays, message):
    model = nn.Linear(2, 2)
    before = bits(model)
    with pytest.raises(LayoutError, match=message) as caught:
        TorchParameters(model).write(arrays)
    assert isinstance(caught.value, ValueError)
    assert_same_bits(before, model)


def test_transposed_shape_is_refused():
    model = nn.Linear(3, 1)
    before = bits(model)
    with pytest.raises(LayoutError, match=r"expected shape \(1, 3\), found shape \(3, 1\)"):
        TorchParameters(model).write([np.zeros((3, 1)), np.zeros(1)])
    assert_same_bits(before, model)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float16", 70000.0),
        ("bfloat16", 3.4e38),
        ("float8_e4m3fn", 449.0),
        ("float8_e5m2", -60000.0),
        ("float32", 1e300),
    ],
)
def test_value_that_would_become_infinite_is_refused_by_name(dtype, value):
    kind = getattr(torch, dtype)
    model = nn.ParameterDict(
        {"first": nn.Parameter(torch.ones(2, 2)), "last": nn.Parameter(torch.ones(2).to(kind), requires_grad=False)}
    )
    before = bits(model)
    with pytest.raises(LayoutError, match=rf"layer_1 \(last\): expected values from .*{dtype}, found"):
        TorchParameters(model).write([np.zeros((2, 2)), np.array([1.0, value])])
    assert_same_bits(before, model)


@pytest.mark.parametrize(
    ("dtype", "value"), [("uint8", -1), ("uint8", 256), ("int8", 128), ("int8", -129), ("bool", 2)]
)
def test_whole_number_that_would_wrap_around_is_refused(dtype, value):
    model = nn.ParameterDict(
        {
            "a": nn.Parameter(torch.ones(2)),
            "q": nn.Parameter(torch.zeros(1).to(getattr(torch, dtype)), requires_grad=False),
        }
    )
    before = bits(model)
    with pytest.raises(
        LayoutError, match=rf"layer_1 \(q\): expected values from .*, the range of {dtype}, found {value}"
    ):
        TorchParameters(model).write([np.zeros(2), np.array([value])])
    assert_same_bits(before, model)


@pytest.mark.parametrize(
    ("dtype", "value"), [("int8", -128), ("uint8", 255), ("int64", -(2**63)), ("uint64", 2**64 - 1)]
)
def test_extreme_whole_numbers_that_fit_are_taken(dtype, value):
    model = nn.ParameterDict({"q": nn.Parameter(torch.zeros(1).to(getattr(torch, dtype)), requires_grad=False)})
    TorchParameters(model).write([np.array([value])])
    assert model["q"].tolist() == [value]


def test_fractions_for_an_integer_parameter_are_refused():
    model = nn.ParameterDict({"q": nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)})
    with pytest.raises(
        LayoutError, match=r"layer_0 \(q\): expected numbers that can become int64, found dtype float64"
    ):
        TorchParameters(model).write([np.zeros(2)])


def test_failure_while_decoding_a_late_layer_leaves_everything_as_it_was():
    class Broken(list):
        @property
        def headers(self):
            return tuple(super().__iter__())

        def __getitem__(self, index):
            if index == 3:
                raise OSError("crc")
            return super().__getitem__(index)

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = bits(model)
    with pytest.raises(OSError, match="crc"):
        TorchParameters(model).write(Broken([W, B, W, B]))
    assert_same_bits(before, model)


def test_layer_that_decodes_to_something_else_than_its_header_is_refused():
    class Lying(list):
        headers = (W, B)

    model = nn.Linear(2, 2)
    before = bits(model)
    with pytest.raises(LayoutError, match=r"layer_1 \(bias\): expected float32\[2\], found float64\[1\] when decoded"):
        TorchParameters(model).write(Lying([W, np.zeros(1)]))
    assert_same_bits(before, model)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
def test_failure_or_interrupt_in_the_middle_of_copying_is_undone(monkeypatch, interrupt):
    from branchkey_integrations.torch import parameters as module_under_test

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = bits(model)
    copies = []
    original = module_under_test._copy

    def interrupted(target, source):
        original(target, source)
        copies.append(target)
        if len(copies) == 3:
            raise interrupt

    monkeypatch.setattr(module_under_test, "_copy", interrupted)
    with pytest.raises(interrupt):
        TorchParameters(model).write([W + 7, B + 7, W + 7, B + 7])
    assert len(copies) == 6  # three layers forth, three back
    assert_same_bits(before, model)


class Holder(nn.Module):
    def __init__(self, value, requires_grad=True):
        super().__init__()
        self.good = nn.Parameter(torch.ones(1))
        self.odd = nn.Parameter(value, requires_grad=requires_grad)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.empty(2, device="meta"), "no values"),
        (lambda: torch.eye(2).to_sparse(), "layout sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "layout sparse_csr"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex complex64"),
        (lambda: torch.ones(1).expand(3), "expanded"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fnuz), "dtype float8_e4m3fnuz"),
        (lambda: torch.ones(2).to(torch.float8_e8m0fnu), "dtype float8_e8m0fnu"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "NestedTensor"),
        (lambda: torch.eye(2).to_mkldnn(), "layout _mkldnn"),
    ],
    ids=["meta", "sparse", "csr", "complex", "expanded", "fnuz", "e8m0", "nested", "mkldnn"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*nested tensors:UserWarning")
def test_tensor_that_cannot_be_a_layer_is_named(make, found):
    model = Holder(make(), requires_grad=False)
    for operation in (
        TorchParameters(model).layout,
        TorchParameters(model).read,
        lambda: TorchParameters(model).write([]),
    ):
        with pytest.raises(LayoutError, match=rf"^odd: expected a dense tensor of real numbers, found .*{found}"):
            operation()
    assert names(TorchParameters(model, parameters="good")) == ["good"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_parameter_is_named():
    value = torch._empty_affine_quantized([2], scale=0.1, zero_point=0, dtype=torch.qint8)
    with pytest.raises(LayoutError, match=r"^odd: .*quantised qint8"):
        TorchParameters(Holder(value, requires_grad=False)).layout()


def test_lazy_parameter_is_named_until_the_first_batch():
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    store = TorchParameters(model, buffers=True)
    assert store.is_lazy
    with pytest.raises(LayoutError, match=r"^0\.weight: .*no shape yet \(lazy\)\. Run one batch"):
        store.read()
    model(torch.randn(4, 3))
    assert not store.is_lazy
    assert names(store) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]


def test_sharded_parameters_are_refused_by_name(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(LayoutError, match=r"^model: expected whole parameters, found a module under fully_shard.*Hook"):
        TorchParameters(model).layout()


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
def test_fsdp_wrapped_model_is_whole_inside_summon_full_params_only(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    wrapped = FSDP(nn.Sequential(nn.Linear(2, 2)), device_id=torch.device("cpu"), use_orig_params=True)
    store = TorchParameters(wrapped)
    with pytest.raises(LayoutError, match=r"FullyShardedDataParallel, which holds a shard of each.*summon_full_params"):
        store.layout()
    with FSDP.summon_full_params(wrapped, writeback=True):
        assert names(store) == ["0.weight", "0.bias"]
        store.write([np.full((2, 2), 3.0), np.full(2, 4.0)])
    with FSDP.summon_full_params(wrapped):
        assert [array.max() for array in store.read()] == [3.0, 4.0]


@pytest.mark.parametrize("wrap", [lambda m: m, compiled], ids=["plain", "compiled"])
def test_keras_model_is_sent_to_the_keras_adapter(wrap):
    # What Keras on torch looks like, without importing it: a torch module whose classes live in the keras package.
    base = type("TorchLayer", (nn.Module,), {"__module__": "keras.src.backend.torch.layer"})
    model = type("Mine", (base,), {"__module__": __name__})()
    with pytest.raises(ConfigurationError, match=r"Keras model Mine\. .*branchkey_integrations\.keras"):
        TorchParameters(wrap(model))


def test_keras_model_of_another_backend_is_sent_to_the_keras_adapter():
    model = type("Sequential", (), {"__module__": "keras.src.models.sequential"})()
    with pytest.raises(ConfigurationError, match=r"branchkey_integrations\.keras"):
        TorchParameters(model)


@pytest.mark.parametrize("thing", [None, {}, nn.Linear, lambda x: x, nn.Linear(1, 1).state_dict()])
def test_anything_but_a_module_is_refused(thing):
    with pytest.raises(ConfigurationError, match=r"expected a torch\.nn\.Module"):
        TorchParameters(thing)
