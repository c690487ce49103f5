"""What a platform and the line to it do to a leaf that listens over WebSocket: tickets run out, tokens are replaced, bursts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from branchkey_integrations import waiting
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import AuthenticationError, NotificationError
from branchkey_integrations.events import AggregateReady, Mailbox
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.channels import WebSocketChannel, our_threads, started, wait_until, warnings_of_listeners
from tests.support.rounds import connect
from tests.support.stores import small_store
from tests.support.websocket_server import WebSocketServer, websocket_server

LAYERS = small_store().read()


@pytest.fixture
def server() -> Iterator[WebSocketServer]:
    with websocket_server() as made:
        yield made


@pytest.fixture
def channel(server: WebSocketServer) -> WebSocketChannel:
    return WebSocketChannel(server)


# --- tickets that run out -------------------------------------------------------------------------------------------------


def late(lifetime_s: float) -> Callable[[Any], Answer | None]:
    """Hand a ticket out when it is worthless."""

    def answer(call: Any) -> Answer | None:
        issued: Answer | None = call.proceed()
        call.sleep(2 * lifetime_s)
        return issued

    return answer


def test_a_ticket_that_ran_out_on_its_way_is_asked_for_anew() -> None:
    with Sandbox(leaves=1, ticket_lifetime_s=0.1) as sandbox, sandbox.intercept("ticket", late(0.1), times=1):
        with connect(sandbox) as client:
            newest = sandbox.publish(LAYERS)
            assert client.wait_for_aggregation(5) == newest
        assert (sandbox.hits("ticket"), sandbox.hits("ws")) == (2, 2)


def test_tickets_that_all_run_out_are_a_refusal_and_no_flood() -> None:
    with Sandbox(leaves=1, ticket_lifetime_s=0.05) as sandbox, sandbox.intercept("ticket", late(0.05)):
        with pytest.raises(NotificationError, match="status 401"):
            connect(sandbox)
        assert (sandbox.hits("ticket"), sandbox.hits("ws")) == (2, 2)
        assert our_threads() == []


def test_a_ticket_that_runs_out_on_the_way_back_tells_nobody() -> None:
    with Sandbox(leaves=1, ticket_lifetime_s=0.1) as sandbox, connect(sandbox) as client:
        with sandbox.intercept("ticket", late(0.1), times=1):
            sandbox.disconnect(1012)
            sandbox.wait_for(lambda: sandbox.hits("ticket") == 2)
            newest = sandbox.publish(LAYERS)
            assert client.wait_for_aggregation(5) == newest
        assert client._refused is None
        assert (sandbox.hits("ticket"), sandbox.hits("ws")) == (3, 3)


# --- a token that is replaced -----------------------------------------------------------------------------------------------


def test_a_replaced_token_is_told_when_the_connection_is_made_anew_and_the_new_one_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Sandbox(leaves=1) as sandbox:
        (leaf,) = sandbox.credentials
        renewed = Credentials(**{**leaf.to_dict(), "session_token": "a-token-that-is-newer"})
        with connect(sandbox) as client:
            sandbox._service.roster.add(renewed)  # type: ignore[union-attr]
            # The connection stands, and goes on.
            first = sandbox.publish(LAYERS)
            assert client.wait_for_aggregation(5) == first
            sandbox.disconnect(1012)
            sandbox.wait_for(lambda: client._refused)
            second = sandbox.publish(LAYERS)
            monkeypatch.setattr(waiting, "REFUSED_GRACE_S", 0.0)
            with pytest.raises(AuthenticationError) as caught:
                client.wait_for_aggregation(5)
            assert leaf.session_token not in str(caught.value)
        with connect(sandbox) as client:
            assert client.wait_for_aggregation(5) == second


# --- more than can be taken in --------------------------------------------------------------------------------------------


def test_a_burst_waits_at_the_platform_and_not_in_the_memory_of_a_leaf_that_is_slow(channel: WebSocketChannel) -> None:
    count = 10_000
    # Large enough for ten thousand of them to overflow what the kernel keeps for a connection.
    filling = "x" * 4000
    mailbox, entered, leave = Mailbox(), threading.Event(), threading.Event()
    sent: list[int] = []

    def slowly(event: AggregateReady) -> None:
        entered.set()
        leave.wait(60)
        mailbox.put(event.aggregation_id)

    def send() -> None:
        for number in range(count):
            body = {"aggregation_id": f"a{number}", "filling": filling}
            channel.server.send(json.dumps({"message_type": "aggregation_status", "body": body}))
            sent.append(number)

    with warnings_of_listeners() as warnings, started(channel.listener()) as listener:
        listener._on_event = slowly  # type: ignore[assignment]
        sender = threading.Thread(target=send)
        sender.start()
        try:
            assert entered.wait(5)
            # The sender is held up: who read on would take all of it.
            wait_until(lambda: _stands_still(sent))
            assert len(sent) < count
        finally:
            leave.set()
            sender.join(30)
        wait_until(lambda: mailbox.mark() == count, 60)
        assert mailbox.get_nowait() == f"a{count - 1}"
        assert channel.server.connections == 1
    assert warnings == []


def _stands_still(sent: list[int]) -> bool:
    before = len(sent)
    threading.Event().wait(0.3)
    return len(sent) == before
