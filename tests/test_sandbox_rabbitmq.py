"""The sandbox with a real RabbitMQ: what a leaf finds there, and that no message is lost over a broker's death."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pika
import pika.exceptions
import pytest

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.sandbox import Sandbox
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, aggregate_ready, run_is

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2, rabbitmq="auto") as opened:
        # The link connects when it has something to say; it does so here, so that its thread and socket are the fixture's.
        opened.notify('"ready"')
        assert opened.broker.flush(TIMEOUT_S)
        yield opened


def connect(sandbox: Sandbox, leaf: Credentials, password: str | None = None) -> pika.BlockingConnection:
    """Log in as the official clients do."""
    where = urlsplit(sandbox.rabbitmq_url)
    login = pika.PlainCredentials(leaf.id, leaf.session_token if password is None else password)
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            where.hostname, where.port, leaf.tree_id, login, connection_attempts=1, socket_timeout=TIMEOUT_S
        )
    )


def next_messages(sandbox: Sandbox, leaf: Credentials, count: int) -> list[object]:
    """Consume and acknowledge; the leaf declares nothing."""
    found: list[object] = []
    connection = connect(sandbox, leaf)
    try:
        channel = connection.channel()
        for method, _, body in channel.consume(leaf.id, inactivity_timeout=30):
            if method is None:
                break
            channel.basic_ack(method.delivery_tag)
            found.append(json.loads(body))
            if len(found) == count:
                break
    finally:
        connection.close()
    return found


def test_both_leaves_find_every_notification_in_their_queues_though_nobody_listened(sandbox: Sandbox) -> None:
    aggregation_id = sandbox.publish([np.zeros(1)])
    sandbox.pause()
    sandbox.start()
    sandbox.notify('{"message_type": "other"}')
    expected = ["ready", aggregate_ready(aggregation_id), run_is("pause"), run_is("start"), {"message_type": "other"}]
    for leaf in sandbox.credentials[:2]:
        assert next_messages(sandbox, leaf, 5) == expected


def test_a_round_is_announced_over_amqp_and_websocket_alike(sandbox: Sandbox) -> None:
    leaves = [RawLeaf(sandbox, index) for index in range(2)]
    with leaves[1].connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        for index, leaf in enumerate(leaves):
            leaf.send([np.array([2.0 * index])])
        (message,) = next_messages(sandbox, sandbox.credentials[0], 1)
        aggregation_id = sandbox.aggregates[-1]
        assert message == aggregate_ready(aggregation_id)
        texts = [json.loads(websocket.recv(timeout=TIMEOUT_S))]
        if texts[0] != message:  # news of an earlier test comes first
            texts.append(json.loads(websocket.recv(timeout=TIMEOUT_S)))
        assert texts[-1] == message
    assert leaves[0].download(aggregation_id)[0].tolist() == [1.0]
    assert next_messages(sandbox, sandbox.credentials[1], 1) == [message]


def test_a_leaf_may_log_in_with_its_own_token_and_read_its_own_queue_only(sandbox: Sandbox) -> None:
    first, second = sandbox.credentials[:2]
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        connect(sandbox, first, "wrong")
    connection = connect(sandbox, first)
    try:
        channel = connection.channel()
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
            list(channel.consume(second.id, inactivity_timeout=TIMEOUT_S))
        assert caught.value.reply_code == 403
        channel = connection.channel()
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
            channel.queue_declare("mine")
        assert caught.value.reply_code == 403
    finally:
        connection.close()


def test_a_leaf_that_joins_later_has_a_queue_at_once(sandbox: Sandbox) -> None:
    late = sandbox.add_leaf("late")
    sandbox.notify('"hello"')
    assert next_messages(sandbox, late, 1) == ["hello"]


def test_notifications_survive_the_death_of_the_broker() -> None:
    with Sandbox(rabbitmq="auto") as sandbox:
        leaf = sandbox.credentials[0]
        before = sandbox.publish([np.zeros(1)])
        assert sandbox.broker.flush(TIMEOUT_S)
        sandbox.broker.node.halt(kill=True)
        started = time.monotonic()
        during = sandbox.publish([np.ones(1)])
        assert time.monotonic() - started < 1
        sandbox.broker.node.resume()
        assert sandbox.broker.flush(60)
        assert next_messages(sandbox, leaf, 2) == [aggregate_ready(before), aggregate_ready(during)]


def test_a_restart_with_a_new_broker_brings_the_same_leaves_along(tmp_path) -> None:
    with Sandbox(directory=tmp_path) as sandbox:
        known = sandbox.credentials[0]
        missed = sandbox.publish([np.zeros(1)])
    with Sandbox(directory=tmp_path, rabbitmq="auto") as sandbox:
        assert sandbox.credentials[0] == known
        newer = sandbox.publish([np.zeros(1)])
        assert next_messages(sandbox, known, 2) == [aggregate_ready(missed), aggregate_ready(newer)]


def test_a_broker_that_cannot_be_had_is_named_and_nothing_is_left() -> None:
    with pytest.raises(ConfigurationError, match="rabbitmq"):
        Sandbox(rabbitmq="nonsense").open()
