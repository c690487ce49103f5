"""The session's private RabbitMQ, with leaves made in advance, and what tests want to know of it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pika
import pytest

from branchkey_integrations.credentials import Credentials
from branchkey_integrations.sandbox.broker_definitions import leaf_definitions
from branchkey_integrations.sandbox.broker_node import PrivateBroker
from tests.support.credentials import make_credentials
from tests.support.tls import private_tls

#: Creating a leaf on a running node takes half a second; at boot it is free.
_MADE_IN_ADVANCE = 150
#: Confirming each message waits for the disk, each time.
_FEW = 100


def aggregate(aggregation_id: str) -> bytes:
    """Word the notification of an aggregate."""
    return json.dumps({"message_type": "aggregation_status", "body": {"aggregation_id": aggregation_id}}).encode()


def run_status(status: str) -> bytes:
    """Word the notification of a run status."""
    return json.dumps({"message_type": "run_status", "body": {"run_status": status}}).encode()


class RabbitMQ:
    """A private node and its stock of leaves, each with its own branch, all in one tree."""

    host = PrivateBroker.host

    def __init__(self, tls: tuple[str, str], ca_file: str) -> None:
        self.tree_id = str(uuid.uuid4())
        self.ca_file = ca_file
        self._stock = [make_credentials(tree_id=self.tree_id) for _ in range(_MADE_IN_ADVANCE)]
        self.node = PrivateBroker(definitions(self._stock), tls=tls, ca=ca_file)

    @property
    def port(self) -> int:
        """Port without TLS."""
        return self.node.port

    @property
    def tls_port(self) -> int:
        """Port with TLS, certificate for localhost and 127.0.0.1 by the CA in ``ca_file``."""
        assert self.node.tls_port is not None
        return self.node.tls_port

    def leaf(self) -> Credentials:
        """Give a leaf that nobody else uses."""
        return self._stock.pop()

    def send(self, leaf: Credentials, *bodies: bytes) -> None:
        """Publish messages to the leaf's branch; they lie in its queue when this returns."""
        with pika.BlockingConnection(self._parameters()) as connection:
            channel = connection.channel()
            if len(bodies) < _FEW:
                channel.confirm_delivery()
            for body in bodies:
                channel.basic_publish(leaf.branch_id, "", body, pika.BasicProperties(delivery_mode=2), mandatory=True)
            # The answer comes behind the messages on the same channel.
            channel.queue_declare(leaf.id, passive=True)

    def ready(self, leaf: Credentials) -> int:
        """Count the messages that wait in the leaf's queue and are with no consumer."""
        with pika.BlockingConnection(self._parameters()) as connection:
            found = connection.channel().queue_declare(leaf.id, passive=True)
            return int(found.method.message_count)

    def consumers(self, leaf: Credentials) -> int:
        """Count the consumers of the leaf's queue."""
        with pika.BlockingConnection(self._parameters()) as connection:
            found = connection.channel().queue_declare(leaf.id, passive=True)
            return int(found.method.consumer_count)

    def delete_queue(self, leaf: Credentials) -> None:
        """Take the leaf's queue away."""
        with pika.BlockingConnection(self._parameters()) as connection:
            connection.channel().queue_delete(leaf.id)

    def create_queue(self, leaf: Credentials) -> None:
        """Give the leaf its queue back."""
        with pika.BlockingConnection(self._parameters()) as connection:
            channel = connection.channel()
            channel.queue_declare(leaf.id, durable=True)
            channel.queue_bind(leaf.id, leaf.branch_id)

    def connections(self, leaf: Credentials) -> list[str]:
        """Describe the leaf's connections that the node knows: user, state, heartbeat in seconds, properties (0.5 s)."""
        columns = ("user", "state", "timeout", "client_properties")
        lines = self.node.ctl("list_connections", *columns, "--silent").splitlines()
        return [line for line in lines if line.startswith(leaf.id)]

    def _parameters(self) -> pika.ConnectionParameters:
        parameters = pika.URLParameters(f"{self.node.amqp_url}/%2F")
        parameters.virtual_host = self.tree_id
        return parameters


def definitions(leaves: Sequence[Credentials]) -> dict[str, list[Any]]:
    """Describe leaves as ``definitions.json`` does."""
    merged: dict[str, list[Any]] = {}
    for leaf in leaves:
        described = leaf_definitions(leaf.tree_id, leaf.branch_id, leaf.id, leaf.session_token)
        for kind, entries in described.items():
            merged.setdefault(kind, []).extend(entries)
    return merged


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """Run a private RabbitMQ for the session; tests that use it carry the mark ``rabbitmq``.

    Name it in the test's signature, or in a fixture of a wider scope: asked for later, it would start behind the back of the
    guard, which would then find its thread.
    """
    files = private_tls(tmp_path_factory.mktemp("rabbitmq"))
    made = RabbitMQ(files.pair, files.ca)
    made.node.start()
    try:
        yield made
    finally:
        made.node.stop()
