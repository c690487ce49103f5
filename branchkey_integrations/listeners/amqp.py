"""Notifications over AMQP 0-9-1: one thread, one connection, one queue that must exist already."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pika
import pika.exceptions
from pika.adapters.utils import connection_workflow

from branchkey_integrations.config import RetryPolicy, Verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import BranchKeyError, NotificationError, UnreachableError
from branchkey_integrations.listeners.amqp_link import AmqpLink, ssl_options
from branchkey_integrations.listeners.base import LostError, OnEvent, OnFailure, ThreadedListener
from branchkey_integrations.listeners.dial import connection_error, tls_context

_HEARTBEAT_S = 30
_CONNECT_S = 10.0
_HANDSHAKE_S = 15.0


class AmqpListener(ThreadedListener):
    """Listen to the leaf's own queue.

    Virtual host, user, password and queue are ``tree_id``, ``id``, ``session_token`` and ``id`` of the credentials, as
    measured on the official clients 2.7.0 to 2.9.3. Nothing is declared: read permission on the queue is all it needs.
    Unacknowledged messages come again after an outage, so each id is delivered at least once.

    Args:
        credentials: of the leaf.
        host: of the broker, without a port.
        port: 5672 by custom, 5671 with TLS.
        tls: whether to speak TLS.
        verify: as for HTTP, see :data:`~branchkey_integrations.config.Verify`.
        on_event: called in the listener's thread with each notification of a known type; must not block.
        on_failure: called in that thread with an error when reconnecting is refused, and with None when it is well again.
        retry: the pace of reconnecting; it never gives up.

    Raises:
        TLSError: the CA bundle cannot be read.
    """

    name = "amqp"

    def __init__(
        self,
        credentials: Credentials,
        host: str,
        port: int,
        *,
        tls: bool,
        verify: Verify,
        on_event: OnEvent,
        on_failure: OnFailure,
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(on_event, on_failure, retry)
        self._credentials = credentials
        self._host = host
        self._port = port
        self._tls = None  # so that a repr works where the next line fails
        self._tls = tls_context(verify) if tls else None

    @property
    def _peer(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}"

    @property
    def _what(self) -> str:
        return f"notifications from the broker at {self._peer}"

    def __repr__(self) -> str:
        return f"AmqpListener({self._credentials.id!r}, {self._peer!r}, tls={self._tls is not None})"

    def _parameters(self) -> pika.ConnectionParameters:
        leaf = self._credentials
        return pika.ConnectionParameters(
            host=self._host,
            port=self._port,
            virtual_host=leaf.tree_id,
            credentials=pika.PlainCredentials(leaf.id, leaf.session_token),
            heartbeat=_HEARTBEAT_S,
            # A broker short of memory or disk blocks who publishes. A leaf does not, and goes on hearing meanwhile;
            # whether the broker lives is for the heartbeat to say.
            blocked_connection_timeout=None,
            socket_timeout=_CONNECT_S,
            stack_timeout=_HANDSHAKE_S,
            connection_attempts=1,
            ssl_options=ssl_options(self._tls, self._host) if self._tls is not None else None,
            client_properties={"connection_name": f"leaf-{leaf.id}"},
        )

    def _listen(self) -> None:
        try:
            # pika resolves names in a thread of its own that outlives a close; a name that fails here never gets there.
            socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise connection_error(self._what, self._peer, error) from None
        link = AmqpLink(self._parameters(), self._credentials.id, self._deliver, self._ready)
        self._interruptible(link.close)
        try:
            reason = link.run()
        finally:
            self._interruptible(None)
        if self._stop.is_set():
            return
        raise self._explain(reason, link)

    def _explain(self, reason: BaseException, link: AmqpLink) -> BranchKeyError | LostError:
        reason = _innermost(reason)
        refused = self._refusal(reason)
        if refused is not None:
            return refused
        if link.drained:
            return LostError(_short(reason))
        what = self._what
        if isinstance(reason, pika.exceptions.IncompatibleProtocolError):
            return NotificationError(
                what=what,
                expected="a broker that speaks AMQP 0-9-1" + (" over TLS" if self._tls else " without TLS"),
                found="something else",
                fix="Check the port, and whether it wants TLS (rbmq_ssl=True) or not",
            )
        if isinstance(reason, pika.exceptions.AMQPError):
            return UnreachableError(
                what=what,
                expected="a queue that can be read to its end" if link.opened else "a login",
                found=_short(reason),
                fix="Try again" if link.opened else "Check that the port is the broker's; with TLS it is another one",
            )
        return connection_error(what, self._peer, reason)

    def _refusal(self, reason: BaseException) -> NotificationError | None:
        leaf = self._credentials
        where = f"broker {self._peer}, virtual host {leaf.tree_id!r}, leaf {leaf.id!r}"
        text = str(reason.args[0]) if reason.args else ""
        if isinstance(reason, (pika.exceptions.AuthenticationError, pika.exceptions.ProbableAuthenticationError)):
            # pika takes any end of the connection at this point for a refusal; only a broker that says so means it.
            if isinstance(reason, pika.exceptions.AuthenticationError) or "(403)" in text:
                return NotificationError(
                    what=f"login at {where}",
                    expected="credentials the broker knows",
                    found="a refusal",
                    fix="Check id and session_token, or create the leaf again",
                )
        elif isinstance(reason, pika.exceptions.ProbableAccessDeniedError):
            if "(530)" in text or "(403)" in text:
                return NotificationError(
                    what=f"login at {where}",
                    expected="a virtual host that exists and admits the leaf",
                    found="a refusal",
                    fix="Check tree_id in the credentials",
                )
        elif isinstance(reason, pika.exceptions.ConsumerCancelled):
            return NotificationError(
                what=f"queue of {where}",
                expected="a queue that stays",
                found="one that was deleted, or whose broker node went away",
                fix="It is looked for again; if it stays away, create the leaf again",
            )
        elif isinstance(reason, pika.exceptions.ChannelClosedByBroker) and reason.reply_code in (403, 404, 405):
            missing = reason.reply_code == 404
            return NotificationError(
                what=f"queue of {where}",
                expected="a queue named like the leaf, with permission to read it",
                found="no such queue" if missing else f"a refusal ({reason.reply_code})",
                fix="Create the leaf again" if missing else "Ask for read permission, or end the other consumer",
            )
        return None


def _innermost(reason: BaseException) -> BaseException:
    """Dig the cause out of the wrappers that pika puts around errors of a connection that was never open."""
    while True:
        inner: Any = None
        if isinstance(reason, connection_workflow.AMQPConnectionWorkflowFailed):
            # One a resolved address; a certificate that was refused says more than a port that is closed on IPv6.
            ranked = sorted(reason.exceptions, key=lambda each: isinstance(_innermost(each), ssl.SSLError))
            inner = ranked[-1] if ranked else None
        elif isinstance(reason, connection_workflow.AMQPConnectorPhaseErrorBase):
            inner = reason.exception
        elif type(reason) is pika.exceptions.AMQPConnectionError and reason.args:
            inner = reason.args[0]
        if not isinstance(inner, BaseException):
            if isinstance(reason, connection_workflow.AMQPConnectorStackTimeout):
                return TimeoutError("no answer in time")
            return reason
        reason = inner


def _short(reason: BaseException) -> str:
    if isinstance(reason, (pika.exceptions.ConnectionClosed, pika.exceptions.ChannelClosed)):
        return f"the broker ended it: {reason.reply_code} {str(reason.reply_text)[:120]}"
    if isinstance(reason, pika.exceptions.AMQPHeartbeatTimeout):
        return "the broker fell silent"
    return f"the connection was lost ({type(reason).__name__})"
