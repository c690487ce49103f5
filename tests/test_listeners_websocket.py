"""What only the WebSocket has: tickets, close codes, pings, frames, its optional package."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    AuthenticationError,
    ConfigurationError,
    MissingDependencyError,
    NotificationError,
    UnreachableError,
)
from branchkey_integrations.events import AggregateReady
from branchkey_integrations.listeners import Ticket, base
from tests.support.channels import (
    WebSocketChannel,
    our_threads,
    started,
    wait_until,
    warnings_of_listeners,
)
from tests.support.rabbitmq import aggregate
from tests.support.relay import relay
from tests.support.websocket_server import WebSocketServer, websocket_server


@pytest.fixture
def server() -> Iterator[WebSocketServer]:
    with websocket_server() as made:
        yield made


@pytest.fixture
def channel(server: WebSocketServer) -> WebSocketChannel:
    return WebSocketChannel(server)


def test_the_upgrade_carries_a_quoted_ticket_and_no_authorization(channel: WebSocketChannel) -> None:
    with started(channel.listener()):
        pass
    (request,) = channel.server.requests
    # The server compared both ids after decoding; they hold blanks, slashes, signs and an umlaut.
    assert request.path.startswith("/api/v1/ws?ticket=ticket%20%26%2F%3F%25%23%2B%C3%BC%20")
    assert request.path.endswith("&request_id=request%3D1")
    assert "Authorization" not in request.headers
    assert "Origin" not in request.headers
    wait_until(lambda: channel.server.close_codes == [1000])


def test_every_connection_gets_a_fresh_ticket(channel: WebSocketChannel) -> None:
    with started(channel.listener()) as listener:
        for count in (1, 2, 3):
            wait_until(lambda number=count: listener.connected and len(channel.server.requests) == number)  # type: ignore[misc]
            channel.drop()
        wait_until(lambda: len(channel.server.requests) == 4)
    assert len({request.path for request in channel.server.requests}) == 4


def test_it_survives_a_restart_of_the_server_and_loses_nothing_kept_for_it(channel: WebSocketChannel) -> None:
    with started(channel.listener()) as listener:
        channel.send(aggregate("before"))
        wait_until(lambda: channel.heard.ids == ["before"])
        channel.stop()
        wait_until(lambda: not listener.connected)
        assert listener.alive
        channel.start()
        channel.send(aggregate("after"))
        wait_until(lambda: "after" in channel.heard.ids)
    assert channel.heard.failures == []


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 1013, 4000, None])
def test_no_way_of_closing_starts_a_storm_of_tickets(channel: WebSocketChannel, code: int | None) -> None:
    with started(channel.listener(retry=RetryPolicy(backoff_s=0.1, backoff_max_s=0.3, jitter=0))):
        if code is None:
            channel.server.cut_all()
        else:
            channel.server.close_with = code
            channel.server.close_all(code)
        wait_until(lambda: len(channel.server.tickets) >= (2 if code is None else 5))
    times = channel.server.ticket_times
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    wanted = [0.1, 0.2, 0.3, 0.3]
    assert all(pause >= least for pause, least in zip(pauses, wanted))


def test_a_zero_pause_in_the_policy_is_no_storm_either(channel: WebSocketChannel) -> None:
    channel.server.close_with = 1000
    channel.server.backlog = []
    listener = channel.listener(retry=RetryPolicy(backoff_s=0, backoff_max_s=0))
    with pytest.raises(UnreachableError, match="code 1000"):
        listener.start(10)
    channel.server.close_with = None
    with started(channel.listener(retry=RetryPolicy(backoff_s=0, backoff_max_s=0))):
        first = len(channel.server.tickets)
        channel.server.close_with = 1000
        channel.server.close_all(1000)
        began = time.monotonic()
        wait_until(lambda: len(channel.server.tickets) >= first + 4)
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("code", [1008, 4401])
def test_a_server_that_refuses_after_the_upgrade_is_told(channel: WebSocketChannel, code: int) -> None:
    channel.server.close_with = code
    with pytest.raises(NotificationError, match=f"code {code}.*credentials"):
        channel.listener().start(10)
    assert our_threads() == []
    channel.server.close_with = None
    with started(channel.listener()) as listener:
        channel.server.close_with = code
        channel.server.close_all(1012)
        wait_until(lambda: channel.heard.failures)
        channel.server.close_with = None
        wait_until(lambda: listener.connected)
    assert [type(each) for each in channel.heard.failures] == [NotificationError, type(None)]


def test_a_dead_line_is_noticed_within_two_pings(channel: WebSocketChannel) -> None:
    with relay(channel.port) as line:
        listener = channel.listener(port=line.port, ping_interval_s=0.3)
        with started(listener):
            line.freeze()
            frozen_at = time.monotonic()
            wait_until(lambda: not listener.connected, 3)
            assert time.monotonic() - frozen_at < 2 * 0.3 + 0.5
            line.thaw()
            wait_until(lambda: listener.connected)
    assert channel.heard.failures == []


def test_a_quiet_line_is_kept(channel: WebSocketChannel) -> None:
    listener = channel.listener(ping_interval_s=0.05)
    with started(listener):
        until = time.monotonic() + 0.6
        wait_until(lambda: time.monotonic() > until)
        assert listener.connected
    assert len(channel.server.tickets) == 1


def test_text_binary_and_fragmented_frames_count_alike_and_bad_text_does_not_end_it(channel: WebSocketChannel) -> None:
    fragmented = [aggregate("a3").decode()[:10], aggregate("a3").decode()[10:]]
    with warnings_of_listeners() as warnings, started(channel.listener()):
        channel.server.send(aggregate("a1"), aggregate("a2").decode())
        channel.server.send(fragmented)  # type: ignore[arg-type]
        channel.server.send_text_frame(b"\xff\xfe not UTF-8")
        channel.server.send_text_frame(aggregate("a4"))
        wait_until(lambda: len(channel.heard.events) == 4)
        assert channel.server.connections == 1
    assert channel.heard.events == [AggregateReady(f"a{number}") for number in (1, 2, 3, 4)]
    assert len(warnings) == 1


def test_a_message_beyond_all_measure_costs_the_connection_but_not_the_listener(channel: WebSocketChannel) -> None:
    with started(channel.listener()) as listener:
        channel.server.send(b"x" * (17 * 1024 * 1024))
        wait_until(lambda: len(channel.server.tickets) == 2 and listener.connected)
        channel.server.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
    wait_until(lambda: channel.server.close_codes[:1] == [1009])


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_ticket_is_raised_as_it_is(channel: WebSocketChannel, status: int) -> None:
    refusal = AuthenticationError(what="ticket", found=str(status), status=status)

    def refuse() -> Ticket:
        raise refusal

    with pytest.raises(AuthenticationError) as caught:
        channel.listener(ticket=refuse).start(10)
    assert caught.value is refusal
    assert our_threads() == []
    assert channel.server.requests == []


def test_tickets_that_are_refused_later_are_told_and_asked_for_again(channel: WebSocketChannel) -> None:
    refusal = AuthenticationError(what="ticket", found="401", status=401)
    revoked = threading.Event()
    asked: list[float] = []

    def ticket() -> Ticket:
        asked.append(time.monotonic())
        if revoked.is_set():
            raise refusal
        return channel.server.ticket()

    with started(channel.listener(ticket=ticket)) as listener:
        revoked.set()
        channel.drop()
        wait_until(lambda: len(asked) >= 6)
        assert channel.heard.failures == [refusal]
        assert listener.alive
        revoked.clear()
        wait_until(lambda: listener.connected)
        assert channel.heard.failures == [refusal, None]


def test_a_fault_in_the_ticket_call_is_reported_and_survived(channel: WebSocketChannel) -> None:
    faults = iter([False, True, True, False])

    def ticket() -> Ticket:
        if next(faults, False):
            raise KeyError("a fault")
        return channel.server.ticket()

    with started(channel.listener(ticket=ticket)) as listener:
        channel.drop()
        wait_until(lambda: channel.heard.failures)
        assert isinstance(channel.heard.failures[0], NotificationError)
        wait_until(lambda: listener.connected)


def test_close_does_not_wait_for_a_ticket_that_hangs(
    channel: WebSocketChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    asked, answer = threading.Event(), threading.Event()

    def ticket() -> Ticket:
        asked.set()
        answer.wait(30)
        return channel.server.ticket()

    listener = channel.listener(ticket=ticket)
    starter = threading.Thread(target=_swallow, args=(listener.start,))
    starter.start()
    assert asked.wait(5)
    began = time.monotonic()
    listener.close()
    assert time.monotonic() - began < 2.0
    assert not listener.alive
    answer.set()
    wait_until(lambda: our_threads() == [])
    starter.join(2)
    # The ticket came too late: it was not used.
    assert channel.server.requests == []


def _swallow(start: object) -> None:
    with pytest.raises(Exception, match="closed"):
        start(60)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "status"),
    [(NotificationError, status) for status in (400, 404)] + [(UnreachableError, status) for status in (429, 500, 503)],
)
def test_an_upgrade_that_is_refused_says_with_which_status(
    channel: WebSocketChannel, status: int, kind: type[Exception]
) -> None:
    channel.server.refuse = status
    with pytest.raises(kind, match=f"status {status}"):
        channel.listener().start(10)
    assert our_threads() == []


def test_a_redirect_is_refused_without_showing_the_ticket(channel: WebSocketChannel) -> None:
    channel.server.refuse = 302
    with pytest.raises((NotificationError, UnreachableError)) as caught:
        channel.listener().start(10)
    assert "xxxxxxxx" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_debug_logs_of_all_libraries_show_no_ticket(
    channel: WebSocketChannel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("websockets", "websockets.client"):
        caplog.set_level(logging.DEBUG, name)
    with started(channel.listener()):
        channel.server.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
    channel.server.refuse = 401
    with pytest.raises(NotificationError):
        channel.listener().start(10)
    assert "xxxxxxxx" not in caplog.text


def test_without_the_package_the_extra_is_named(channel: WebSocketChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with pytest.raises(MissingDependencyError, match=r"branchkey-integrations\[websocket\]"):
        channel.listener()


def test_a_package_that_is_too_old_is_named(channel: WebSocketChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    import websockets.version

    monkeypatch.setattr(websockets.version, "version", "14.2")
    with pytest.raises(MissingDependencyError, match=r"version 15 or newer, found 14\.2"):
        channel.listener()


def test_a_silly_ping_interval_is_refused(channel: WebSocketChannel) -> None:
    for value in (0, -1, float("nan"), "30", None):
        with pytest.raises(ConfigurationError, match="ping_interval_s"):
            channel.listener(ping_interval_s=value)


def test_many_open_files_do_not_matter(channel: WebSocketChannel, tmp_path: Path) -> None:
    # select() refuses descriptors from 1024 on; a data loader can have that many open.
    path = tmp_path / "file"
    path.write_text(json.dumps({}))
    held: list[int] = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open(path, os.O_RDONLY))
        with started(channel.listener()):
            channel.server.send(aggregate("a1"))
            wait_until(lambda: channel.heard.ids == ["a1"])
    finally:
        for each in held:
            os.close(each)
