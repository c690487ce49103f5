"""One AMQP connection from first byte to last, driven in the thread that calls :meth:`AmqpLink.run`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop

from branchkey_integrations.listeners.dial import shut_down

#: Longest time a broker that does not answer is given to agree to the end of a connection, in seconds.
_FAREWELL_S = 0.8
#: Pause between two looks at what the queue still holds, in seconds.
_LOOK_S = 0.1
#: Messages the broker may send ahead of our acknowledgements: enough to keep a backlog flowing, little enough that a queue
#: full of junk does not fill the memory.
_PREFETCH = 64
#: Empty looks in a row after which nothing can be on its way any more: the first may overtake the last messages.
_EMPTY_LOOKS = 2
#: Looks in a row, each half a heartbeat after the other, that find nothing new before the line counts as dead.
_SILENT_LOOKS = 3


class _Loop(IOLoop):  # type: ignore[misc]
    """Know the file descriptor of the connection, so that it can be ended whatever state pika is in.

    pika 1.3 and 1.4 cannot abort the AMQP handshake (an assertion fails inside); a socket that is shut down ends it
    through the ordinary way of a lost connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watched: set[int] = set()

    def add_handler(self, fd: int, handler: Any, events: int) -> None:
        self._watched.add(fd)
        super().add_handler(fd, handler, events)

    def remove_handler(self, fd: int) -> None:
        self._watched.discard(fd)
        super().remove_handler(fd)

    def cut(self) -> None:
        for fd in list(self._watched):
            with contextlib.suppress(OSError):
                twin = socket.socket(fileno=os.dup(fd))
                shut_down(twin)
                twin.close()


class AmqpLink:
    """Consume one queue over one connection.

    Args:
        parameters: where and as whom.
        queue: its name; it must exist, nothing is declared.
        on_body: called with each message's body; the message is acknowledged when it returns.
        on_drained: called once, when all messages that lay in the queue at the start were handed to ``on_body``.
    """

    def __init__(
        self,
        parameters: pika.ConnectionParameters,
        queue: str,
        on_body: Callable[[bytes], None],
        on_drained: Callable[[], None],
    ) -> None:
        self._parameters = parameters
        self._queue = queue
        self._on_body = on_body
        self._on_drained = on_drained
        self._loop = _Loop()
        self._connection: Any = None
        self._channel: Any = None
        self._opened = False
        self._error: BaseException | None = None
        self._channel_error: BaseException | None = None
        self._over = False
        self._closing = False
        self._peek = True
        self._expected: int | None = None
        self._delivered = 0
        self._empty_looks = 0
        self._seen_at_last_look = -1
        self._drained = False
        self._received = -1
        self._silent_looks = 0
        # The loop must not be woken after it was closed, and only close() comes from another thread.
        self._lock = threading.Lock()
        self._loop_open = True

    @property
    def opened(self) -> bool:
        """Whether the login succeeded."""
        return self._opened

    @property
    def drained(self) -> bool:
        """Whether all that lay in the queue at the start was delivered."""
        return self._drained

    def run(self) -> BaseException:
        """Work until the connection ends; gives the reason. Everything is released when it returns."""
        hush_pika()
        try:
            self._connection = pika.SelectConnection(
                self._parameters,
                on_open_callback=self._on_open,
                on_open_error_callback=self._on_over,
                on_close_callback=self._on_over,
                custom_ioloop=self._loop,
            )
            # A stop asked for before start() has begun would be forgotten by the loop, so over is looked at in between.
            while not self._over:
                self._loop.start()
        except Exception as error:
            # pika raises what a callback raised, and sometimes its own assertions; the socket must not stay behind.
            self._loop.cut()
            self._error = self._error or error
            if not isinstance(error, (pika.exceptions.AMQPError, OSError, AssertionError)):
                raise
        finally:
            with self._lock:
                self._loop_open = False
            self._loop.close()
        return self._channel_error or self._error or ConnectionError("the connection ended")

    def close(self) -> None:
        """End the connection in good order, within about a second; callable from any thread."""
        with self._lock:
            if self._loop_open:
                self._loop.add_callback_threadsafe(self._say_farewell)

    def _say_farewell(self) -> None:
        if self._closing or self._over:
            return
        self._closing = True
        self._loop.call_later(_FAREWELL_S, self._loop.cut)
        connection = self._connection
        if connection is not None and connection.is_open:
            connection.close()
        elif connection is not None and connection.connection_state == connection.CONNECTION_INIT:
            # TCP or TLS is being set up: pika can abort that itself.
            connection.close()
        else:
            self._loop.cut()

    def _on_over(self, _connection: Any, error: BaseException) -> None:
        self._error = error
        self._over = True
        self._loop.stop()

    def _end(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open:
            self._loop.call_later(_FAREWELL_S, self._loop.cut)
            connection.close()

    def _on_open(self, connection: Any) -> None:
        self._opened = True
        if connection.params.heartbeat:
            self._loop.call_later(connection.params.heartbeat / 2, self._feel_pulse)
        self._open_channel(connection)

    def _feel_pulse(self) -> None:
        # The broker sends something at least every half heartbeat. pika itself looks once in a heartbeat and five seconds,
        # and may need two looks. After a standstill of this process only one look comes late, and what came is read before
        # the next one.
        connection = self._connection
        if self._over or self._closing or not connection.is_open:
            return
        received = connection.bytes_received
        self._silent_looks = self._silent_looks + 1 if received == self._received else 0
        self._received = received
        if self._silent_looks >= _SILENT_LOOKS:
            self._channel_error = pika.exceptions.AMQPHeartbeatTimeout("nothing came for one and a half heartbeats")
            # There is nobody to say good-bye to.
            self._loop.cut()
            return
        self._loop.call_later(connection.params.heartbeat / 2, self._feel_pulse)

    def _open_channel(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_cancel_callback(self._on_cancelled)
        if self._peek:
            # Passive: it asks, and creates nothing. Measured on RabbitMQ 3.10.8: it needs no permission.
            channel.queue_declare(self._queue, passive=True, callback=self._on_counted)
        else:
            self._consume()

    def _on_counted(self, frame: Any) -> None:
        self._expected = int(frame.method.message_count)
        self._consume()

    def _consume(self) -> None:
        self._channel.basic_qos(prefetch_count=_PREFETCH)
        # A broker may take minutes to see that an earlier connection of this leaf is dead, and would go on dealing half of
        # the messages to it. The consumer that came last goes first. Brokers without priorities pay no heed.
        priority = {"x-priority": int(time.time())}
        self._channel.basic_consume(self._queue, self._on_message, arguments=priority, callback=self._on_consuming)

    def _on_consuming(self, _frame: Any) -> None:
        self._check_drained()
        if not self._drained:
            self._loop.call_later(_LOOK_S, self._look)

    def _on_message(self, channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        self._on_body(body)
        channel.basic_ack(method.delivery_tag)
        self._delivered += 1
        self._check_drained()

    def _check_drained(self) -> None:
        if not self._drained and self._expected is not None and self._delivered >= self._expected:
            self._done()

    def _done(self) -> None:
        self._drained = True
        self._on_drained()

    def _look(self) -> None:
        # Messages can leave the queue another way (they expire, another consumer takes them), so counting alone could
        # wait for ever.
        channel = self._channel
        if self._drained or self._closing or channel is None or not channel.is_open:
            return
        if self._peek:
            channel.queue_declare(self._queue, passive=True, callback=self._on_looked)
        else:
            channel.basic_qos(prefetch_count=_PREFETCH, callback=self._on_looked)

    def _on_looked(self, frame: Any) -> None:
        left = getattr(frame.method, "message_count", 0)
        quiet = left == 0 and self._delivered == self._seen_at_last_look
        self._empty_looks = self._empty_looks + 1 if quiet else 0
        self._seen_at_last_look = self._delivered
        if self._drained:
            return
        if self._empty_looks >= _EMPTY_LOOKS:
            self._done()
        else:
            self._loop.call_later(_LOOK_S, self._look)

    def _on_cancelled(self, _frame: Any) -> None:
        # The queue was deleted, or its node went away; nothing would ever come on this channel again.
        self._channel_error = pika.exceptions.ConsumerCancelled()
        self._end()

    def _on_channel_closed(self, _channel: Any, reason: BaseException) -> None:
        if self._over or self._closing or self._channel_error is not None:
            return
        if isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            if reason.reply_code == 403 and self._peek and self._expected is None:
                # A broker that guards even the passive question: do without the count.
                self._peek = False
                self._open_channel(self._connection)
                return
            self._channel_error = reason
            self._end()


class _OurThreads(logging.Filter):
    """Drop what pika logs in our threads: each failed try several times, with tracebacks; we report it once.

    This counts for its debug lines too, since those of the login may hold the session token.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.threadName or "").startswith("branchkey-")


_filter = _OurThreads()


def hush_pika() -> None:
    """Silence pika's loggers in this package's threads; other users of pika in the process are not touched."""
    for name in list(logging.root.manager.loggerDict):
        if name == "pika" or name.startswith("pika."):
            # addFilter adds the same object only once.
            logging.getLogger(name).addFilter(_filter)


def ssl_options(context: ssl.SSLContext, host: str) -> Any:
    """Give pika's form of a TLS context."""
    return pika.SSLOptions(context, host)
