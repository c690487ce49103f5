"""What a slow link may do, and for how long."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    DeadlineError,
    UnreachableError,
)
from tests.support.raw_server import Exchange, RawServer, answer, free_port
from tests.support.transport import ACCEPTED, STARTED, Leaf


def test_nobody_there_is_unreachable_and_names_the_host() -> None:
    port = free_port()
    with Leaf(f"http://127.0.0.1:{port}") as leaf:
        for ask in (leaf.api.run_details, leaf.upload):
            with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}.*Connection refused"):
                ask()


def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    with Leaf("http://branch.invalid") as leaf, pytest.raises(UnreachableError, match=r"branch\.invalid"):
        leaf.api.run_details()


def test_a_server_that_never_answers_a_question_is_a_deadline() -> None:
    once = RetryPolicy(attempts=1)
    with RawServer(Exchange.stall) as server, Leaf(server.url, timeout_s=0.3, retry=once) as leaf:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"move on within 0\.3 s"):
            leaf.api.run_details()
        assert time.monotonic() - began < 2


def test_an_answer_that_trickles_in_is_a_deadline() -> None:
    head, _, body = STARTED.partition(b"\r\n\r\n")

    def trickle(exchange: Exchange) -> None:
        exchange.send(head + b"\r\n\r\n")
        exchange.trickle(body, 0.1)

    with RawServer(trickle) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            leaf.api.run_details()
        assert time.monotonic() - began < 2


def test_an_upload_over_a_slow_link_that_keeps_moving_may_take_longer_than_the_timeout() -> None:
    content = bytes(6 << 20)

    def slow(exchange: Exchange) -> None:
        exchange.read_body(bytes_per_s=2.5 * (1 << 20))
        exchange.send(ACCEPTED)

    with RawServer(slow, receive_buffer_bytes=65536) as server, Leaf(server.url, timeout_s=1.0) as leaf:
        began = time.monotonic()
        assert leaf.upload(content) == "file-1"
        assert time.monotonic() - began > 2
    (exchange,) = server.exchanges
    assert exchange.missing == 0


def test_an_upload_whose_reader_stalls_is_a_deadline_and_not_uncertain() -> None:
    with (
        RawServer(Exchange.stall, receive_buffer_bytes=65536) as server,
        Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf,
    ):
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            leaf.upload(bytes(16 << 20))
        assert time.monotonic() - began < 4


def test_a_download_over_a_slow_link_that_keeps_moving_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    def slow(exchange: Exchange) -> None:
        exchange.send(answer(200, b"", length=12))
        exchange.trickle(b"PK0123456789", 0.1)

    target = io.BytesIO()
    with RawServer(slow) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf:
        assert leaf.transport.fetch("download", f"{server.url}/o?signature=abc", target) == 12
    assert target.getvalue() == b"PK0123456789"


def test_a_download_that_moves_but_would_never_end_is_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchkey_integrations.http_session._WINDOW_S", 0.5)
    ended = threading.Event()

    def trickle(exchange: Exchange) -> None:
        try:
            exchange.send(answer(200, b"", length=1_000_000))
            exchange.trickle(b"PK" * 500_000, 0.05)
        except OSError:
            ended.set()

    with RawServer(trickle) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf:
        with pytest.raises(
            DeadlineError, match=r"at least 1024 bytes in 0\.5 s, found \d+, of an object that trickles in"
        ):
            leaf.transport.fetch("download", f"{server.url}/o?signature=abc", io.BytesIO())
        # The connection is given up, too.
        assert ended.wait(20)


def test_a_download_that_brings_enough_in_each_window_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchkey_integrations.http_session._WINDOW_S", 0.2)
    content = bytes(range(256)) * 100

    def slow(exchange: Exchange) -> None:
        exchange.send(answer(200, b"", length=len(content)))
        for start in range(0, len(content), 1600):
            exchange.send(content[start : start + 1600])
            exchange.closing.wait(0.1)

    target = io.BytesIO()
    with RawServer(slow) as server, Leaf(server.url, timeout_s=0.2, retry=RetryPolicy(attempts=1)) as leaf:
        leaf.transport.fetch("download", f"{server.url}/o?signature=abc", target)
    assert target.getvalue() == content


def test_a_download_that_stalls_is_a_deadline() -> None:
    def stall(exchange: Exchange) -> None:
        exchange.send(answer(200, b"PK", length=100))
        exchange.stall()

    with (
        RawServer(stall) as server,
        Leaf(server.url, timeout_s=0.3, retry=RetryPolicy(attempts=1)) as leaf,
        pytest.raises(DeadlineError),
    ):
        leaf.transport.fetch("download of a1", f"{server.url}/o?signature=abc", io.BytesIO())
