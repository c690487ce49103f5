"""Both notification channels behind one face, each with a real server, for the contract suite."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from websockets.sync.client import ClientConnection

from branchkey_integrations.config import RetryPolicy, Verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import BranchKeyError, ClientClosedError
from branchkey_integrations.events import AggregateReady, Notification
from branchkey_integrations.listeners.amqp import AmqpListener
from branchkey_integrations.listeners.base import ThreadedListener
from branchkey_integrations.listeners.websocket import WebSocketListener
from tests.support.credentials import make_credentials
from tests.support.rabbitmq import RabbitMQ
from tests.support.websocket_server import WebSocketServer

#: Reconnects fast, so that tests do not wait; still with a pause that doubles.
QUICK = RetryPolicy(backoff_s=0.1, backoff_max_s=0.4)
PATIENCE_S = 15.0


@contextmanager
def starting(listener: ThreadedListener) -> Iterator[None]:
    """Start in a thread for the block, which closes the listener; the start must end with it, and say why."""
    raised: list[BranchKeyError] = []

    def start() -> None:
        try:
            listener.start(60)
        except BranchKeyError as error:
            raised.append(error)

    starter = threading.Thread(target=start)
    starter.start()
    try:
        yield
    finally:
        listener.close()
        starter.join(2)
    assert not starter.is_alive()
    assert [type(error) for error in raised] == [ClientClosedError]


def wait_until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """Wait until ``condition()`` is true, and give its value; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s"
        time.sleep(0.005)


class Heard:
    """Collect what a listener reports."""

    def __init__(self) -> None:
        self.events: list[Notification] = []
        self.failures: list[BranchKeyError | None] = []
        self.threads: set[str] = set()
        #: Raised by the next calls of ``on_event``.
        self.raises: Exception | None = None

    def on_event(self, event: Notification) -> None:
        self.threads.add(threading.current_thread().name)
        self.events.append(event)
        if self.raises is not None:
            raise self.raises

    def on_failure(self, error: BranchKeyError | None) -> None:
        self.failures.append(error)

    @property
    def ids(self) -> list[str]:
        """The aggregation ids, in order."""
        return [event.aggregation_id for event in self.events if isinstance(event, AggregateReady)]


class Channel(Protocol):
    """A server of one kind, and listeners to it."""

    name: str
    heard: Heard

    def listener(
        self, *, port: int | None = None, verify: Verify = True, retry: RetryPolicy = QUICK
    ) -> ThreadedListener:
        """Make a listener for the channel's leaf, or for whatever is at ``port``."""

    def stranger(self) -> ThreadedListener:
        """Make a listener whose credentials the server refuses."""

    def send(self, *bodies: bytes) -> None:
        """Notify the leaf; while it is not listening the messages are kept for it."""

    def forget(self) -> None:
        """Have nothing more waiting for the leaf."""

    def unsettled(self) -> int:
        """Count the messages that the server would send again (with no listener there)."""

    def drop(self) -> None:
        """End all connections from the server's side."""

    def stop(self) -> None:
        """Stop the server; what it keeps for leaves, it keeps."""

    def start(self) -> None:
        """Start it again where it was."""

    def connections(self) -> int:
        """Count the leaf's connections as the server sees them."""

    @property
    def port(self) -> int:
        """Where it listens."""


class AmqpChannel:
    """RabbitMQ and :class:`AmqpListener`."""

    name = "amqp"

    def __init__(self, rabbitmq: RabbitMQ) -> None:
        self.rabbitmq = rabbitmq
        self.leaf = rabbitmq.leaf()
        self.heard = Heard()

    @property
    def port(self) -> int:
        return self.rabbitmq.port

    def listener(
        self,
        *,
        port: int | None = None,
        verify: Verify = True,
        retry: RetryPolicy = QUICK,
        leaf: Credentials | None = None,
        host: str = "127.0.0.1",
        tls: bool = False,
    ) -> AmqpListener:
        return AmqpListener(
            leaf or self.leaf,
            host,
            self.port if port is None else port,
            tls=tls,
            verify=verify,
            on_event=self.heard.on_event,
            on_failure=self.heard.on_failure,
            retry=retry,
        )

    def stranger(self) -> AmqpListener:
        return self.listener(leaf=make_credentials(id=self.leaf.id, tree_id=self.leaf.tree_id))

    def send(self, *bodies: bytes) -> None:
        self.rabbitmq.send(self.leaf, *bodies)

    def forget(self) -> None:
        """Nothing to do: what was settled is gone."""

    def unsettled(self) -> int:
        return self.rabbitmq.ready(self.leaf)

    def drop(self) -> None:
        self.rabbitmq.node.ctl("close_all_connections", "--vhost", self.leaf.tree_id, "maintenance")

    def stop(self) -> None:
        self.rabbitmq.node.halt(kill=True)

    def start(self) -> None:
        self.rabbitmq.node.resume()

    def connections(self) -> int:
        return self.rabbitmq.consumers(self.leaf)


class WebSocketChannel:
    """The small server and :class:`WebSocketListener`."""

    name = "websocket"

    def __init__(self, server: WebSocketServer) -> None:
        self.server = server
        self.leaf = make_credentials()
        self.heard = Heard()

    @property
    def port(self) -> int:
        return self.server.port

    def listener(
        self,
        *,
        port: int | None = None,
        verify: Verify = True,
        retry: RetryPolicy = QUICK,
        **options: Any,
    ) -> WebSocketListener:
        endpoint = self.server.endpoint
        if port is not None:
            endpoint = type(endpoint)(endpoint.scheme, endpoint.host, port)
        settings: dict[str, Any] = {"endpoint": endpoint, "ticket": self.server.ticket, "proxies": None, **options}
        return WebSocketListener(
            self.leaf,
            settings.pop("endpoint"),
            settings.pop("ticket"),
            verify=verify,
            on_event=self.heard.on_event,
            on_failure=self.heard.on_failure,
            retry=retry,
            **settings,
        )

    def stranger(self) -> WebSocketListener:
        self.server.refuse = 401
        return self.listener()

    def send(self, *bodies: bytes) -> None:
        if self.server.connections:
            self.server.send(*bodies)
        else:
            self.server.backlog.extend(bodies)

    def forget(self) -> None:
        self.server.backlog.clear()

    def unsettled(self) -> int:
        return 0

    def drop(self) -> None:
        self.server.close_all(1012)

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server.start()

    def connections(self) -> int:
        return self.server.connections


@contextmanager
def started(listener: ThreadedListener, timeout_s: float = 10.0) -> Iterator[ThreadedListener]:
    """Start a listener for the block; it must be closed within 2 seconds, with its thread."""
    listener.start(timeout_s)
    try:
        yield listener
    finally:
        close_in_time(listener)


def close_in_time(listener: ThreadedListener) -> None:
    """Close a listener: within 2 seconds, and no thread of it left."""
    before = time.monotonic()
    listener.close()
    assert time.monotonic() - before < 2.0
    assert not listener.alive
    assert our_threads() == []


def our_threads() -> list[str]:
    """Name the listeners' threads that run, and those that ``websockets`` started for them."""
    found = []
    for thread in threading.enumerate():
        target = getattr(thread, "_target", None)
        if thread.name in ("branchkey-amqp", "branchkey-websocket") or isinstance(
            getattr(target, "__self__", None), ClientConnection
        ):
            found.append(thread.name)
    return found


class Warnings(logging.Handler):
    """Collect the messages of warnings and worse that the listeners log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def warnings_of_listeners() -> Iterator[list[str]]:
    """Collect for the block."""
    handler = Warnings()
    logger = logging.getLogger("branchkey_integrations.listeners")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
