"""The weighted mean: bit for bit the float64 mean rounded once, in the memory of about one layer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from branchkey_integrations.archive import Archive, write_archive
from branchkey_integrations.sandbox.mean import Stopped, WeightedMean, common_dtypes
from branchkey_integrations.sandbox.store import write_layers


def mean_of(leaves: Sequence[Sequence[np.ndarray]], weightings: Sequence[float]) -> list[np.ndarray]:
    dtypes = common_dtypes([[layer.dtype.name for layer in layers] for layers in leaves])
    return list(WeightedMean(leaves, weightings, dtypes))


def reference(arrays: Sequence[np.ndarray], weightings: Sequence[float]) -> np.ndarray:
    """The mean as numpy says it: products and sums in float64, one division, one rounding."""
    total = np.zeros(arrays[0].shape, np.float64)
    for array, weighting in zip(arrays, weightings):
        total = total + np.float64(weighting) * array.astype(np.float64)
    mean = total / np.float64(sum(weightings))
    return mean.astype(np.result_type(*arrays))


@st.composite
def leaves_of_one_layer(draw: st.DrawFn) -> tuple[list[np.ndarray], list[float]]:
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64"])))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    most = {"float16": 6e4, "float32": 2.0**120, "float64": 2.0**120}[dtype.name]
    most = float(dtype.type(most))
    values = st.floats(-most, most, width=dtype.itemsize * 8)
    count = draw(st.integers(1, 5))
    arrays = [draw(hnp.arrays(dtype, shape, elements=values)) for _ in range(count)]
    weightings = draw(st.lists(st.floats(1e-6, 1e9), min_size=count, max_size=count))
    return arrays, weightings


@settings(max_examples=300, deadline=None)
@given(leaves_of_one_layer())
def test_the_mean_is_the_float64_mean_rounded_once_bit_for_bit(case) -> None:
    arrays, weightings = case
    (mean,) = mean_of([[array] for array in arrays], weightings)
    expected = reference(arrays, weightings)
    assert mean.dtype == expected.dtype == arrays[0].dtype
    assert mean.shape == arrays[0].shape
    assert mean.tobytes() == expected.tobytes()


def test_a_layer_larger_than_a_block_is_summed_like_a_small_one() -> None:
    generator = np.random.default_rng(7)
    arrays = [generator.standard_normal((300, 401)).astype("f4") for _ in range(3)]
    weightings = [3.0, 0.1, 17.0]
    (mean,) = mean_of([[array] for array in arrays], weightings)
    assert mean.tobytes() == reference(arrays, weightings).tobytes()


def test_one_rounding_keeps_what_float32_sums_would_lose() -> None:
    # In float32 the sum 2**24 + 1 + 1 stays at 2**24, and its third part is another number.
    arrays = [np.array([value], "f4") for value in (2.0**24, 1.0, 1.0)]
    (mean,) = mean_of([[array] for array in arrays], [1.0, 1.0, 1.0])
    assert mean[0] == np.float32((2.0**24 + 2) / 3)
    assert mean[0] != (arrays[0] + arrays[1] + arrays[2])[0] / np.float32(3)


def test_weightings_of_1_and_2_give_two_thirds() -> None:
    (mean,) = mean_of([[np.zeros(2, "f4")], [np.ones(2, "f4")]], [1.0, 2.0])
    assert mean.tolist() == [float(np.float32(2 / 3))] * 2


@pytest.mark.parametrize("weightings", [[1e308, 1e308, 1e308], [5e-324, 5e-324, 5e-324], [1e-300, 1e-300, 1e-300]])
def test_extreme_weightings_neither_overflow_nor_vanish(weightings: list[float]) -> None:
    (mean,) = mean_of([[np.array([value], "f4")] for value in (1.0, 2.0, 6.0)], weightings)
    assert mean.tolist() == [3.0]


def test_values_at_the_end_of_float64_do_not_overflow() -> None:
    largest = np.finfo("f8").max
    (mean,) = mean_of([[np.array([largest, -largest])]] * 3, [1000.0, 2000.0, 500.0])
    assert mean.tolist() == pytest.approx([largest, -largest], rel=1e-15)
    assert np.isfinite(mean).all()


def test_the_shapes_of_scalars_and_empty_layers_stay() -> None:
    mean = mean_of(
        [[np.array(1.0, "f4"), np.empty((0, 3), "f8")], [np.array(3.0, "f4"), np.empty((0, 3), "f8")]], [1, 1]
    )
    assert [(layer.shape, layer.dtype.name) for layer in mean] == [((), "float32"), ((0, 3), "float64")]
    assert float(mean[0]) == 2.0


def test_integers_round_to_the_nearest_and_booleans_to_the_majority() -> None:
    leaves = [
        [np.array([1, 5, -7], "i8"), np.array([True, True, False])],
        [np.array([2, 5, -8], "i8"), np.array([False, True, False])],
        [np.array([2, 5, -8], "i8"), np.array([True, True, True])],
    ]
    integers, booleans = mean_of(leaves, [1, 1, 1])
    assert integers.dtype == np.int64
    assert integers.tolist() == [2, 5, -8]
    assert booleans.dtype == np.bool_
    assert booleans.tolist() == [True, True, False]


def test_the_largest_integers_stay_in_range() -> None:
    limits = np.iinfo("i8")
    (mean,) = mean_of([[np.array([limits.max, limits.min, 0], "i8")]] * 2, [1, 3])
    assert mean.tolist() == [limits.max, limits.min, 0]


def test_leaves_with_floats_of_different_width_share_the_wider() -> None:
    assert common_dtypes([["float16", "float32"], ["float32", "float64"]]) == [np.dtype("f4"), np.dtype("f8")]


def test_layers_are_positions_of_a_sequence() -> None:
    mean = WeightedMean([[np.array([float(i)], "f4") for i in range(3)]], [1.0], [np.dtype("f4")] * 3)
    assert len(mean) == 3
    assert [float(layer[0]) for layer in mean] == [0.0, 1.0, 2.0]
    assert float(mean[-1][0]) == 2.0
    assert [float(layer[0]) for layer in mean[1:]] == [1.0, 2.0]
    with pytest.raises(IndexError):
        mean[3]


def test_a_mean_that_is_told_to_stop_stops_before_the_next_layer() -> None:
    mean = WeightedMean([[np.zeros(1, "f4")]], [1.0], [np.dtype("f4")], stopped=lambda: True)
    with pytest.raises(Stopped):
        mean[0]


def test_averaging_archives_holds_about_one_layer(tmp_path) -> None:
    generator = np.random.default_rng(1)
    paths = [tmp_path / f"{leaf}.npz" for leaf in range(3)]
    for path in paths:
        write_archive(path, [generator.standard_normal((512, 512)).astype("f4") for _ in range(8)], 1.0)
    archives = [Archive.open(path) for path in paths]
    tracemalloc.start()
    try:
        write_layers(str(tmp_path / "mean.npz"), WeightedMean(archives, [1.0, 2.0, 3.0], [np.dtype("f4")] * 8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        for archive in archives:
            archive.close()
    # One layer is 1 MiB, its float64 sum 2 MiB; all layers of one leaf would be 8 MiB, of all leaves 24.
    assert peak < 4.5 * 2**20
    with Archive.open(tmp_path / "mean.npz") as mean:
        assert len(mean) == 8
        assert mean.weighting is None
