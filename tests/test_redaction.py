"""What of a URL may be shown, and what other libraries' log records may say while they work for us."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from branchkey_integrations.redaction import hidden_targets, host_of

SIGNED = "/bucket/a1.npz?X-Amz-Signature=abcdef"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    logger, texts = logging.getLogger("urllib3.connectionpool"), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(self.format(record))

    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(level)


def log(target: str) -> None:
    logging.getLogger("urllib3.connectionpool").debug('%s://%s "%s %s" %s', "http", "host", "GET", target, 200)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://bucket.s3.example.com/key?signature=x", "bucket.s3.example.com"),
        ("http://user:password@127.0.0.1:9000/x", "127.0.0.1:9000"),
        ("http://[::1]:80/", "::1:80"),
        ("/relative?x=1", "an unnamed host"),
        ("", "an unnamed host"),
        ("http://host:notaport/", "an unreadable URL"),
        ("http://[bad", "an unreadable URL"),
    ],
)
def test_of_a_url_only_the_host_is_shown(url: str, host: str) -> None:
    assert host_of(url) == host


def test_every_target_is_hidden_while_an_object_is_fetched(lines: list[str]) -> None:
    with hidden_targets():
        log(SIGNED)
        log("/plain/path")
    assert lines == ['http://host "GET <hidden>" 200'] * 2


def test_of_our_own_calls_the_address_is_shown_and_not_where_a_redirect_leads(lines: list[str]) -> None:
    url = "http://host/base/api/v1/run/b1"
    with hidden_targets(but=url):
        for target in (
            SIGNED,
            "/base/api/v1/run/b1",
            url,
            "/base/api/v1/run/b1?x=1",
            "/what-was-sent-0123",
            "HTTP/1.1",
        ):
            log(target)
    shown = ("<hidden>", "/base/api/v1/run/b1", url, "<hidden>", "<hidden>", "HTTP/1.1")
    assert lines == [f'http://host "GET {target}" 200' for target in shown]


def test_the_users_own_requests_are_left_alone(lines: list[str]) -> None:
    with hidden_targets():
        other = threading.Thread(target=log, args=("/theirs?x=1",))
        other.start()
        other.join()
    log("/after?x=2")
    assert lines == ['http://host "GET /theirs?x=1" 200', 'http://host "GET /after?x=2" 200']


def test_a_traceback_in_such_a_record_is_dropped(lines: list[str]) -> None:
    with hidden_targets():
        try:
            raise ValueError(SIGNED)
        except ValueError:
            logging.getLogger("urllib3.connectionpool").warning("Failed (url=%s)", SIGNED, exc_info=True)
    assert lines == ["Failed (url=<hidden>)"]


def test_nesting_and_errors_put_things_back(lines: list[str]) -> None:
    with pytest.raises(KeyError), hidden_targets(but="/x"), hidden_targets():
        raise KeyError
    log(SIGNED)
    assert SIGNED in lines[0]
    filters = logging.getLogger("urllib3.connectionpool").filters
    for _ in range(3):
        with hidden_targets():
            pass
    assert len(logging.getLogger("urllib3.connectionpool").filters) == len(filters)
