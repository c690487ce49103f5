"""What both listeners promise, each against a real server."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    ClientClosedError,
    NotificationError,
    UnreachableError,
)
from branchkey_integrations.events import AggregateReady, Mailbox, Notification, RunStatusChanged
from branchkey_integrations.listeners.base import pause_s
from tests.support.channels import (
    AmqpChannel,
    Channel,
    WebSocketChannel,
    close_in_time,
    our_threads,
    started,
    starting,
    wait_until,
    warnings_of_listeners,
)
from tests.support.rabbitmq import aggregate, run_status
from tests.support.relay import blackhole, relay, silent_peer
from tests.support.websocket_server import websocket_server

#: The bodies of the public bug reports, and their kin.
MALFORMED = {
    "not UTF-8": b"\xff\xfe",
    "broken JSON": b"{not json",
    "empty": b"",
    "empty object": b"{}",
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "number": b"7",
    "deep": b"[" * 20_000,
    "type is no string": b'{"message_type": 5, "body": {}}',
    "body null": b'{"message_type": "aggregation_status", "body": null}',
    "body missing": b'{"message_type": "aggregation_status"}',
    "no id": b'{"message_type": "aggregation_status", "body": {}}',
    "id is a number": b'{"message_type": "aggregation_status", "body": {"aggregation_id": 5}}',
    "id empty": b'{"message_type": "aggregation_status", "body": {"aggregation_id": ""}}',
    "id null": b'{"message_type": "aggregation_status", "body": {"aggregation_id": null}}',
    "id is a path": b'{"message_type": "aggregation_status", "body": {"aggregation_id": "../evil"}}',
    "status null": b'{"message_type": "run_status", "body": {"run_status": null}}',
    "megabyte of junk": b"\xff" * 1_000_000,
    "valid but 70 KB": aggregate("x" * 70_000),
}


@pytest.fixture(scope="module", autouse=True)
def broker_before_guards(request: pytest.FixtureRequest) -> None:
    # One of the cases needs it, and the guards must see it start before they take their picture.
    if any(item.get_closest_marker("rabbitmq") for item in request.session.items):
        request.getfixturevalue("rabbitmq")


@pytest.fixture(params=[pytest.param("amqp", marks=pytest.mark.rabbitmq), "websocket"])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    if request.param == "amqp":
        yield AmqpChannel(request.getfixturevalue("rabbitmq"))
    else:
        with websocket_server() as server:
            yield WebSocketChannel(server)


def test_it_is_ready_when_start_returns(channel: Channel) -> None:
    with started(channel.listener()) as listener:
        assert listener.alive
        assert listener.connected
        assert listener.name == channel.name
        assert channel.connections() == 1
    assert channel.heard.failures == []


def test_a_second_start_changes_nothing(channel: Channel) -> None:
    with started(channel.listener()) as listener:
        listener.start(10)
        assert len(our_threads()) == (1 if channel.name == "amqp" else 2)
        assert channel.connections() == 1


def test_notifications_arrive_in_order_and_in_its_own_thread(channel: Channel) -> None:
    with started(channel.listener()):
        channel.send(run_status("start"), aggregate("a1"), run_status("pause"), aggregate("a2"))
        wait_until(lambda: len(channel.heard.events) == 4)
    assert channel.heard.events == [
        RunStatusChanged("start"),
        AggregateReady("a1"),
        RunStatusChanged("pause"),
        AggregateReady("a2"),
    ]
    assert channel.heard.threads == {f"branchkey-{channel.name}"}


def test_what_lay_there_is_delivered_before_start_returns(channel: Channel) -> None:
    channel.send(*(aggregate(f"old{number}") for number in range(300)))
    with started(channel.listener()):
        # No waiting here: that is the point.
        assert channel.heard.ids == [f"old{number}" for number in range(300)]


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_message_costs_one_short_warning_and_nothing_else(channel: Channel, body: bytes) -> None:
    with warnings_of_listeners() as warnings, started(channel.listener()) as listener:
        channel.send(body, aggregate("good"))
        wait_until(lambda: channel.heard.ids == ["good"])
        assert listener.alive
        assert listener.connected
        assert channel.connections() == 1
    assert len(warnings) == 1
    assert len(warnings[0]) < 500
    assert channel.unsettled() == 0
    assert channel.heard.failures == []


def test_a_malformed_message_does_not_come_again_at_the_next_start(channel: Channel) -> None:
    with started(channel.listener()):
        channel.send(*MALFORMED.values(), aggregate("good"))
        wait_until(lambda: channel.heard.ids == ["good"])
    with warnings_of_listeners() as warnings, started(channel.listener()):
        channel.send(aggregate("better"))
        wait_until(lambda: channel.heard.ids == ["good", "better"])
    assert warnings == []


def test_unknown_types_and_extra_keys_are_ignored_in_silence(channel: Channel) -> None:
    unknown = json.dumps({"message_type": "weather\ud800", "body": None}).encode()
    extra = json.dumps(
        {"message_type": "aggregation_status", "body": {"aggregation_id": "a1", "run": 3}, "error": None}
    ).encode()
    with warnings_of_listeners() as warnings, started(channel.listener()):
        channel.send(unknown, extra)
        wait_until(lambda: channel.heard.events == [AggregateReady("a1")])
    assert warnings == []
    assert channel.unsettled() == 0


def test_a_handler_that_raises_stops_nothing(channel: Channel) -> None:
    channel.heard.raises = RuntimeError("a fault in the handler")
    with started(channel.listener()) as listener:
        channel.send(aggregate("a1"), aggregate("a2"))
        wait_until(lambda: channel.heard.ids == ["a1", "a2"])
        assert listener.connected
    assert channel.unsettled() == 0


def test_news_arrive_while_the_training_thread_is_busy_and_never_asks(channel: Channel) -> None:
    arrived_at: list[float] = []
    with started(channel.listener()) as listener:
        collect = channel.heard.on_event

        def note(event: Notification) -> None:
            collect(event)
            arrived_at.append(time.monotonic())

        listener._on_event = note
        channel.send(run_status("start"), aggregate("a1"))
        sent_at = time.monotonic()
        while time.monotonic() < sent_at + 0.7:
            sum(range(1000))
        assert channel.heard.events == [RunStatusChanged("start"), AggregateReady("a1")]
    assert arrived_at[-1] - sent_at < 0.5


def test_a_burst_of_ten_thousand_ends_with_the_newest(channel: Channel) -> None:
    mailbox = Mailbox()
    with started(channel.listener()) as listener:
        listener._on_event = lambda event: mailbox.put(event.aggregation_id)  # type: ignore[assignment,union-attr]
        channel.send(*(aggregate(f"a{number}") for number in range(10_000)))
        wait_until(lambda: mailbox.mark() == 10_000, 60)
        assert mailbox.get_nowait() == "a9999"
    assert channel.unsettled() == 0


def test_repeats_are_handed_on_and_dropped_by_the_mailbox(channel: Channel) -> None:
    mailbox = Mailbox()
    with started(channel.listener()):
        channel.send(aggregate("a1"), aggregate("a2"), aggregate("a1"), aggregate("a3"))
        wait_until(lambda: len(channel.heard.ids) == 4)
    assert [mailbox.put(each) for each in channel.heard.ids] == [True, True, False, True]
    assert mailbox.get_nowait() == "a3"


def test_it_comes_back_when_the_server_drops_it(channel: Channel) -> None:
    with started(channel.listener()) as listener:
        for round_number in range(3):
            channel.drop()
            channel.send(aggregate(f"a{round_number}"))
            wait_until(lambda number=round_number: f"a{number}" in channel.heard.ids)  # type: ignore[misc]
            channel.forget()
            wait_until(lambda: listener.connected and channel.connections() == 1)
    # An outage that passes is no failure: a round that waits must go on waiting.
    assert channel.heard.failures == []


def test_wrong_credentials_are_refused_by_start_and_nothing_runs_on(channel: Channel) -> None:
    listener = channel.stranger()
    with pytest.raises(NotificationError) as caught:
        listener.start(10)
    assert str(channel.port) in str(caught.value)
    assert caught.value.fix
    assert our_threads() == []
    assert not listener.alive
    assert channel.connections() == 0
    assert channel.heard.events == []


def test_a_closed_port_is_unreachable(channel: Channel) -> None:
    with socket.socket() as unheard:
        # Bound but not listening: nobody else can take it, and connections are refused.
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"{port}.*refused connection"):
            channel.listener(port=port).start(10)
    assert our_threads() == []


def test_a_peer_that_says_nothing_is_given_up_at_the_deadline(channel: Channel) -> None:
    with silent_peer() as port:
        listener = channel.listener(port=port)
        before = time.monotonic()
        with pytest.raises(NotificationError, match=r"ready within 0\.5 s"):
            listener.start(0.5)
        assert 0.5 <= time.monotonic() - before < 2.4
    assert our_threads() == []


@pytest.mark.parametrize("where", [silent_peer, blackhole])
def test_close_ends_a_start_that_hangs(channel: Channel, where: object) -> None:
    with where() as port:  # type: ignore[operator]
        listener = channel.listener(port=port)
        with starting(listener):
            wait_until(lambda: listener._interrupt is not None or (channel.name == "websocket" and listener.alive))
            close_in_time(listener)


def test_close_when_idle(channel: Channel) -> None:
    listener = channel.listener()
    listener.start(10)
    close_in_time(listener)
    wait_until(lambda: channel.connections() == 0)


def test_close_twice_and_from_many_threads(channel: Channel) -> None:
    listener = channel.listener()
    listener.start(10)
    threads = [threading.Thread(target=listener.close) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2)
        assert not thread.is_alive()
    close_in_time(listener)


def test_close_from_the_handler_itself(channel: Channel) -> None:
    listener = channel.listener()
    listener.start(10)
    listener._on_event = lambda event: listener.close()
    channel.send(aggregate("a1"))
    wait_until(lambda: our_threads() == [])
    close_in_time(listener)


def test_close_before_start_and_start_after_close(channel: Channel) -> None:
    listener = channel.listener()
    close_in_time(listener)
    with pytest.raises(ClientClosedError):
        listener.start(1)
    assert our_threads() == []


def test_close_in_a_long_pause(channel: Channel) -> None:
    slow = RetryPolicy(backoff_s=30, backoff_max_s=30, jitter=0)
    with started(channel.listener(retry=slow)) as listener:
        channel.drop()
        wait_until(lambda: not listener.connected)
        assert listener.alive


def test_close_while_the_server_is_down(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "branchkey_integrations.listeners")
    with relay(channel.port) as line, started(channel.listener(port=line.port)):
        line.close()
        wait_until(lambda: "refused" in caplog.text)


def test_close_when_the_line_is_dead(channel: Channel) -> None:
    with relay(channel.port) as line, started(channel.listener(port=line.port)) as listener:
        line.freeze()
        close_in_time(listener)
        line.thaw()


def test_one_warning_an_outage_however_long(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "branchkey_integrations.listeners")
    with relay(channel.port) as line, started(channel.listener(port=line.port)) as listener:
        line.close()
        wait_until(lambda: caplog.text.count("trying again") >= 5)
        assert listener.alive
    assert [record.levelname for record in caplog.records if "trying again" in record.message][:5] == [
        "WARNING",
        *["INFO"] * 4,
    ]


def test_pauses_double_up_to_a_cap_with_jitter_and_are_never_zero() -> None:
    policy = RetryPolicy(backoff_s=0.5, backoff_max_s=30, jitter=0)
    assert [pause_s(policy, failures) for failures in (1, 2, 3, 7, 8, 10_000)] == [0.5, 1, 2, 30, 30, 30]
    spread = {pause_s(RetryPolicy(backoff_s=1, jitter=0.5), 1) for _ in range(200)}
    assert len(spread) > 100
    assert 0.5 <= min(spread) < max(spread) <= 1
    assert pause_s(RetryPolicy(backoff_s=0, backoff_max_s=0), 5) == 0.1


def test_a_refusal_later_is_told_once_and_taken_back(channel: Channel) -> None:
    with started(channel.listener()) as listener:
        _refuse_from_now_on(channel)
        channel.drop()
        wait_until(lambda: channel.heard.failures)
        assert isinstance(channel.heard.failures[0], NotificationError)
        assert listener.alive
        _accept_again(channel)
        wait_until(lambda: listener.connected)
        assert len(channel.heard.failures) == 2
        assert channel.heard.failures[1] is None
        channel.send(aggregate("a1"))
        wait_until(lambda: "a1" in channel.heard.ids)


def _refuse_from_now_on(channel: Channel) -> None:
    if isinstance(channel, AmqpChannel):
        channel.rabbitmq.node.ctl("change_password", channel.leaf.id, "another password")
    else:
        assert isinstance(channel, WebSocketChannel)
        channel.server.refuse = 403


def _accept_again(channel: Channel) -> None:
    if isinstance(channel, AmqpChannel):
        channel.rabbitmq.node.ctl("change_password", channel.leaf.id, channel.leaf.session_token)
    else:
        assert isinstance(channel, WebSocketChannel)
        channel.server.refuse = None


def test_its_repr_and_its_logs_hold_no_secret(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    listener = channel.listener()
    with started(listener):
        channel.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        channel.drop()
        wait_until(lambda: not listener.connected)
        wait_until(lambda: listener.connected)
    secrets = [channel.leaf.session_token]  # type: ignore[attr-defined]
    if isinstance(channel, WebSocketChannel):
        secrets += [ticket.ticket_id for ticket in channel.server.tickets] + ["ticket%20", "ticket="]
    shown = repr(listener) + caplog.text
    assert not [secret for secret in secrets if secret in shown]
