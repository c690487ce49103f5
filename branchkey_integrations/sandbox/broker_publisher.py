"""Publish notifications from a thread: persistent, confirmed, in order, and kept until the broker has them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import pika
import pika.exceptions

logger = logging.getLogger("branchkey_integrations.sandbox")

#: A broker that is silent for two of these, in seconds, counts as gone.
_HEARTBEAT_S = 10
_CONNECT_S = 3.0
_HANDSHAKE_S = 5.0
#: How often the idle thread answers heartbeats, in seconds.
_IDLE_S = 3.0
_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_CLOSE_S = 1.8
_LAST_CHANCE_S = 1.0


@dataclass(frozen=True)
class _Message:
    vhost: str
    exchange: str
    body: bytes


class Publisher:
    """Send messages of many virtual hosts in one order; the thread starts with the first message.

    Args:
        url: ``amqp://user:password@host:port`` of an account that may write everywhere.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: deque[_Message] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._give_up_at = float("inf")
        self._thread: threading.Thread | None = None
        self._channels: dict[str, Any] = {}

    def put(self, vhost: str, exchange: str, body: bytes) -> None:
        """Queue a message; never waits for the broker."""
        with self._changed:
            if self._closing.is_set():
                logger.warning("a notification was dropped: the link to the broker is closed")
                return
            self._waiting.append(_Message(vhost, exchange, body))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="branchkey-publisher", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all messages are confirmed; False when they are not within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self) -> None:
        """Send what goes within a second, then end the thread; 2 seconds at most."""
        with self._changed:
            self._give_up_at = time.monotonic() + _LAST_CHANCE_S
            self._closing.set()
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_CLOSE_S)
            # One that still hangs waits for a broker that neither answers nor hangs up; the heartbeat will end it.
        if self._waiting:
            logger.warning("%d notifications were not sent: the broker did not take them", len(self._waiting))

    def _run(self) -> None:
        _hush_pika()
        failures = 0
        try:
            while True:
                message = self._next()
                if message is None:
                    return
                try:
                    self._send(message)
                except (pika.exceptions.AMQPError, OSError) as error:
                    if _is_hopeless(error):
                        logger.warning("a notification was dropped: the broker knows no such branch (%s)", error)
                        self._drop_connections()
                        self._done()
                        continue
                    self._drop_connections()
                    failures += 1
                    if failures == 1:
                        logger.warning("the broker is away (%s); notifications are kept", type(error).__name__)
                    if self._closing.wait(_PAUSES_S[min(failures, len(_PAUSES_S)) - 1]):
                        # While closing the event is set already, so the pace has to be kept another way.
                        time.sleep(0.05)
                else:
                    failures = 0
                    self._done()
        finally:
            self._drop_connections()

    def _next(self) -> _Message | None:
        """Wait for a message without letting the connections die; None when it is time to end."""
        while True:
            with self._changed:
                if self._closing.is_set() and (not self._waiting or time.monotonic() > self._give_up_at):
                    return None
                if self._waiting:
                    return self._waiting[0]
                self._changed.wait(_IDLE_S)
                if self._waiting or self._closing.is_set():
                    continue
            try:
                for channel in self._channels.values():
                    channel.connection.process_data_events(0)
            except (pika.exceptions.AMQPError, OSError):
                # The next message finds out, and connects anew.
                self._drop_connections()

    def _done(self) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()

    def _send(self, message: _Message) -> None:
        channel = self._channels.get(message.vhost)
        if channel is None:
            parameters = pika.URLParameters(f"{self._url}/%2F")
            parameters.virtual_host = message.vhost
            parameters.heartbeat = _HEARTBEAT_S
            parameters.socket_timeout = _CONNECT_S
            parameters.stack_timeout = _HANDSHAKE_S
            parameters.connection_attempts = 1
            parameters.client_properties = {"connection_name": "sandbox"}
            channel = pika.BlockingConnection(parameters).channel()
            channel.confirm_delivery()
            self._channels[message.vhost] = channel
        # With confirms on, this returns when the broker has written the message to disk, and raises when it has not.
        channel.basic_publish(
            message.exchange, "", message.body, pika.BasicProperties(delivery_mode=2, content_type="application/json")
        )

    def _drop_connections(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            with contextlib.suppress(pika.exceptions.AMQPError, OSError):
                channel.connection.close()


def _is_hopeless(error: Exception) -> bool:
    """Tell whether sending the message again cannot help: its exchange or virtual host does not exist."""
    if isinstance(error, pika.exceptions.ChannelClosedByBroker):
        return bool(error.reply_code == 404)
    # pika wraps the broker's words in an error about a probable cause; "is down", while it starts, is no reason to give up.
    return isinstance(error, pika.exceptions.ProbableAccessDeniedError) and "not found" in str(error)


class _OurThread(logging.Filter):
    """Drop what pika logs in the publisher's thread: it reports a failed try several times over; we report it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != "branchkey-publisher"


_filter = _OurThread()


def _hush_pika() -> None:
    for name in list(logging.root.manager.loggerDict):
        if name == "pika" or name.startswith("pika."):
            # addFilter adds the same object only once.
            logging.getLogger(name).addFilter(_filter)
