"""The layout of a model: what fits it, what does not, and which parameters belong to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.parameters import LayerSpec, Layout, Selector

WEIGHT = LayerSpec("fc.weight", (3, 2), "float32")
BIAS = LayerSpec("fc.bias", (3,), "float32")
LAYOUT = Layout((WEIGHT, BIAS))


def _arrays(layout: Layout) -> list[np.ndarray]:
    return [np.zeros(layer.shape, "f4") for layer in layout]


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        ("float16", 65504.0),
        ("float32", float(np.finfo("f4").max)),
        ("float64", float(np.finfo("f8").max)),
        ("bfloat16", 3.3895313892515355e38),
        ("float8_e4m3fn", 448.0),
        ("float8_e5m2", 57344.0),
        ("int8", 127),
        ("uint8", 255),
        ("int64", 2**63 - 1),
        ("bool", 1),
    ],
)
def test_the_largest_value_of_each_dtype(dtype: str, largest: float) -> None:
    assert LayerSpec("x", (), dtype).largest == largest


@pytest.mark.parametrize(
    ("dtype", "is_float"),
    [
        ("float16", True),
        ("bfloat16", True),
        ("float8_e5m2", True),
        ("int64", False),
        ("bool", False),
        ("complex64", False),
    ],
)
def test_which_dtypes_are_floating_point(dtype: str, is_float: bool) -> None:
    assert LayerSpec("x", (), dtype).is_float is is_float


def test_a_layer_is_shown_by_name_dtype_and_shape() -> None:
    assert str(WEIGHT) == "fc.weight float32[3, 2]"
    assert str(LayerSpec("scale", (), "bfloat16")) == "scale bfloat16[]"


def test_a_layout_is_a_sequence_of_its_layers() -> None:
    assert len(LAYOUT) == 2
    assert list(LAYOUT) == [WEIGHT, BIAS]
    assert Layout((WEIGHT, BIAS)) == LAYOUT
    assert Layout((BIAS, WEIGHT)) != LAYOUT


@pytest.mark.parametrize(
    "other",
    [
        Layout((BIAS, WEIGHT)),
        Layout((WEIGHT,)),
        Layout((WEIGHT, dataclasses.replace(BIAS, name="fc.b"))),
        Layout((WEIGHT, dataclasses.replace(BIAS, shape=(1, 3)))),
        Layout((WEIGHT, dataclasses.replace(BIAS, dtype="float16"))),
    ],
)
def test_the_fingerprint_tells_order_count_name_shape_and_dtype(other: Layout) -> None:
    assert other.fingerprint != LAYOUT.fingerprint
    assert len(LAYOUT.fingerprint) == 64


def test_the_fingerprint_is_the_same_on_every_machine() -> None:
    # Leaves compare it with each other; a change here shuts out the leaves that were not updated.
    assert LAYOUT.fingerprint == "80099c4efe39980dba7b53d9ffdacfc8aed286c41b1baeb458c72bfdbf0f3da4"


def test_names_cannot_be_moved_into_shapes_without_changing_the_fingerprint() -> None:
    assert (
        Layout((LayerSpec('a",[1],"float32', (1,), "float32"),)).fingerprint
        != Layout((LayerSpec("a", (1,), "float32"), LayerSpec("float32", (1,), "float32"))).fingerprint
    )


def test_the_same_layout_has_no_differences() -> None:
    assert LAYOUT.differences(Layout((WEIGHT, BIAS))) == []
    LAYOUT.require_same(Layout((WEIGHT, BIAS)))


def test_differences_name_what_was_and_what_is() -> None:
    other = Layout((WEIGHT, dataclasses.replace(BIAS, dtype="float16"), BIAS))
    assert LAYOUT.differences(other) == ["2 layers became 3", "layer_1 was fc.bias float32[3], is fc.bias float16[3]"]


def test_a_changed_layout_is_refused_with_the_first_five_differences() -> None:
    before = Layout(tuple(LayerSpec(f"l{i}", (i,), "float32") for i in range(8)))
    after = Layout(tuple(LayerSpec(f"m{i}", (i,), "float32") for i in range(8)))
    with pytest.raises(LayoutError) as caught:
        before.require_same(after)
    assert caught.value.found.startswith("layer_0 was l0 float32[0], is m0 float32[0]; layer_1 was")
    assert "layer_4" in caught.value.found
    assert "layer_5" not in caught.value.found
    assert caught.value.found.endswith(" (and 3 more)")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_layers_names_both_numbers(count: int) -> None:
    with pytest.raises(LayoutError) as caught:
        LAYOUT.check([np.zeros((3, 2), "f4")] * count)
    assert str(caught.value).startswith(f"aggregate: expected 2 layers, found {count}. ")


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (1, 2), (), (6,), (3, 2, 1)])
def test_a_shape_that_numpy_would_broadcast_or_reshape_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        LAYOUT.check([np.zeros(shape, "f4"), np.zeros(3, "f4")])
    assert str(caught.value).startswith(f"layer_0 (fc.weight): expected shape (3, 2), found shape {shape}. ")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i8", "u1", "?"])
def test_numbers_that_a_float_parameter_can_take(dtype: str) -> None:
    LAYOUT.check([np.zeros((3, 2), dtype), np.zeros(3, dtype)])


@pytest.mark.parametrize("dtype", ["c8", "O", "U3", "S3", "V4", "M8[s]", "m8[s]"])
def test_what_is_no_real_number_is_refused_by_dtype(dtype: str) -> None:
    with pytest.raises(LayoutError) as caught:
        LAYOUT.check_headers([np.zeros((3, 2), dtype), np.zeros(3, "f4")])
    assert caught.value.what == "layer_0 (fc.weight)"
    assert caught.value.found == f"dtype {np.dtype(dtype)}"


def test_a_counter_is_not_filled_with_fractions() -> None:
    layout = Layout((LayerSpec("bn.num_batches_tracked", (), "int64"),))
    layout.check([np.array(7)])
    with pytest.raises(LayoutError, match="can become int64"):
        layout.check([np.array(7.0)])


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        ("float16", 65504.0, True),
        ("float16", -65504.0, True),
        ("float16", 70000.0, False),
        ("float16", -70000.0, False),
        ("float32", 1e39, False),
        ("float32", 3e38, True),
        ("bfloat16", 3.3895313892515355e38, True),
        ("bfloat16", 3.4e38, False),
        ("float8_e4m3fn", 448.0, True),
        ("float8_e4m3fn", 449.0, False),
        ("float8_e5m2", 57344.0, True),
    ],
)
def test_a_value_that_would_become_infinite_is_refused(dtype: str, value: float, fits: bool) -> None:
    layout = Layout((LayerSpec("w", (2,), dtype),))
    array = np.array([0.0, value], "f8")
    if fits:
        layout.check([array])
        return
    with pytest.raises(LayoutError) as caught:
        layout.check([array])
    assert caught.value.what == "layer_0 (w)"
    assert caught.value.found == f"{value:g}"


@pytest.mark.parametrize(
    ("dtype", "value"), [("int8", 128), ("int8", -129), ("uint8", 256), ("uint8", -1), ("bool", 2)]
)
def test_an_integer_that_would_wrap_around_is_refused(dtype: str, value: int) -> None:
    layout = Layout((LayerSpec("n", (1,), dtype),))
    with pytest.raises(LayoutError, match=r"layer_0 \(n\)"):
        layout.check([np.array([value], "i8")])


def test_an_unsigned_number_beyond_a_signed_parameter_is_refused_exactly() -> None:
    layout = Layout((LayerSpec("n", (1,), "int64"),))
    layout.check([np.array([2**63 - 1], "u8")])
    with pytest.raises(LayoutError):
        layout.check([np.array([2**63], "u8")])


@pytest.mark.parametrize("value", [-128, 127])
def test_the_whole_range_of_an_integer_fits(value: int) -> None:
    Layout((LayerSpec("n", (1,), "int8"),)).check([np.array([value], "i8")])


def test_the_smallest_integer_has_no_absolute_value_and_is_still_seen() -> None:
    layout = Layout((LayerSpec("n", (1,), "float16"),))
    with pytest.raises(LayoutError, match=r"found -9\.22337e\+18"):
        layout.check([np.array([np.iinfo("i8").min])])


def test_nan_and_infinity_are_left_to_the_gate() -> None:
    LAYOUT.check([np.full((3, 2), np.nan, "f8"), np.array([np.inf, -np.inf, 0], "f8")])


def test_an_empty_layer_fits() -> None:
    Layout((LayerSpec("w", (0, 3), "float16"),)).check([np.zeros((0, 3), "f8")])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=5))
def test_exactly_what_float16_cannot_hold_is_refused(values: list[float]) -> None:
    array = np.array(values, "f8")
    finite = array[np.isfinite(array)]
    layout = Layout((LayerSpec("w", array.shape, "float16"),))
    if np.all(np.abs(finite) <= 65504.0):
        layout.check([array])
    else:
        with pytest.raises(LayoutError):
            layout.check([array])


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        ("all", ["encoder.weight", "encoder.bias", "head.weight", "Head.weight"]),
        ("trainable", ["head.weight", "Head.weight"]),
        ("encoder.*", ["encoder.weight", "encoder.bias"]),
        (["encoder.bias", "head.*"], ["encoder.bias", "head.weight"]),
        (("*.bias",), ["encoder.bias"]),
        ("encoder", []),
        (lambda name, tensor: tensor > 1, ["encoder.bias", "head.weight", "Head.weight"]),
        (lambda name, tensor: name == "head.weight", ["head.weight"]),
    ],
)
def test_a_selection_keeps_what_it_says(selection: Any, chosen: list[str]) -> None:
    parameters = [
        ("encoder.weight", 1, False),
        ("encoder.bias", 2, False),
        ("head.weight", 3, True),
        ("Head.weight", 4, True),
    ]
    selector = Selector(selection)
    assert [name for name, tensor, trainable in parameters if selector(name, tensor, trainable)] == chosen


def test_a_function_may_answer_with_anything_that_has_a_truth() -> None:
    answers: list[Any] = [np.bool_(True), ""]
    assert Selector(lambda name, tensor: answers[0])("w", None, False) is True
    assert Selector(lambda name, tensor: answers[1])("w", None, True) is False


@pytest.mark.parametrize("selection", ["", [], (), [""], ["a", 5], 5, None, b"all", [b"a"], True])
def test_what_selects_nothing_by_its_form_is_refused(selection: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Selector(selection)
    assert caught.value.what == "parameters"
    assert caught.value.found == repr(selection)


def test_a_selection_that_keeps_nothing_names_some_of_what_is_there() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Selector("decoder.*").require_some(0, [f"l{i}" for i in range(7)])
    assert caught.value.what == "parameters='decoder.*'"
    assert caught.value.found == "none among 7 (l0, l1, l2, l3, l4, …)"


def test_a_model_without_parameters_says_so() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Selector(lambda name, tensor: True).require_some(0, [])
    assert caught.value.what == "parameters (your function)"
    assert caught.value.found == "a model without parameters"


def test_one_parameter_is_enough() -> None:
    Selector("trainable").require_some(1, ["w"])
