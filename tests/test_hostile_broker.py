"""What a broker and the line to it may do: go silent, replace the token."""

from __future__ import annotations

import time

import pytest

from branchkey_integrations.errors import NotificationError
from branchkey_integrations.listeners import amqp, amqp_link
from tests.support.channels import AmqpChannel, started, wait_until
from tests.support.credentials import make_credentials
from tests.support.rabbitmq import RabbitMQ, aggregate
from tests.support.relay import relay

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
def channel(rabbitmq: RabbitMQ) -> AmqpChannel:
    return AmqpChannel(rabbitmq)


def test_a_dead_line_to_the_broker_is_noticed_within_two_heartbeats(
    channel: AmqpChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp, "_HEARTBEAT_S", 1)
    # A look each half heartbeat, and one more for where between two of them the line died.
    assert (amqp_link._SILENT_LOOKS + 1) / 2 <= 2
    with relay(channel.port) as line, started(channel.listener(port=line.port)) as listener:
        line.freeze()
        frozen_at = time.monotonic()
        wait_until(lambda: not listener.connected)
        # Two heartbeats of a second, and what a busy machine adds.
        assert time.monotonic() - frozen_at < 5
        channel.send(aggregate("a1"))
        line.thaw()
        wait_until(lambda: channel.heard.ids == ["a1"])
        assert listener.connected
    assert channel.heard.failures == []


def test_a_replaced_token_is_told_the_new_one_misses_nothing_and_the_old_one_coming_back_takes_it_back(
    channel: AmqpChannel, rabbitmq: RabbitMQ
) -> None:
    renewed = make_credentials(**{**channel.leaf.to_dict(), "session_token": "another-token-of-the-platform"})
    with started(channel.listener()) as listener:
        rabbitmq.node.ctl("change_password", channel.leaf.id, renewed.session_token)
        # As long as the connection holds the old login counts.
        channel.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        channel.drop()
        wait_until(lambda: channel.heard.failures)
        assert isinstance(channel.heard.failures[0], NotificationError)
        assert renewed.session_token not in str(channel.heard.failures[0])
        assert not listener.connected
        channel.send(aggregate("a2"))
        successor = channel.listener(leaf=renewed)
        successor.start(10)
        assert channel.heard.ids == ["a1", "a2"]
        successor.close()
        channel.send(aggregate("a3"))
        rabbitmq.node.ctl("change_password", channel.leaf.id, channel.leaf.session_token)
        wait_until(lambda: channel.heard.ids == ["a1", "a2", "a3"])
        assert channel.heard.failures[-1] is None
