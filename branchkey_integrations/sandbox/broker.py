"""The sandbox's side of a RabbitMQ, private or running already: create leaves there, and send them notifications."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol
from urllib.parse import urlsplit

from branchkey_integrations.errors import ConfigurationError
from branchkey_integrations.sandbox.broker_definitions import leaf_definitions
from branchkey_integrations.sandbox.broker_management import ManagedBroker
from branchkey_integrations.sandbox.broker_node import PrivateBroker
from branchkey_integrations.sandbox.broker_publisher import Publisher

__all__ = ["BrokerLink", "PrivateBroker"]

_AMQP_PORT = 5672


class _Administration(Protocol):
    def add_leaf(self, tree_id: str, branch_id: str, leaf_id: str, session_token: str) -> None: ...

    def close(self) -> None: ...


class _PrivateAdministration:
    """Create leaves on a private node by importing definitions, and end the node with the link."""

    def __init__(self, node: PrivateBroker) -> None:
        self.node = node

    def add_leaf(self, tree_id: str, branch_id: str, leaf_id: str, session_token: str) -> None:
        admin = self.node.admin
        self.node.import_definitions(leaf_definitions(tree_id, branch_id, leaf_id, session_token, admin))

    def close(self) -> None:
        self.node.stop()


class BrokerLink:
    """Hold what the sandbox needs of a broker; made by :meth:`open`.

    Names are those measured on the official clients: virtual host = tree, fanout exchange = branch, queue and user = leaf.
    """

    def __init__(self, url: str, administration: _Administration, node: PrivateBroker | None = None) -> None:
        self.url = url
        self.node = node
        self._administration = administration
        parts = urlsplit(url)
        self.host = str(parts.hostname)
        self.port = parts.port or _AMQP_PORT
        self._publisher = Publisher(url)

    def __repr__(self) -> str:
        return f"BrokerLink({self.host}:{self.port}, private={self.node is not None})"

    def __enter__(self) -> BrokerLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def open(cls, spec: str) -> BrokerLink:
        """Reach a broker.

        Args:
            spec: ``"auto"`` starts a private node of the installed RabbitMQ; ``"amqp://user:password@host:port"`` uses one
                that runs, as an administrator, and creates leaves over its management HTTP API at the same host's port
                15672, or where ``?management=http://host:15672`` says.

        Raises:
            ConfigurationError: ``spec`` is neither.
            SandboxError: the broker is not installed, does not start or does not answer.
        """
        if spec == "auto":
            node = PrivateBroker()
            node.start()
            return cls(node.amqp_url, _PrivateAdministration(node), node)
        managed = ManagedBroker(_checked(spec))
        managed.check()
        return cls(managed.amqp_url, managed)

    def add_leaf(self, tree_id: str, branch_id: str, leaf_id: str, session_token: str) -> None:
        """Create the leaf's user, durable queue and binding, and tree and branch where they are new (up to 0.7 s).

        The leaf may read its own queue and nothing else. Doing it again, also with another token, is fine.

        Raises:
            SandboxError: the broker refused or is away.
        """
        self._administration.add_leaf(tree_id, branch_id, leaf_id, session_token)

    def publish(self, tree_id: str, branch_id: str, body: bytes) -> None:
        """Send a notification to all leaves of a branch; returns at once.

        It is sent by a thread, persistently and in order, and kept until the broker has confirmed it, also across a restart
        of the broker.
        """
        self._publisher.put(tree_id, branch_id, body)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has confirmed all that was published; False when it has not within ``timeout_s``."""
        return self._publisher.flush(timeout_s)

    def close(self) -> None:
        """Send what still waits if that goes at once, end the thread, and stop the node if it is private."""
        self._publisher.close()
        self._administration.close()


def _checked(spec: str) -> str:
    try:
        parts = urlsplit(spec)
        good = parts.scheme == "amqp" and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/")
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        # The URL is not shown: it carries a password.
        raise ConfigurationError(
            what="rabbitmq",
            expected='"auto" or "amqp://user:password@host:port"',
            found="something else",
            fix="Leave virtual hosts out: each tree gets its own",
        )
    return spec
