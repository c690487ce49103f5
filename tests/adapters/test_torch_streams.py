"""A model that is sent from its own memory and loaded into it: bit for bit, in little memory, and never half."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from branchkey_integrations import in_place
from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.archive_stream import ByteSource
from branchkey_integrations.errors import ArchiveError, LayoutError, MixedModelError
from branchkey_integrations.parallel import WORTH_BYTES
from branchkey_integrations.screening import screen
from branchkey_integrations.torch import TorchParameters
from branchkey_integrations.torch import streams as under_test
from tests.support.archives import npz

torch.set_num_threads(1)


class Holder(nn.Module):
    """Hold tensors as parameters, in order."""

    def __init__(self, *tensors):
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_parameter(f"p{index}", nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def private(arrays, **options):
    file = io.BytesIO()
    write_archive(file, arrays, **options)
    return Archive.open(file, private=True)


def mixed_tensors():
    """Every way in which a tensor can lie in memory."""
    torch.manual_seed(1)
    wide = torch.randn(5, 7, 3)
    return [
        torch.randn(4, 3),
        torch.randn(4, 3).bfloat16(),
        torch.randn(6).to(torch.float8_e4m3fn),
        torch.randn(3, 2).half(),
        torch.randn(2, 5, dtype=torch.float64),
        torch.tensor(3.5),
        torch.tensor(1.5).bfloat16(),
        torch.empty(0, 3),
        torch.arange(6).reshape(2, 3),
        wide[:, ::2, 1],  # strided
        torch.randn(3, 4).t().bfloat16(),  # neither contiguous nor numpy's
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(left, right):
    return all(
        a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
        for a, b in zip(left, right)
    )


# ---- sending ------------------------------------------------------------------------------------------------------


def test_what_is_viewed_is_what_would_be_read():
    store = TorchParameters(Holder(*mixed_tensors()))
    viewed, read = store.view(), store.read()
    assert [(each.shape, each.dtype) for each in viewed] == [(each.shape, each.dtype) for each in read]
    assert [np.asarray(each).tobytes() for each in viewed] == [each.tobytes() for each in read]
    through_view, through_read = io.BytesIO(), io.BytesIO()
    assert write_archive(through_view, viewed, 1, finite=True) == write_archive(through_read, read, 1)
    assert through_view.getvalue() == through_read.getvalue()


def test_a_view_is_live_where_numpy_can_have_one_and_small_where_it_cannot():
    model = Holder(torch.zeros(4), torch.zeros(3_000_000).bfloat16())
    live, stream = TorchParameters(model).view()
    with torch.no_grad():
        model.p0.fill_(7.0)
        model.p1.fill_(2.0)
    assert live.tolist() == [7.0] * 4
    assert stream.nbytes == 12_000_000
    tracemalloc.start()
    try:
        with open("/dev/null", "wb") as nowhere:
            write_archive(nowhere, [stream], 1)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    assert {float(value) for piece in stream.pieces(100_000) for value in piece[::50_000]} == {2.0}


def test_a_view_says_what_cannot_be_a_layer():
    with pytest.raises(LayoutError, match="p0: expected a dense tensor of real numbers, found complex complex64"):
        TorchParameters(Holder(torch.ones(2, dtype=torch.complex64))).view()


# ---- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["deflate", "store"])
def test_loading_in_place_gives_the_bits_that_loading_a_list_gives(compression):
    torch.manual_seed(2)
    arrays = [np.asarray(torch.randn(t.shape, dtype=torch.float32) * 3) for t in mixed_tensors()]
    arrays[8] = np.array([[5, -6, 7], [8, 9, 2**40]])
    in_place, staged = Holder(*mixed_tensors()), Holder(*mixed_tensors())
    memory = [parameter.data_ptr() for parameter in in_place.parameters()]
    strides = [parameter.stride() for parameter in in_place.parameters()]
    TorchParameters(in_place).write(private(arrays, compression=compression))
    TorchParameters(staged).write(arrays)
    assert same(values(in_place), values(staged))
    assert [parameter.data_ptr() for parameter in in_place.parameters()] == memory
    assert [parameter.stride() for parameter in in_place.parameters()] == strides
    assert all(parameter.grad_fn is None and parameter.is_leaf for parameter in in_place.parameters())


@pytest.mark.parametrize(
    "turn", [lambda a: a.astype(">f4"), lambda a: a.astype("f8"), np.asfortranarray, lambda a: a * 1]
)
def test_other_widths_byte_orders_and_axes_are_taken(turn):
    wanted = np.arange(12, dtype="f4").reshape(3, 4)
    model = Holder(torch.zeros(3, 4), torch.zeros(3, 4).bfloat16())
    data = npz({"layer_0": turn(wanted), "layer_1": turn(wanted)})
    TorchParameters(model).write(Archive.open(io.BytesIO(data), private=True))
    assert model.p0.tolist() == wanted.tolist()
    assert model.p1.tolist() == wanted.tolist()


def test_a_large_model_is_loaded_in_a_few_pieces_of_memory_over_threads():
    wanted = np.random.default_rng(0).normal(size=WORTH_BYTES // 4).astype("f4")
    archive = private([wanted, wanted[::-1], wanted], compression="store")
    model = Holder(*(torch.zeros(wanted.size) for _ in range(2)), torch.zeros(wanted.size).bfloat16())
    tracemalloc.start()
    try:
        TorchParameters(model).write(archive)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert np.array_equal(model.p0.detach().numpy(), wanted)
    assert np.array_equal(model.p1.detach().numpy(), wanted[::-1])
    assert model.p2.equal(torch.from_numpy(wanted).bfloat16())


def test_a_backward_pass_that_needs_the_old_values_is_refused():
    model = nn.Linear(3, 1)
    loss = model(torch.ones(1, 3, requires_grad=True)).sum()
    TorchParameters(model).write(private([np.ones((1, 3), "f4"), np.ones(1, "f4")]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_made_in_inference_mode_can_be_loaded():
    with torch.inference_mode():
        model = nn.Linear(2, 1)
    TorchParameters(model).write(private([np.full((1, 2), 3.0, "f4"), np.zeros(1, "f4")]))
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_parameters_that_share_memory_are_loaded_in_order_so_that_the_last_one_wins(monkeypatch):
    seen = []
    original = in_place.over_layers

    def watched(sizes, work, *, alone):
        seen.append(alone)
        return original(sizes, work, alone=alone)

    monkeypatch.setattr(in_place, "over_layers", watched)
    memory = torch.zeros(10)
    TorchParameters(Holder(memory[:6], memory[4:])).write(private([np.ones(6, "f4"), np.full(6, 2.0, "f4")]))
    assert memory.tolist() == [1.0] * 4 + [2.0] * 6
    TorchParameters(Holder(torch.zeros(6), torch.zeros(6))).write(private([np.ones(6, "f4"), np.ones(6, "f4")]))
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda arrays: arrays[:-1], LayoutError, "expected 2 layers, found 1"),
        (lambda arrays: [arrays[0], arrays[1].reshape(1, 1)], LayoutError, "expected shape"),
        (lambda arrays: [arrays[0], np.array([1e300])], LayoutError, "the range of float32"),
    ],
)
def test_what_does_not_fit_leaves_every_bit(spoil, error, message):
    model = nn.Linear(3, 1)
    before = values(model)
    with pytest.raises(error, match=message):
        TorchParameters(model).write(private(spoil([np.ones((1, 3), "f4"), np.ones(1, "f4")])))
    assert same(values(model), before)


def test_damage_in_the_last_layer_leaves_every_bit():
    file = io.BytesIO()
    write_archive(file, [np.ones((1, 3), "f4"), np.full(1, 5.0, "f4")], compression="store")
    content = bytearray(file.getvalue())
    content[content.rindex(np.full(1, 5.0, "f4").tobytes())] ^= 1
    model = nn.Linear(3, 1)
    before = values(model)
    with pytest.raises(ArchiveError, match=r"layer_1: .*CRC"):
        TorchParameters(model).write(Archive.open(io.BytesIO(bytes(content)), private=True))
    assert same(values(model), before)


def test_what_the_gate_has_checked_for_this_layout_is_not_checked_again(monkeypatch):
    checks = []
    monkeypatch.setattr(in_place, "screen", lambda *args, **options: checks.append(options))
    store = TorchParameters(nn.Linear(3, 1))
    archive = private([np.ones((1, 3), "f4"), np.ones(1, "f4")])
    store.write(archive)
    assert checks == [{"finite": False}]
    screen(archive, store.layout())
    store.write(archive)
    assert len(checks) == 1
    # Checked for another model, it is checked again.
    archive.checked_for = TorchParameters(nn.Linear(3, 1).half()).layout()
    store.write(archive)
    assert len(checks) == 2


def test_an_archive_that_others_can_change_is_decoded_before_the_first_parameter_is_touched():
    model = nn.Linear(3, 1)
    archive = private([np.ones((1, 3), "f4"), np.ones(1, "f4")])
    archive.private = False
    before = values(model)
    seen = []
    original = Archive.__getitem__

    class Watching(Archive):
        def __getitem__(self, index):
            seen.append(same(values(model), before))
            return original(self, index)

    archive.__class__ = Watching
    TorchParameters(model).write(archive)
    assert seen == [True, True]
    assert model.bias.tolist() == [1.0]


# ---- stopped in the middle ----------------------------------------------------------------------------------------

WANTED = [np.full((2, 2), 1.0, "f4"), np.full(2, 2.0, "f4"), np.full((2, 2), 3.0, "f4"), np.full(2, 4.0, "f4")]


def stopped_at(monkeypatch, error, *calls):
    """Raise ``error`` instead of filling the layers of these calls, counted from 1."""
    count = []
    original = under_test._fill

    def fill(tensor, archive, index):
        count.append(index)
        if len(count) in calls:
            raise error
        original(tensor, archive, index)

    monkeypatch.setattr(under_test, "_fill", fill)
    return count


class Alarm(Exception):
    """What a user's signal handler may raise."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), Alarm()])
@pytest.mark.parametrize("calls", [(1,), (3,), (3, 6)])
def test_an_interrupt_waits_until_the_model_is_the_aggregate(monkeypatch, error, calls):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    filled = stopped_at(monkeypatch, error, *calls)
    with pytest.raises(type(error)):
        TorchParameters(model).write(private(WANTED))
    assert same(values(model), [torch.from_numpy(each) for each in WANTED])
    assert filled[-4:] == [0, 1, 2, 3]


def test_a_read_error_that_passes_is_none(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stopped_at(monkeypatch, ArchiveError(what="layer_2"), 3)
    TorchParameters(model).write(private(WANTED))
    assert same(values(model), [torch.from_numpy(each) for each in WANTED])


def test_a_disk_that_fails_after_the_check_leaves_an_error_of_its_own(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    monkeypatch.setattr("branchkey_integrations.archive_read.keep", lambda _: None)
    store, archive = TorchParameters(model), private(WANTED)
    screen(archive, store.layout())
    original = ByteSource.read_at

    def failing(self, offset, count):
        if offset > archive._table.start(2):
            raise ArchiveError(what="file", found="Input/output error")
        return original(self, offset, count)

    monkeypatch.setattr(ByteSource, "read_at", failing)
    with pytest.raises(MixedModelError, match="model: expected the aggregate in every layer, found some layers of"):
        store.write(archive)
    monkeypatch.undo()
    store.write(archive)  # what the message says: collecting it again mends the model
    assert same(values(model), [torch.from_numpy(each) for each in WANTED])


def failing_with(monkeypatch, *errors):
    """Raise these, one a pass, when the third layer is filled."""
    left = list(errors)
    original = under_test._fill

    def fill(tensor, archive, index):
        if index == 2 and left:
            raise left.pop(0)
        original(tensor, archive, index)

    monkeypatch.setattr(under_test, "_fill", fill)


def test_an_interrupt_is_not_forgotten_over_a_disk_that_fails_once(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    failing_with(monkeypatch, KeyboardInterrupt(), ArchiveError(what="layer_2"))
    with pytest.raises(KeyboardInterrupt):
        TorchParameters(model).write(private(WANTED))
    assert same(values(model), [torch.from_numpy(each) for each in WANTED])


def test_memory_that_runs_out_is_not_called_a_disk(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    failing_with(monkeypatch, *[torch.OutOfMemoryError("CUDA out of memory")] * 3)
    with pytest.raises(MixedModelError, match=r"loading ended in OutOfMemoryError, 3 times.*check memory and device"):
        TorchParameters(model).write(private(WANTED))
    monkeypatch.undo()
    TorchParameters(model).write(private(WANTED))
    assert same(values(model), [torch.from_numpy(each) for each in WANTED])
