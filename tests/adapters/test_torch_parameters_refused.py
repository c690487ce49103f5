"""What TorchParameters refuses, with nothing of the model touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.torch.parameters import TorchParameters
from tests.support.torch_parameters import assert_same_bits, bits, compiled, names

torch.set_num_threads(1)


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
