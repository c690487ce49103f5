"""Whether to deflate: figures in, choice and reason out."""

from __future__ import annotations

import pytest

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.link import MEASURABLE_BYTES, Choice, Link, Sample, check_compression

MB = 1_000_000
#: Floats: 7 % smaller, at 500 MB a second.
FLOATS = Sample(ratio=0.93, seconds_per_byte=1 / (500 * MB))
#: Floats that were bfloat16 before: half as large.
HALVES = Sample(ratio=0.47, seconds_per_byte=1 / (300 * MB))


def link_of(*rates: float) -> Link:
    link = Link()
    for rate in rates:
        link.note(100 * MB, 100 * MB / rate)
    return link


@pytest.mark.parametrize(
    ("rate", "sample", "compression"),
    [
        (12.5 * MB, FLOATS, "deflate"),  # 100 Mbit/s: 0.56 s saved for 0.2 s
        (125 * MB, FLOATS, "store"),  # 1 Gbit/s: 0.056 s saved for 0.2 s
        (125 * MB, HALVES, "deflate"),  # 0.42 s saved for 0.33 s
        (1250 * MB, HALVES, "store"),
    ],
)
def test_it_stores_where_deflating_takes_longer_than_it_saves(rate: float, sample: Sample, compression: str) -> None:
    assert link_of(rate).choose(100 * MB, sample).compression == compression


def test_it_says_why_in_figures() -> None:
    choice = link_of(125 * MB).choose(100 * MB, FLOATS)
    assert choice.why == "at 1000 Mbit/s deflating takes 0.2 s and saves 0.056 s"
    assert str(choice) == "store: at 1000 Mbit/s deflating takes 0.2 s and saves 0.056 s"
    assert str(Choice("deflate", "")) == "deflate"


def test_a_near_tie_stays_with_deflate() -> None:
    # Saves 0.2 s for 0.23 s: not 1.2 times as much.
    near = Sample(0.9, 2.3e-9)
    assert link_of(50 * MB).choose(100 * MB, near).compression == "deflate"
    assert link_of(50 * MB).choose(100 * MB, near._replace(seconds_per_byte=2.5e-9)).compression == "store"


def test_values_that_do_not_shrink_are_stored_on_any_link() -> None:
    assert link_of(1.0).choose(100 * MB, Sample(1.25, 1e-9)).compression == "store"


def test_without_a_measurement_it_deflates() -> None:
    choice = Link().choose(100 * MB, FLOATS)
    assert choice == ("deflate", "no upload has shown yet how fast the link is")


def test_small_updates_are_deflated_and_tell_nothing_of_the_link() -> None:
    link = link_of(1e12)
    assert link.choose(MEASURABLE_BYTES - 1, FLOATS) == ("deflate", "too small for it to matter")
    link = Link()
    link.note(MEASURABLE_BYTES - 1, 0.1)
    link.note(MEASURABLE_BYTES, 0.0)
    assert link.bytes_per_s is None


def test_the_median_of_the_last_five_counts() -> None:
    link = link_of(9 * MB, 9 * MB, 9 * MB, 1 * MB, 2 * MB, 3 * MB, 4 * MB, 50 * MB)
    assert link.bytes_per_s == pytest.approx(3 * MB)


@pytest.mark.parametrize("value", ["deflate", "store", "auto"])
def test_the_three_options_pass(value: str) -> None:
    assert check_compression(value) == value


@pytest.mark.parametrize("value", ["zip", "", None, 6])
def test_others_do_not(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r'compression: expected "deflate", "store" or "auto", found'):
        check_compression(value)  # type: ignore[arg-type]
