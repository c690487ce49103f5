"""What every ParameterStore promises; run for each kind of model by test_parameter_stores.py, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import LayoutError
from branchkey_integrations.parameters import ParameterStore
from tests.support.stores import small_store

KIND = os.environ["STORE_KIND"]


def _torch() -> tuple[ParameterStore, Callable[[], list[Any]]]:
    import torch

    from branchkey_integrations.torch import TorchParameters

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    return TorchParameters(model), lambda: [tensor.numpy().copy() for tensor in model.state_dict().values()]


def _keras() -> tuple[ParameterStore, Callable[[], list[Any]]]:
    import keras

    from branchkey_integrations.keras import KerasParameters

    layers = [keras.Input((2,)), keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    return KerasParameters(model), lambda: [np.array(each) for each in model.get_weights()]


def _numpy() -> tuple[ParameterStore, Callable[[], list[Any]]]:
    store = small_store()
    return store, lambda: [array.copy() for array in store.arrays.values()]


@pytest.fixture
def made() -> tuple[ParameterStore, Callable[[], list[Any]]]:
    return {"torch": _torch, "keras": _keras, "numpy": _numpy}[KIND]()


def same(left: list[Any], right: list[Any]) -> bool:
    return [each.tobytes() for each in left] == [each.tobytes() for each in right]


def test_it_reads_what_the_layout_says_into_arrays_of_its_own(made: Any) -> None:
    store, everything = made
    before = everything()
    arrays = store.read()
    assert [(array.shape, array.dtype.name) for array in arrays] == [
        (layer.shape, layer.dtype) for layer in store.layout()
    ]
    for array in arrays:
        array += 1
    assert same(everything(), before)


def test_what_was_read_can_be_written_back_and_changes_nothing(made: Any) -> None:
    store, everything = made
    before = everything()
    store.write(store.read())
    assert same(everything(), before)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2"])
def test_it_writes_the_values_whatever_the_width_and_byte_order(made: Any, dtype: str) -> None:
    store, _ = made
    wanted = [(array * 0 + index + 0.5).astype(np.float32) for index, array in enumerate(store.read())]
    store.write([array.astype(dtype) for array in wanted])
    assert same(store.read(), wanted)


def test_it_writes_from_an_archive_that_decodes_as_it_goes(made: Any, tmp_path: Path) -> None:
    store, _ = made
    wanted = [(array * 0 + index - 2).astype(np.float32) for index, array in enumerate(store.read())]
    write_archive(tmp_path / "a.npz", wanted)
    with Archive.open(tmp_path / "a.npz") as archive:
        store.write(archive)
    assert same(store.read(), wanted)


def _too_few(arrays: list[Any]) -> list[Any]:
    return arrays[:-1]


def _too_many(arrays: list[Any]) -> list[Any]:
    return [*arrays, arrays[0]]


def _broadcastable(arrays: list[Any]) -> list[Any]:
    return [*arrays[:-1], arrays[-1].reshape(-1)[:1].reshape(())]


def _transposed(arrays: list[Any]) -> list[Any]:
    return [np.ascontiguousarray(arrays[0].T), *arrays[1:]]


def _too_large(arrays: list[Any]) -> list[Any]:
    return [*arrays[:-1], np.full(arrays[-1].shape, 1e300)]


def _complex(arrays: list[Any]) -> list[Any]:
    return [*arrays[:-1], arrays[-1].astype("c8")]


@pytest.mark.parametrize("spoil", [_too_few, _too_many, _broadcastable, _transposed, _too_large, _complex])
def test_what_does_not_fit_raises_and_leaves_every_bit_of_the_model(made: Any, spoil: Callable[..., Any]) -> None:
    store, everything = made
    before = everything()
    # The first layers would fit and differ: a store that writes as it checks is found out.
    with pytest.raises(LayoutError):
        store.write(spoil([array + 1 for array in store.read()]))
    assert same(everything(), before)


def test_damage_that_shows_in_the_last_layer_leaves_every_bit_of_the_model(made: Any, tmp_path: Path) -> None:
    from branchkey_integrations.errors import ArchiveError

    store, everything = made
    before = everything()
    path = tmp_path / "a.npz"
    write_archive(path, [array + 1 for array in store.read()], compression="store")
    content = bytearray(path.read_bytes())
    last = (store.read()[-1] + 1).tobytes()
    content[content.rindex(last)] ^= 1
    path.write_bytes(content)
    with Archive.open(path) as archive, pytest.raises(ArchiveError):
        store.write(archive)
    assert same(everything(), before)
