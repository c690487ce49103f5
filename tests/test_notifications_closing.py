"""``close()`` ends a listener within 2 seconds, however far it has come and whatever it waits for."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from branchkey_integrations.listeners import amqp_link, base
from branchkey_integrations.sandbox import Sandbox
from tests.support.channels import (
    AmqpChannel,
    WebSocketChannel,
    close_in_time,
    our_threads,
    started,
    starting,
    wait_until,
    warnings_of_listeners,
)
from tests.support.rabbitmq import RabbitMQ, aggregate
from tests.support.relay import blackhole
from tests.support.rounds import connect
from tests.support.stalling import stalling
from tests.support.tls import private_tls
from tests.support.websocket_server import websocket_server

#: What the broker says until a leaf listens, a frame each.
SAID = ["Start", "Tune", "OpenOk", "channel OpenOk", "DeclareOk", "QosOk", "ConsumeOk"]


@pytest.fixture(scope="module", autouse=True)
def broker_before_guards(request: pytest.FixtureRequest) -> None:
    # The guards must see it start before they take their picture.
    if any(item.get_closest_marker("rabbitmq") for item in request.session.items):
        request.getfixturevalue("rabbitmq")


@pytest.fixture
def amqp(rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> AmqpChannel:
    # A broker that does not answer is given up sooner than usual: how long it is given counts where it is blocked.
    monkeypatch.setattr(amqp_link, "_FAREWELL_S", 0.1)
    return AmqpChannel(rabbitmq)


@pytest.fixture
def websocket() -> Iterator[WebSocketChannel]:
    with websocket_server() as server:
        yield WebSocketChannel(server)


@pytest.fixture
def secure_websocket(tmp_path: Path) -> Iterator[WebSocketChannel]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*private_tls(tmp_path).pair)
    with websocket_server(context) as server:
        yield WebSocketChannel(server)


# --- AMQP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frames(rabbitmq: RabbitMQ) -> list[int]:
    """Lengths of the frames that the broker sends until a leaf listens."""
    channel = AmqpChannel(rabbitmq)
    with stalling(channel.port, None) as line, started(channel.listener(port=line.port)):
        rest = bytes(line.said)
    lengths = []
    while rest:
        length = 8 + int.from_bytes(rest[3:7], "big")
        lengths.append(length)
        rest = rest[length:]
    return lengths


@pytest.mark.rabbitmq
@pytest.mark.parametrize("stage", range(len(SAID)), ids=SAID)
def test_close_while_the_broker_owes_an_answer(amqp: AmqpChannel, frames: list[int], stage: int) -> None:
    # Within the frame and before it: something was heard already, or nothing.
    with stalling(amqp.port, sum(frames[:stage]) + 5) as line:
        listener = amqp.listener(port=line.port)
        with starting(listener):
            assert line.stalled.wait(5)
            close_in_time(listener)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("heard", [1, 200, 1200])
def test_close_in_the_middle_of_a_tls_handshake_with_the_broker(
    amqp: AmqpChannel, rabbitmq: RabbitMQ, heard: int
) -> None:
    with stalling(rabbitmq.tls_port, heard) as line:
        listener = amqp.listener(port=line.port, tls=True, verify=False)
        with starting(listener):
            assert line.stalled.wait(5)
            close_in_time(listener)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("heard", [5, 530, 560])
def test_close_while_a_connection_is_made_anew(amqp: AmqpChannel, heard: int) -> None:
    with stalling(amqp.port, heard, lines=1) as line, started(amqp.listener(port=line.port)) as listener:
        amqp.drop()
        assert line.stalled.wait(5)
        assert not listener.connected
        close_in_time(listener)


# --- WebSocket ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heard", [1, 40], ids=["before the answer", "within the answer"])
def test_close_while_an_upgrade_stalls(websocket: WebSocketChannel, heard: int) -> None:
    with stalling(websocket.port, heard) as line:
        listener = websocket.listener(port=line.port)
        with starting(listener):
            assert line.stalled.wait(5)
            close_in_time(listener)


def test_close_while_the_first_ping_is_not_answered(websocket: WebSocketChannel) -> None:
    with stalling(websocket.port, None) as line, started(websocket.listener(port=line.port)):
        length = line.said.index(b"\r\n\r\n") + 4
    with stalling(websocket.port, length) as stalled:
        listener = websocket.listener(port=stalled.port)
        with starting(listener):
            wait_until(lambda: websocket.connections() == 1)
            assert stalled.stalled.wait(5)
            assert not listener.connected
            close_in_time(listener)


@pytest.mark.parametrize("heard", [1, 200, 900])
def test_close_in_the_middle_of_a_tls_handshake_with_the_platform(
    secure_websocket: WebSocketChannel, heard: int
) -> None:
    with stalling(secure_websocket.port, heard) as line:
        listener = secure_websocket.listener(port=line.port, verify=False)
        with starting(listener):
            assert line.stalled.wait(5)
            close_in_time(listener)


@pytest.mark.parametrize("heard", [1, 40])
def test_close_while_a_websocket_is_opened_anew(websocket: WebSocketChannel, heard: int) -> None:
    with stalling(websocket.port, heard, lines=1) as line, started(websocket.listener(port=line.port)) as listener:
        websocket.drop()
        assert line.stalled.wait(5)
        assert not listener.connected
        close_in_time(listener)


# --- what cannot be cut short: close() does not wait for it ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("amqp", marks=pytest.mark.rabbitmq), "websocket"])
def test_close_while_a_handler_hangs(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    channel: Any = request.getfixturevalue(kind)
    entered, leave = threading.Event(), threading.Event()

    def hang(_event: object) -> None:
        entered.set()
        leave.wait(30)

    listener = channel.listener()
    listener.start(10)
    listener._on_event = hang
    channel.send(aggregate("a1"))
    assert entered.wait(5)
    with warnings_of_listeners() as warnings:
        assert _seconds(listener.close) < 2.0
    assert not listener.alive
    assert len(warnings) == 1
    leave.set()
    wait_until(lambda: our_threads() == [])


@pytest.mark.parametrize("kind", [pytest.param("amqp", marks=pytest.mark.rabbitmq), "websocket"])
def test_close_while_a_name_is_looked_up(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel: Any = request.getfixturevalue(kind)
    asked, answer, resolve = threading.Event(), threading.Event(), socket.getaddrinfo

    def slow(*arguments: Any, **options: Any) -> Any:
        # No name service here can be made to hang.
        asked.set()
        answer.wait(30)
        return resolve(*arguments, **options)

    listener = channel.listener()
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(base, "CLOSE_S", 0.2)
    with warnings_of_listeners() as warnings, starting(listener):
        assert asked.wait(5)
        assert _seconds(listener.close) < 2.0
        assert not listener.alive
        answer.set()
        wait_until(lambda: our_threads() == [])
    # They say whom it waits for; the rest passes in silence.
    assert {"its thread ends when" in each for each in warnings} == {True}
    # The answer came too late: nobody was called.
    assert channel.connections() == 0


def test_a_client_closes_while_a_new_ticket_is_asked_for() -> None:
    # The others here shorten what close() waits at most; this one takes all of it.
    assert base.CLOSE_S < 2.0
    asked, answer = threading.Event(), threading.Event()

    def hang(call: Any) -> None:
        asked.set()
        call.wait(answer)

    with Sandbox(leaves=1) as sandbox:
        client = connect(sandbox)
        with sandbox.intercept("ticket", hang):
            sandbox.disconnect(1012)
            assert asked.wait(5)
            assert _seconds(client.close) < 2.0
            answer.set()
            wait_until(lambda: our_threads() == [])
        assert sandbox.connected == []


def test_a_client_closes_while_the_platform_swallows_connections() -> None:
    with Sandbox(leaves=1) as sandbox, blackhole() as nowhere:
        client = connect(sandbox)
        listener: Any = client._listener
        endpoint = listener._endpoint
        # As if the platform's address had begun to swallow what comes.
        listener._endpoint = type(endpoint)(endpoint.scheme, endpoint.host, nowhere)
        sandbox.disconnect(1012)
        wait_until(lambda: not listener.connected and sandbox.hits("ticket") == 2)
        assert _seconds(client.close) < 2.0
        assert our_threads() == []


def _seconds(call: Callable[[], None]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began
