"""What a broker does to a leaf that listens: closes its channel, blocks its connection, hangs up, takes its queue, deletes it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pika
import pytest

from branchkey_integrations.api import Api
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.errors import NotificationError, UnreachableError
from branchkey_integrations.events import AggregateReady, Mailbox, Notification, RunStatusChanged
from branchkey_integrations.listeners import amqp
from branchkey_integrations.listeners.amqp_link import AmqpLink
from branchkey_integrations.listeners.base import ThreadedListener
from branchkey_integrations.run_state import RunState
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.transport import Transport
from tests.support.channels import (
    AmqpChannel,
    close_in_time,
    our_threads,
    started,
    wait_until,
    warnings_of_listeners,
)
from tests.support.rabbitmq import RabbitMQ, aggregate, run_status

pytestmark = pytest.mark.rabbitmq

#: Erlang terms: how long a leaf may owe an acknowledgement, and how often the broker looks, both in milliseconds.
IMPATIENT = (400, 100)
USUAL = (1_800_000, 60_000)


@pytest.fixture
def channel(rabbitmq: RabbitMQ) -> AmqpChannel:
    return AmqpChannel(rabbitmq)


@pytest.fixture
def impatient(rabbitmq: RabbitMQ) -> Iterator[None]:
    """Have the broker close channels on which an acknowledgement is owed for long; for channels opened from now on."""
    _set_consumer_timeout(rabbitmq, *IMPATIENT)
    yield
    _set_consumer_timeout(rabbitmq, *USUAL)


def _set_consumer_timeout(rabbitmq: RabbitMQ, timeout_ms: int, tick_ms: int) -> None:
    rabbitmq.node.ctl(
        "eval",
        f"application:set_env(rabbit, consumer_timeout, {timeout_ms}),"
        f"application:set_env(rabbit, channel_tick_interval, {tick_ms}).",
    )


@pytest.fixture
def alarm(rabbitmq: RabbitMQ) -> Iterator[Alarm]:
    made = Alarm(rabbitmq)
    yield made
    made.end()


class Alarm:
    """The broker's alarm that memory is short: it blocks who publishes."""

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self._rabbitmq = rabbitmq
        self._raised = False

    def begin(self) -> None:
        self._raised = True
        alarms = self._set("0.00000001")
        assert "memory" in alarms

    def end(self) -> None:
        if self._raised:
            self._raised = False
            assert "memory" not in self._set("0.4")

    def _set(self, share: str) -> str:
        node = self._rabbitmq.node
        return node.ctl("eval", f"vm_memory_monitor:set_vm_memory_high_watermark({share}), rabbit_alarm:get_alarms().")

    def publish(self, tree_id: str, branch_id: str, body: bytes) -> None:
        """Publish from within the broker: nobody else can while the alarm lasts."""
        text = body.decode().replace('"', '\\"')
        self._rabbitmq.node.ctl(
            "eval",
            f'rabbit_basic:publish(rabbit_misc:r(<<"{tree_id}">>, exchange, <<"{branch_id}">>), <<>>, [], <<"{text}">>).',
        )


def link_of(listener: ThreadedListener) -> AmqpLink:
    close: Any = listener._interrupt
    found = close.__self__
    assert isinstance(found, AmqpLink)
    return found


# --- the channel is closed ------------------------------------------------------------------------------------------------


def test_an_acknowledgement_owed_for_too_long_costs_the_channel_and_no_id(
    channel: AmqpChannel, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    mailbox, entered, leave = Mailbox(), threading.Event(), threading.Event()
    taken: list[str] = []

    def slowly(event: AggregateReady) -> None:
        entered.set()
        # A disk that hangs, say. Only the first time.
        leave.wait(30)
        if mailbox.put(event.aggregation_id):
            taken.append(event.aggregation_id)

    with started(channel.listener()) as listener:
        listener._on_event = slowly  # type: ignore[assignment]
        channel.send(aggregate("a1"), aggregate("a2"))
        assert entered.wait(5)
        channel.send(aggregate("a3"))
        wait_until(lambda: channel.unsettled() == 3)
        leave.set()
        wait_until(lambda: "406" in caplog.text)
        wait_until(lambda: listener.connected)
        channel.send(aggregate("a4"))
        wait_until(lambda: mailbox.mark() == 4)
    # All of them, in order, each once, though the broker sent some again.
    assert taken == ["a1", "a2", "a3", "a4"]
    assert "PRECONDITION_FAILED" in caplog.text
    assert channel.heard.failures == []
    assert channel.unsettled() == 0


def test_a_channel_closed_for_an_unknown_delivery_is_opened_anew(
    channel: AmqpChannel, caplog: pytest.LogCaptureFixture
) -> None:
    with started(channel.listener()) as listener:
        link = link_of(listener)
        link._loop.add_callback_threadsafe(lambda: link._channel.basic_ack(4711))
        wait_until(lambda: "406" in caplog.text)
        channel.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        wait_until(lambda: channel.connections() == 1)
    assert "unknown delivery tag 4711" in caplog.text
    assert channel.heard.failures == []


def test_a_channel_closed_while_the_backlog_is_read_is_an_error_of_start_that_says_so(channel: AmqpChannel) -> None:
    channel.send(*(aggregate(f"a{number}") for number in range(300)))
    listener = channel.listener()
    hear = channel.heard.on_event

    def spoil(event: Notification) -> None:
        hear(event)
        if len(channel.heard.events) == 1:
            link_of(listener)._channel.basic_ack(4711)

    listener._on_event = spoil
    with pytest.raises(UnreachableError, match=r"expected a queue that can be read to its end, found.*406"):
        listener.start(10)
    assert our_threads() == []
    # Nothing is gone for good: what was not acknowledged comes to the next one.
    with started(channel.listener()):
        assert set(channel.heard.ids) == {f"a{number}" for number in range(300)}


def test_a_queue_taken_away_while_the_broker_was_away_is_told_and_what_comes_with_a_new_one_is_heard(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    with started(channel.listener()) as listener:
        channel.drop()
        rabbitmq.delete_queue(channel.leaf)
        wait_until(lambda: channel.heard.failures)
        assert isinstance(channel.heard.failures[0], NotificationError)
        assert "no such queue" in str(channel.heard.failures[0])
        rabbitmq.create_queue(channel.leaf)
        rabbitmq.send(channel.leaf, aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        assert listener.connected
    assert [type(failure) for failure in channel.heard.failures] == [NotificationError, type(None)]


def test_a_consumer_that_is_cancelled_comes_back_within_a_try_and_nobody_is_told(
    channel: AmqpChannel, rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    # Long enough for the queue to be there again at the next try, on a slow machine too.
    unhurried = RetryPolicy(backoff_s=1, jitter=0)
    with started(channel.listener(retry=unhurried)) as listener:
        # Deleted and made again, as a platform does that changes a queue's arguments.
        with pika.BlockingConnection(rabbitmq._parameters()) as connection:
            queue = connection.channel()
            queue.queue_delete(channel.leaf.id)
            queue.queue_declare(channel.leaf.id, durable=True, arguments={"x-max-length": 100})
            queue.queue_bind(channel.leaf.id, channel.leaf.branch_id)
            queue.basic_publish(channel.leaf.branch_id, "", aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        assert listener.connected
        assert channel.connections() == 1
    assert "one that was deleted" in caplog.text
    assert channel.heard.failures == []


# --- the connection is blocked ----------------------------------------------------------------------------------------------


def test_a_broker_short_of_memory_is_listened_to_all_the_same(
    channel: AmqpChannel, rabbitmq: RabbitMQ, alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp, "_HEARTBEAT_S", 1)
    newcomer = AmqpChannel(rabbitmq)
    newcomer.send(aggregate("kept"))
    with warnings_of_listeners() as warnings, started(channel.listener()) as listener:
        alarm.begin()
        # Who comes now is let in.
        late = newcomer.listener()
        late.start(10)
        assert newcomer.heard.ids == ["kept"]
        late.close()
        # Each takes half a second, so that heartbeats go by.
        for count in (1, 2, 3):
            alarm.publish(channel.leaf.tree_id, channel.leaf.branch_id, aggregate(f"a{count}"))
            wait_until(lambda wanted=count: len(channel.heard.ids) == wanted)  # type: ignore[misc]
        assert channel.heard.ids == ["a1", "a2", "a3"]
        assert listener.connected
        alarm.end()
        channel.send(aggregate("a4"))
        wait_until(lambda: channel.heard.ids[-1] == "a4")
    assert warnings == []


def test_a_blocked_connection_is_no_reason_to_hang_up_and_is_closed_in_time(
    channel: AmqpChannel, alarm: Alarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(channel.listener()) as listener:
        link, told = link_of(listener), threading.Event()
        link._loop.add_callback_threadsafe(
            lambda: link._connection.add_on_connection_blocked_callback(lambda *_: told.set())
        )
        alarm.begin()
        # A leaf publishes nothing, so the broker has no reason to block it. Make it publish.
        link._loop.add_callback_threadsafe(lambda: _publish_on_a_channel_of_its_own(link))
        assert told.wait(10)
        # However long it lasts: the heartbeat alone says whether the broker lives.
        assert link._connection.params.blocked_connection_timeout is None
        assert listener.connected
        close_in_time(listener)


def _publish_on_a_channel_of_its_own(link: AmqpLink) -> None:
    link._connection.channel(on_open_callback=lambda channel: channel.basic_publish("", "nowhere", b""))


# --- the process stands still -----------------------------------------------------------------------------------------------


def test_training_that_lets_no_thread_run_for_several_heartbeats_loses_nothing(
    channel: AmqpChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp, "_HEARTBEAT_S", 1)
    with started(channel.listener()) as listener:
        channel.send(aggregate("a1"))
        # Unlike CDLL it keeps the interpreter's lock, as native code does that does not know better.
        ctypes.PyDLL(None).sleep(3)
        channel.send(aggregate("a2"))
        wait_until(lambda: channel.heard.ids[-1:] == ["a2"])
        wait_until(lambda: listener.connected)
    assert list(dict.fromkeys(channel.heard.ids)) == ["a1", "a2"]
    assert channel.heard.failures == []


# --- more than can be taken in -----------------------------------------------------------------------------------------------


def test_a_burst_waits_at_the_broker_and_not_in_the_memory_of_a_leaf_that_is_slow(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    mailbox, entered, leave = Mailbox(), threading.Event(), threading.Event()

    def slowly(event: AggregateReady) -> None:
        entered.set()
        leave.wait(30)
        mailbox.put(event.aggregation_id)

    with started(channel.listener()) as listener:
        listener._on_event = slowly  # type: ignore[assignment]
        channel.send(*(aggregate(f"a{number}") for number in range(1000)))
        assert entered.wait(5)
        # Those on their way are not ready; all the others are.
        wait_until(lambda: channel.unsettled() == 1000 - 64)
        leave.set()
        wait_until(lambda: mailbox.mark() == 1000, 60)
        assert mailbox.get_nowait() == "a999"
    assert channel.unsettled() == 0


def test_a_dead_connection_that_the_broker_takes_for_alive_gets_no_message_any_more(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    leaf = channel.leaf
    parameters = rabbitmq._parameters()
    parameters.credentials = pika.PlainCredentials(leaf.id, leaf.session_token)
    with pika.BlockingConnection(parameters) as ghost:
        # Logged in, waiting for messages, and never heard of again.
        ghost.channel().basic_consume(leaf.id, lambda *_: None)
        with started(channel.listener()):
            channel.send(*(aggregate(f"a{number}") for number in range(20)))
            wait_until(lambda: len(channel.heard.ids) == 20)
        assert channel.heard.ids == [f"a{number}" for number in range(20)]


# --- redelivery ---------------------------------------------------------------------------------------------------------------


def test_a_stop_that_comes_again_behind_the_start_that_ended_it_is_not_believed(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    with Sandbox(leaves=1) as sandbox:
        (leaf,) = sandbox.credentials
        transport = Transport(Endpoint.parse(sandbox.url), leaf)
        state = RunState(Api(transport, leaf))
        seen: list[tuple[str, str]] = []
        hung_up = threading.Event()

        def hear(event: RunStatusChanged) -> None:
            state.told(event.run_status)
            seen.append((event.run_status, state.status))
            if len(seen) == 2:
                # Both were taken in, neither is acknowledged for the broker: the line goes dead in between.
                link_of(listener)._loop.cut()
                hung_up.set()

        with started(channel.listener()) as listener:
            listener._on_event = hear  # type: ignore[assignment]
            link = link_of(listener)
            _hold_acknowledgements(link)
            channel.send(run_status("stop"), run_status("start"))
            assert hung_up.wait(5)
            wait_until(lambda: len(seen) == 4)
        transport.close()
    assert seen == [("stop", "start"), ("start", "start")] * 2
    assert channel.unsettled() == 0


def _hold_acknowledgements(link: AmqpLink) -> None:
    link._channel.basic_ack = lambda _tag: None
