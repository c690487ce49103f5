"""The options of every adapter: their defaults, what is refused, and what a round weighs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from branchkey_integrations.errors import ConfigurationError, WeightingError
from branchkey_integrations.gate import Gate
from branchkey_integrations.options import RoundOptions, finite_metrics


def test_the_defaults_are_the_documented_ones() -> None:
    options = RoundOptions()
    assert (options.weighting, options.every_n_epochs, options.timeout_s, options.wait) == ("samples", 1, 600.0, True)
    assert (options.on_error, options.parameters, options.buffers) == ("raise", "all", False)
    assert (options.optimizer_state, options.report_metrics, options.progress) == ("keep", True, None)
    assert options.gate == Gate()
    assert RoundOptions.of() == options
    assert RoundOptions.of(timeout_s=None, every_n_epochs=3).every_n_epochs == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weighting", "sample"),
        ("every_n_epochs", 0),
        ("every_n_epochs", -1),
        ("every_n_epochs", 1.0),
        ("every_n_epochs", True),
        ("timeout_s", 0),
        ("timeout_s", -1),
        ("timeout_s", float("inf")),
        ("timeout_s", "60"),
        ("on_error", "ignore"),
        ("on_error", None),
        ("optimizer_state", "clear"),
        ("wait", 1),
        ("wait", None),
        ("buffers", "yes"),
        ("report_metrics", 0),
        ("progress", 1),
        ("gate", None),
        ("gate", {"max_norm_ratio": 10}),
        ("parameters", ""),
        ("parameters", []),
        ("parameters", 5),
        ("parameters", [1]),
    ],
)
def test_a_wrong_value_is_refused_by_the_options_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        RoundOptions.of(**{name: value})


@pytest.mark.parametrize("value", [0, -2.5, float("nan"), float("inf"), True, None])
def test_a_fixed_weighting_must_be_a_number_above_zero(value: Any) -> None:
    with pytest.raises(WeightingError, match="weighting"):
        RoundOptions(weighting=value)


@pytest.mark.parametrize(
    ("name", "near"), [("timeout", "timeout_s"), ("on_eror", "on_error"), ("weigthing", "weighting"), ("zzz", None)]
)
def test_an_option_that_does_not_exist_names_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(ConfigurationError, match=f"option '{name}'") as caught:
        RoundOptions.of(**{name: 1})
    assert caught.value.fix == (f"Did you mean {near!r}?" if near else "Take it out")
    assert "every_n_epochs" in caught.value.expected


def test_the_weighting_is_samples_a_number_or_what_the_function_says() -> None:
    assert RoundOptions().weight(1530, {}) == 1530.0
    assert RoundOptions(weighting=np.float32(2.5)).weight(7, {}) == 2.5
    assert RoundOptions(weighting=3).weight(None, {}) == 3.0
    seen: list[dict[str, float]] = []
    options = RoundOptions(weighting=lambda metrics: seen.append(dict(metrics)) or metrics["loss"])
    assert options.weight(None, {"loss": 0.5}) == 0.5
    assert seen == [{"loss": 0.5}]


@pytest.mark.parametrize("result", [float("nan"), float("inf"), 0, -1, "5", None, True, [1, 2]])
def test_a_weighting_worked_out_wrong_is_refused(result: Any) -> None:
    with pytest.raises(WeightingError):
        RoundOptions(weighting=lambda _: result).weight(5, {})


def test_uncounted_samples_are_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="samples: expected how many"):
        RoundOptions().weight(None, {})
    for none_seen in (0, -1, float("nan")):
        with pytest.raises(WeightingError):
            RoundOptions().weight(none_seen, {})


def test_only_finite_numbers_are_metrics() -> None:
    class OneElement:
        def __float__(self) -> float:
            return 0.25

    given = {
        "a": 1,
        "b": np.float32(0.5),
        "c": float("nan"),
        "d": float("inf"),
        "e": "text",
        "f": None,
        "g": OneElement(),
        5: 2.0,
        "h": [1, 2],
    }
    kept = finite_metrics(given)  # type: ignore[arg-type]
    assert kept == {"a": 1.0, "b": 0.5, "g": 0.25, "5": 2.0}
    assert {type(value) for value in kept.values()} == {float}
    assert finite_metrics(None) == {}


def test_the_selector_follows_the_choice_of_parameters() -> None:
    selector = RoundOptions(parameters=["encoder.*"]).selector
    assert selector("encoder.weight", None, True)
    assert not selector("head.weight", None, True)


def test_metrics_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="metrics: expected numbers by name, found int"):
        finite_metrics(3)  # type: ignore[arg-type]
