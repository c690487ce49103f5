"""What TorchParameters reads from live modules and what it writes: every type, layout and mode."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import LayoutError
from branchkey_integrations.torch.parameters import TorchParameters
from tests.support.torch_parameters import Net, assert_same_bits, bits, names

torch.set_num_threads(1)


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
