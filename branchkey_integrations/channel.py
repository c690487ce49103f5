"""Choose and open the notification channel of a client."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from branchkey_integrations.api import Api
from branchkey_integrations.config import AMQPS_PORT, Endpoint, RetryPolicy, Verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import ApiError, BranchKeyError, ConfigurationError
from branchkey_integrations.events import Notification
from branchkey_integrations.listeners import Listener, Ticket

NOTIFICATIONS = ("auto", "amqp", "websocket")
#: What an API without tickets answers to the request for one.
_NO_TICKETS = frozenset({404, 405, 501})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def open_channel(
    kind: str,
    api: Api,
    credentials: Credentials,
    endpoint: Endpoint,
    *,
    amqp_host: str | None,
    amqp_port: int,
    amqp_tls: bool | None,
    verify: Verify,
    proxies: Mapping[str, str] | None,
    retry: RetryPolicy,
    timeout_s: float,
    on_event: Callable[[Notification], None],
    on_failure: Callable[[BranchKeyError | None], None],
) -> Listener:
    """Open the channel and return it when it listens; when this raises, nothing is left running.

    Args:
        kind: ``"amqp"``, ``"websocket"``, or ``"auto"``: AMQP when a broker host is given, else WebSocket, and AMQP at the
            platform's host where the platform has no WebSocket tickets.
    """
    if endpoint.scheme == "http" and endpoint.host not in _LOOPBACK:
        warnings.warn(
            f"the session token and all weights cross the network to {endpoint.netloc} in the clear; pass an https host",
            stacklevel=3,
        )
    ticket: tuple[str, str] | None = None
    if kind == "auto":
        kind = "amqp" if amqp_host else "websocket"
        if kind == "websocket":
            try:
                ticket = api.websocket_ticket()
            except ApiError as error:
                if error.status not in _NO_TICKETS:
                    raise
                kind = "amqp"
    listener = (
        _amqp(credentials, amqp_host or endpoint.host, amqp_port, amqp_tls, verify, retry, on_event, on_failure)
        if kind == "amqp"
        else _websocket(credentials, endpoint, api, ticket, verify, proxies, retry, on_event, on_failure)
    )
    listener.start(timeout_s)
    return listener


def _amqp(
    credentials: Credentials,
    host: str,
    port: int,
    tls: bool | None,
    verify: Verify,
    retry: RetryPolicy,
    on_event: Callable[[Notification], None],
    on_failure: Callable[[BranchKeyError | None], None],
) -> Listener:
    from branchkey_integrations.listeners.amqp import AmqpListener

    speaks_tls = port == AMQPS_PORT if tls is None else tls
    if not speaks_tls and host not in _LOOPBACK:
        warnings.warn(
            f"the session token crosses the network to {host}:{port} in the clear; pass rbmq_port=5671 or rbmq_ssl=True",
            stacklevel=4,
        )
    return AmqpListener(
        credentials, host, port, tls=speaks_tls, verify=verify, on_event=on_event, on_failure=on_failure, retry=retry
    )


def _websocket(
    credentials: Credentials,
    endpoint: Endpoint,
    api: Api,
    first: tuple[str, str] | None,
    verify: Verify,
    proxies: Mapping[str, str] | None,
    retry: RetryPolicy,
    on_event: Callable[[Notification], None],
    on_failure: Callable[[BranchKeyError | None], None],
) -> Listener:
    from branchkey_integrations.listeners.websocket import WebSocketListener

    unused = [first] if first else []

    def ticket() -> Ticket:
        # The ticket that showed which channel to take serves the first connection.
        return Ticket(*(unused.pop() if unused else api.websocket_ticket()))

    return WebSocketListener(
        credentials,
        endpoint,
        ticket,
        verify=verify,
        proxies=proxies,
        on_event=on_event,
        on_failure=on_failure,
        retry=retry,
    )


def check_kind(kind: object) -> str:
    """Check the ``notifications`` option."""
    if not isinstance(kind, str) or kind not in NOTIFICATIONS:
        raise ConfigurationError(
            what="notifications", expected=" or ".join(NOTIFICATIONS), found=repr(kind), fix='Pass notifications="auto"'
        )
    return kind
