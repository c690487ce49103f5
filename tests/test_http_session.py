"""Settings of the environment: asked once, and again when they change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from branchkey_integrations import http_session
from branchkey_integrations.http_session import Session

URL = "http://platform.example/api"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(http_session, "_ASK_ALWAYS", False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    seen: list[str] = []
    original = requests.Session.merge_environment_settings

    def watched(self: Any, url: str, *args: Any) -> Any:
        seen.append(url)
        return original(self, url, *args)

    monkeypatch.setattr(requests.Session, "merge_environment_settings", watched)
    return seen


def settings(session: Session, url: str = URL, proxies: Any = None, verify: Any = True) -> Any:
    return session.merge_environment_settings(url, proxies or {}, True, verify, None)


def test_the_same_question_is_answered_without_a_look(asked: list[str]) -> None:
    session = Session()
    assert (
        settings(session)
        == settings(session, URL + "/other")
        == requests.Session().merge_environment_settings(URL, {}, True, True, None)
    )
    assert asked == [URL, URL]  # the second one is the plain session's


@pytest.mark.parametrize(
    ("name", "value", "key", "found"),
    [
        ("http_proxy", "http://proxy.example:3128", "proxies", "http://proxy.example:3128"),
        ("HTTP_PROXY", "http://proxy.example:3129", "proxies", "http://proxy.example:3129"),
        ("all_proxy", "http://proxy.example:3130", "proxies", "http://proxy.example:3130"),
        ("REQUESTS_CA_BUNDLE", "/a.pem", "verify", "/a.pem"),
        ("CURL_CA_BUNDLE", "/b.pem", "verify", "/b.pem"),
    ],
)
def test_a_variable_that_changes_counts_from_the_next_request_on(
    name: str, value: str, key: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session()
    before = settings(session)
    monkeypatch.setenv(name, value)
    changed = settings(session)[key]
    assert found in ([*changed.values()] if isinstance(changed, dict) else [changed])
    monkeypatch.delenv(name)
    assert settings(session) == before


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_hosts_without_a_proxy_are_kept_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session()
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert settings(session)["proxies"]
    monkeypatch.setenv(name, "platform.example")
    assert not settings(session)["proxies"]
    assert settings(session, "http://store.example/x")["proxies"]


def test_what_is_passed_is_kept_apart_and_no_answer_can_be_spoilt() -> None:
    session = Session()
    with_proxy = settings(session, proxies={"http": "http://mine.example"})
    assert with_proxy["proxies"] == {"http": "http://mine.example"}
    with_proxy["proxies"]["http"] = "spoilt"
    assert settings(session, proxies={"http": "http://mine.example"})["proxies"] == {"http": "http://mine.example"}
    assert not settings(session)["proxies"]
    assert settings(session, verify=False)["verify"] is False
    assert settings(session, verify="/c.pem")["verify"] == "/c.pem"


def test_many_hosts_do_not_pile_up() -> None:
    session = Session()
    for number in range(100):
        settings(session, f"http://store-{number}.example/x")
    assert len(session._settings) <= 16


def test_where_the_system_has_settings_they_are_asked_each_time(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session()
    settings(session)
    monkeypatch.setattr(http_session, "_ASK_ALWAYS", True)
    settings(session)
    assert len(asked) == 2
