"""A broker that is killed on purpose comes back with its leaves and what they have not heard yet."""

from __future__ import annotations

import json

import numpy as np
import pika
import pytest

from branchkey_integrations.sandbox import Chaos, Sandbox
from tests.support.raw_leaf import TIMEOUT_S

pytestmark = pytest.mark.rabbitmq


def test_a_killed_broker_comes_back_with_the_news() -> None:
    with Sandbox(rabbitmq="auto", chaos=Chaos(broker_kills=1.0)) as sandbox:
        node = sandbox.broker.node
        before = node.pid
        identifier = sandbox.publish([np.zeros(2)])
        # Only what goes through the broker kills it; the reminder afterwards does not, or it would never end.
        sandbox.wait_for(lambda: node.pid not in (None, before) and node.running, 60)
        leaf = sandbox.credentials[0]
        # The leaf created during the outage waits for the broker.
        late = sandbox.add_leaf()
        assert sandbox.broker.flush(TIMEOUT_S)
        login = pika.PlainCredentials(leaf.id, leaf.session_token)
        connection = pika.BlockingConnection(
            pika.ConnectionParameters(node.host, node.port, leaf.tree_id, login, socket_timeout=TIMEOUT_S)
        )
        try:
            channel = connection.channel()
            method, _, body = next(iter(channel.consume(leaf.id, inactivity_timeout=30)))
            channel.basic_ack(method.delivery_tag)
        finally:
            connection.close()
        assert json.loads(body)["body"] == {"aggregation_id": identifier}
        assert sandbox.chaos_report["broker_kills"] == 1
        assert late in sandbox.credentials
