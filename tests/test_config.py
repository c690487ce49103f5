"""Settings are checked when made; retry delays keep their promises for every input."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchkey_integrations.config import Endpoint, RetryPolicy, check_seconds, check_verify
from branchkey_integrations.errors import ConfigurationError


@pytest.mark.parametrize("value", [1, 0.001, 10**9, 30.5])
def test_seconds_above_zero_are_taken(value: float) -> None:
    check_seconds("timeout_s", value)


@pytest.mark.parametrize("value", [0, -1, -0.0, math.nan, math.inf, -math.inf, True, False, "30", None, [1], 1j])
def test_anything_else_is_no_number_of_seconds(value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_seconds("timeout_s", value)
    assert caught.value.what == "timeout_s"
    assert caught.value.expected == "a number of seconds above zero"
    assert caught.value.found == repr(value)
    assert caught.value.fix == "Pass for example timeout_s=30"


def test_none_and_zero_are_taken_only_where_they_mean_something() -> None:
    check_seconds("timeout_s", None, optional=True)
    check_seconds("backoff_s", 0, zero=True)
    with pytest.raises(ConfigurationError, match="above zero or None"):
        check_seconds("timeout_s", 0, optional=True)
    with pytest.raises(ConfigurationError):
        check_seconds("backoff_s", None, zero=True)


@pytest.mark.parametrize(
    ("url", "parsed", "base", "websocket"),
    [
        (
            "https://app.branchkey.com",
            ("https", "app.branchkey.com", 443, ""),
            "https://app.branchkey.com/api",
            "wss://app.branchkey.com/api",
        ),
        ("http://127.0.0.1:8000/", ("http", "127.0.0.1", 8000, ""), "http://127.0.0.1:8000/api", "ws://127.0.0.1:8000/api"),
        ("http://localhost:80", ("http", "localhost", 80, ""), "http://localhost/api", "ws://localhost/api"),
        ("https://a.b:443//", ("https", "a.b", 443, ""), "https://a.b/api", "wss://a.b/api"),
        ("https://a.b:80", ("https", "a.b", 80, ""), "https://a.b:80/api", "wss://a.b:80/api"),
        ("http://[::1]:9000", ("http", "::1", 9000, ""), "http://[::1]:9000/api", "ws://[::1]:9000/api"),
        ("http://[::1]", ("http", "::1", 80, ""), "http://[::1]/api", "ws://[::1]/api"),
        ("HTTPS://App.BranchKey.com", ("https", "app.branchkey.com", 443, ""), "https://app.branchkey.com/api", "wss://app.branchkey.com/api"),
        ("https://a.b/behind/proxy/", ("https", "a.b", 443, "/behind/proxy"), "https://a.b/behind/proxy/api", "wss://a.b/behind/proxy/api"),
        (" https://a.b \n", ("https", "a.b", 443, ""), "https://a.b/api", "wss://a.b/api"),
    ],
)  # fmt: skip
def test_a_base_url_becomes_an_endpoint(url: str, parsed: tuple[Any, ...], base: str, websocket: str) -> None:
    endpoint = Endpoint.parse(url)
    assert dataclasses.astuple(endpoint) == parsed
    assert endpoint.url("/api") == base
    assert endpoint.websocket_url("/api") == websocket


@pytest.mark.parametrize(
    "url",
    [
        "", "app.branchkey.com", "ftp://a.b", "https://", "https:///x", "https://a.b?x=1", "https://a.b/#part", "//a.b",
        "https://a.b:70000", "https://a.b:port", "https://[::1", "ws://a.b", "file:///etc/hosts", "https://a.b:0",
        "https://a b", "https://a\tb.c", "https://a.b/ x", "http://a\r\nX-Header: y",
    ],
)  # fmt: skip
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse(url)
    assert caught.value.what == "host"
    assert caught.value.expected == "a URL such as https://app.branchkey.com"


@pytest.mark.parametrize("url", [None, 5, b"https://a.b", ["https://a.b"]])
def test_what_is_no_string_is_refused_by_type(url: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"found {type(url).__name__}"):
        Endpoint.parse(url)


def test_a_query_may_hold_a_secret_and_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse("https://a.b/?token=hunter2-hunter2")
    assert caught.value.found == "a URL with a query or fragment"


@pytest.mark.parametrize(
    "url", ["https://user:hunter2-hunter2@a.b", "https://hunter2-hunter2@a.b", "ftp://u:hunter2-hunter2@a.b"]
)
def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.found == "a URL with user or password in it"


@pytest.mark.parametrize("url", ["https://u:hunter2-hunter2@a.b:port", "https://u:hunter2-hunter2@[::1"])
def test_nor_where_the_url_does_not_even_parse(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Endpoint.parse(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value)


@given(
    scheme=st.sampled_from(["http", "https"]),
    host=st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9](\.[a-z]{2,5})?", fullmatch=True),
    port=st.one_of(st.none(), st.integers(1, 65535)),
    path=st.from_regex(r"(/[a-z0-9]+){0,3}", fullmatch=True),
)
def test_an_endpoint_parses_back_from_its_own_url(scheme: str, host: str, port: int | None, path: str) -> None:
    endpoint = Endpoint.parse(f"{scheme}://{host}{'' if port is None else f':{port}'}{path}")
    assert Endpoint.parse(endpoint.url()) == endpoint
    assert (endpoint.scheme, endpoint.host, endpoint.path) == (scheme, host, path)


@pytest.mark.parametrize("value", [True, False])
def test_verification_is_on_or_off(value: bool) -> None:
    assert check_verify(value) is value


@pytest.mark.parametrize("as_text", [True, False])
def test_a_ca_bundle_is_given_by_path(tmp_path: Path, as_text: bool) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    assert check_verify(str(bundle) if as_text else bundle) == str(bundle)


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_verify(str(tmp_path / "ca.pem"))
    assert caught.value.found == f"no file {str(tmp_path / 'ca.pem')!r}"


@pytest.mark.parametrize("value", [None, 1, 0, b"ca.pem", "", []])
def test_anything_else_is_no_ssl_option(value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_verify(value)
    assert caught.value.what == "ssl"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0), ("attempts", -1), ("attempts", 2.0), ("attempts", True), ("attempts", "3"), ("attempts", None),
        ("backoff_s", -1), ("backoff_s", math.nan), ("backoff_max_s", math.inf), ("budget_s", None), ("budget_s", True),
        ("jitter", -0.1), ("jitter", 1.1), ("jitter", math.nan), ("jitter", "x"), ("jitter", None), ("jitter", True),
    ],
)  # fmt: skip
def test_a_policy_with_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RetryPolicy(**{name: value})
    assert caught.value.what == f"retry {name}"


def test_without_jitter_the_delays_double_up_to_their_limit() -> None:
    policy = RetryPolicy(attempts=7, backoff_s=0.5, backoff_max_s=5, budget_s=1000, jitter=0)
    assert [policy.delay_s(n, 0) for n in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, None]


def test_one_attempt_means_no_repeat() -> None:
    assert RetryPolicy(attempts=1).delay_s(1, 0) is None


def test_retry_after_is_obeyed_beyond_the_longest_delay_but_within_the_budget() -> None:
    policy = RetryPolicy(attempts=3, backoff_max_s=2, budget_s=60)
    assert policy.delay_s(1, 0, retry_after_s=45) == 45
    assert policy.delay_s(1, 15, retry_after_s=45) == 45
    assert policy.delay_s(1, 15.1, retry_after_s=45) is None
    assert policy.delay_s(1, 0, retry_after_s=6 * 3600) is None


def test_a_date_in_the_past_means_at_once() -> None:
    assert RetryPolicy().delay_s(1, 0, retry_after_s=-5) == 0


@pytest.mark.parametrize("nonsense", [math.nan, math.inf])
def test_a_retry_after_that_is_no_time_never_becomes_a_delay(nonsense: float) -> None:
    delay = RetryPolicy().delay_s(1, 0, retry_after_s=nonsense)
    assert delay is None or 0 <= delay <= RetryPolicy().budget_s


policies = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 5000),
    backoff_s=st.floats(0, 1e6),
    backoff_max_s=st.floats(0, 1e6),
    budget_s=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
)


@given(policy=policies, failures=st.integers(1, 6000), spent=st.floats(0, 2e6), seed=st.integers())
def test_a_delay_is_never_beyond_what_the_policy_allows(
    policy: RetryPolicy, failures: int, spent: float, seed: int
) -> None:
    random.seed(seed)
    delay = policy.delay_s(failures, spent)
    if delay is None:
        longest = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** min(failures - 1, 60))
        assert failures >= policy.attempts or spent + longest > policy.budget_s
    else:
        assert failures < policy.attempts
        assert 0 <= delay <= policy.backoff_max_s
        assert spent + delay <= policy.budget_s
        longest = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** min(failures - 1, 60))
        assert longest * (1 - policy.jitter) <= delay * (1 + 1e-9)
        assert delay <= longest


@given(policy=policies, seed=st.integers())
def test_a_call_ends_within_its_attempts_and_its_budget(policy: RetryPolicy, seed: int) -> None:
    random.seed(seed)
    spent, failures = 0.0, 0
    while True:
        failures += 1
        delay = policy.delay_s(failures, spent)
        if delay is None:
            break
        spent += delay
    assert failures <= policy.attempts
    assert spent <= policy.budget_s


@given(after=st.floats(allow_nan=True, allow_infinity=True), spent=st.floats(0, 1000), policy=policies)
def test_whatever_a_server_asks_for_the_budget_holds(after: float, spent: float, policy: RetryPolicy) -> None:
    delay = policy.delay_s(1, spent, retry_after_s=after)
    assert delay is None or (delay >= 0 and spent + delay <= policy.budget_s)


def test_two_leaves_that_fail_together_do_not_come_back_together() -> None:
    policy = RetryPolicy(backoff_s=8, jitter=0.5)
    delays = {policy.delay_s(1, 0) for _ in range(50)}
    assert len(delays) > 40
    assert all(delay is not None and 4 <= delay <= 8 for delay in delays)
