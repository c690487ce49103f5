"""Checking an aggregate without loading it: what passes, what does not, what is remembered."""

from __future__ import annotations

import io
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.errors import ArchiveError, LayoutError
from branchkey_integrations.parallel import WORTH_BYTES
from branchkey_integrations.parameters import LayerSpec, Layout
from branchkey_integrations.screening import screen
from tests.support.archives import npz

LAYOUT = Layout((LayerSpec("a", (3, 4), "float32"), LayerSpec("b", (2,), "float16"), LayerSpec("c", (), "int64")))
GOOD: list[Any] = [np.arange(12, dtype="f4").reshape(3, 4), np.array([3, 4], "f2"), np.array(2)]
NORM = sum(range(1, 12)) * 23 / 3 + 25 + 4


def archived(arrays: list[Any], **options: Any) -> Archive:
    file = io.BytesIO()
    write_archive(file, arrays, **options)
    return Archive.open(file)


@pytest.mark.parametrize("compression", ["deflate", "store"])
def test_a_sound_archive_passes_and_remembers_what_for(compression: str) -> None:
    archive = archived(GOOD, compression=compression)
    assert archive.checked_for is None
    assert screen(archive, LAYOUT) == pytest.approx(NORM)
    assert archive.checked_for is LAYOUT


def test_arrays_pass_as_well() -> None:
    assert screen(GOOD, LAYOUT) == pytest.approx(NORM)


@pytest.mark.parametrize("arrays", [[GOOD[0].astype(">f8"), *GOOD[1:]], [np.asfortranarray(GOOD[0]), *GOOD[1:]]])
def test_other_byte_orders_widths_and_axes_are_read_right(arrays: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(npz({f"layer_{index}": array for index, array in enumerate(arrays)}))
    with Archive.open(path) as archive:
        assert screen(archive, LAYOUT) == pytest.approx(NORM)


@pytest.mark.parametrize("as_archive", [True, False])
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, np.nan, r"layer_0 \(a\): expected finite numbers, found 2 of 12 NaN or infinite"),
        (0, -np.inf, r"layer_0 \(a\): expected finite numbers, found 2 of 12 NaN or infinite"),
        (1, 65_520.0, r"layer_1 \(b\): expected values from -65504 to 65504, the range of float16, found 65520"),
    ],
)
def test_values_that_do_not_fit_are_named(as_archive: bool, place: int, value: float, message: str) -> None:
    arrays = [GOOD[0].copy(), GOOD[1].astype("f4"), GOOD[2]]
    arrays[place].reshape(-1)[[0, 1]] = value
    layers = archived(arrays) if as_archive else arrays
    with pytest.raises(LayoutError, match=message):
        screen(layers, LAYOUT)
    assert getattr(layers, "checked_for", None) is None


def test_nan_passes_where_the_store_alone_asks() -> None:
    arrays = [GOOD[0].copy(), *GOOD[1:]]
    arrays[0][0, 0] = np.nan
    assert math.isnan(screen(archived(arrays), LAYOUT, finite=False))


def test_damage_is_found_and_not_remembered_as_sound() -> None:
    file = io.BytesIO()
    write_archive(file, GOOD, compression="store")
    content = bytearray(file.getvalue())
    content[content.rindex(GOOD[1].tobytes())] ^= 1
    archive = Archive.open(io.BytesIO(bytes(content)))
    with pytest.raises(ArchiveError, match=r"layer_1: .*CRC"):
        screen(archive, LAYOUT)
    assert archive.checked_for is None


def test_shapes_are_checked_before_anything_is_unpacked() -> None:
    with pytest.raises(LayoutError, match=r"layer_1 \(b\): expected shape \(2,\), found shape \(3,\)"):
        screen(archived([GOOD[0], np.zeros(3, "f2"), GOOD[2]]), LAYOUT)


def test_large_layers_take_a_few_pieces_of_memory_and_give_the_norm_of_all() -> None:
    layer = np.full(WORTH_BYTES // 4, 0.5, "f4")
    archive = archived([layer, layer, layer])
    layout = Layout(tuple(LayerSpec(name, layer.shape, "float32") for name in "abc"))
    tracemalloc.start()
    try:
        total = screen(archive, layout)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert total == 3 * layer.size * 0.25


def test_damage_in_a_large_layer_is_found_by_whichever_thread_reads_it() -> None:
    file = io.BytesIO()
    layer = np.arange(WORTH_BYTES // 4, dtype="f4")
    write_archive(file, [layer, layer], compression="store")
    content = bytearray(file.getvalue())
    content[-1_000_000] ^= 255
    archive = Archive.open(io.BytesIO(bytes(content)))
    layout = Layout(tuple(LayerSpec(name, layer.shape, "float32") for name in "ab"))
    with pytest.raises(ArchiveError, match=r"layer_1: .*CRC"):
        screen(archive, layout)
