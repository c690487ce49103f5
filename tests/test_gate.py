"""What an aggregate must pass, and that it passes when it should."""

from __future__ import annotations

import math
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

from branchkey_integrations.errors import AggregateRejectedError, ConfigurationError
from branchkey_integrations.gate import Gate, squared_norm
from branchkey_integrations.parameters import LayerSpec, Layout

LAYOUT = Layout((LayerSpec("weight", (2, 2), "float32"), LayerSpec("bias", (2,), "float16")))


def arrays(weight: Any = 1.0, bias: Any = 2.0, weight_dtype: str = "f4", bias_dtype: str = "f4") -> list[np.ndarray]:
    return [np.full((2, 2), weight, weight_dtype), np.full(2, bias, bias_dtype)]


def test_a_good_aggregate_passes_and_its_norm_is_given() -> None:
    assert Gate().check("a1", arrays(), LAYOUT) == pytest.approx(math.sqrt(4 * 1 + 2 * 4), rel=1e-15)
    assert Gate().check("a1", [], Layout(())) == 0.0
    empty = Layout((LayerSpec("none", (0, 3), "float32"),))
    assert Gate().check("a1", [np.empty((0, 3), "f4")], empty) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_a_number_that_is_not_finite_is_refused_and_counted(bad: float, dtype: str) -> None:
    layers = arrays(bias_dtype=dtype)
    layers[1][1] = bad
    with pytest.raises(AggregateRejectedError) as caught:
        Gate().check("a1", layers, LAYOUT)
    assert caught.value.aggregation_id == "a1"
    assert str(caught.value).startswith("aggregate a1, layer_1 (bias): expected finite numbers, found 1 of 2 NaN")


@pytest.mark.parametrize(
    ("layers", "named", "found"),
    [
        ([np.ones((2, 2), "f4")], "2 layers", "1"),
        ([*arrays(), np.ones(1, "f4")], "2 layers", "3"),
        ([np.ones(4, "f4"), np.ones(2, "f4")], r"layer_0 (weight)", "(4,)"),
        ([np.ones((2, 2), "f4"), np.ones(1, "f4")], r"layer_1 (bias)", "(1,)"),
        ([np.ones((2, 2), "c8"), np.ones(2, "f4")], r"layer_0 (weight)", "complex64"),
        ([np.full((2, 2), "x"), np.ones(2, "f4")], r"layer_0 (weight)", "<U1"),
        (arrays(weight=1e39, weight_dtype="f8"), r"layer_0 (weight)", "1e+39"),
        (arrays(bias=70000.0), r"layer_1 (bias)", "70000"),
        (arrays(bias=70000, bias_dtype="i4"), r"layer_1 (bias)", "70000"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(layers: list[np.ndarray], named: str, found: str) -> None:
    with pytest.raises(AggregateRejectedError, match=re.escape(named)) as caught:
        Gate().check("a1", layers, LAYOUT)
    assert found in caught.value.found
    assert "aggregate a1" in str(caught.value)


def test_values_at_the_edge_of_the_model_pass() -> None:
    top = arrays(weight=float(np.finfo("f4").max), bias=65504.0, weight_dtype="f8", bias_dtype="f8")
    Gate().check("a1", top, LAYOUT)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (2.9, True), (3.1, False), (0.34, True), (0.3, False)])
def test_the_norm_may_change_by_its_ratio_in_either_direction(scale: float, passes: bool) -> None:
    gate = Gate(max_norm_ratio=3)
    reference = gate.check("a0", arrays(), LAYOUT)
    scaled = arrays(scale, 2 * scale)
    if passes:
        assert gate.check("a1", scaled, LAYOUT, reference) == pytest.approx(scale * reference, rel=1e-6)
        return
    with pytest.raises(AggregateRejectedError, match=r"a1, its norm: expected within 3 times") as caught:
        gate.check("a1", scaled, LAYOUT, reference)
    assert caught.value.aggregation_id == "a1"


def test_the_norm_is_not_judged_without_a_limit_or_a_reference() -> None:
    assert Gate().check("a1", arrays(1e6), LAYOUT, 1e-6) > 1e6
    assert Gate(max_norm_ratio=2).check("a1", arrays(1e6), LAYOUT, None) > 1e6
    assert Gate(max_norm_ratio=2).check("a1", arrays(1e6), LAYOUT, 0.0) > 1e6


def test_an_aggregate_of_zeros_is_out_of_proportion() -> None:
    with pytest.raises(AggregateRejectedError, match="its norm"):
        Gate(max_norm_ratio=100).check("a1", arrays(0, 0), LAYOUT, 1.0)


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        (0.9, 0.9, True),
        (0.9, 0.95, True),
        (0.9, 0.86, True),
        (0.9, 0.84, False),
        (0.9, float("nan"), False),
        (0.9, float("-inf"), False),
        (float("nan"), 0.1, True),
        (None, None, True),
    ],
)
def test_the_metric_may_drop_by_its_limit(before: float | None, after: float | None, passes: bool) -> None:
    gate = Gate(max_metric_drop=0.05, metric=lambda: 1.0)
    if passes:
        gate.check_score("a1", before, after)
        return
    with pytest.raises(AggregateRejectedError, match="a1, your metric") as caught:
        gate.check_score("a1", before, after)
    assert caught.value.aggregation_id == "a1"


def test_the_metric_becomes_a_plain_number() -> None:
    assert Gate().score() is None
    score = Gate(max_metric_drop=0, metric=lambda: np.float32(0.5)).score()
    assert (type(score), score) == (float, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm_ratio": 1},
        {"max_norm_ratio": 0.5},
        {"max_norm_ratio": float("nan")},
        {"max_norm_ratio": float("inf")},
        {"max_norm_ratio": True},
        {"max_norm_ratio": "10"},
        {"max_metric_drop": -0.1, "metric": lambda: 1.0},
        {"max_metric_drop": float("nan"), "metric": lambda: 1.0},
        {"max_metric_drop": 0.1},
        {"metric": lambda: 1.0},
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"gate {next(iter(options))}|gate max_metric_drop and metric"):
        Gate(**options)


def test_a_limit_without_a_metric_says_that_both_are_needed() -> None:
    with pytest.raises(ConfigurationError, match="max_metric_drop and metric: expected both or neither"):
        Gate(max_metric_drop=0.1)


def test_the_norm_is_summed_in_double_precision_without_a_copy_of_the_layer() -> None:
    large = np.full(4_000_000, 1e-4, "f4")
    tracemalloc.start()
    total = squared_norm(large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == pytest.approx(4e6 * float(np.float32(1e-4)) ** 2, rel=1e-9)
    assert peak < 2_000_000
    assert squared_norm(np.full(3, 1e25, "f4")) == pytest.approx(3e50, rel=1e-6)
    assert squared_norm(np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3))) == 55.0
    assert squared_norm(np.array(2.0)) == 4.0
