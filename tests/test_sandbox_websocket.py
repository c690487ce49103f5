"""Notifications over WebSocket: who gets in, what is sent, what a late or slow leaf hears, how it ends."""

from __future__ import annotations

import base64
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from branchkey_integrations.sandbox import Sandbox
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, aggregate_ready, received, run_is


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2) as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> RawLeaf:
    return RawLeaf(sandbox)


def silent(websocket, timeout_s: float = 0.2) -> bool:
    try:
        websocket.recv(timeout=timeout_s)
    except TimeoutError:
        return True
    return False


# --- tickets ------------------------------------------------------------------------------------------------------------


def test_a_ticket_is_200_and_json_for_a_post_without_a_body(leaf: RawLeaf) -> None:
    headers = {"Content-Type": "application/octet-stream", "Content-Length": "0"}
    answer = leaf.request("POST", "/api/v1/ws/ticket", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    data = answer.json()["data"]
    assert set(data) == {"ticket_id", "request_id", "expires_at"}
    assert data["expires_at"] > time.time()


def test_a_ticket_lets_one_connection_in(sandbox: Sandbox, leaf: RawLeaf) -> None:
    url = leaf.websocket_url(leaf.ticket())
    with connect(url, proxy=None):
        assert sandbox.wait_for(lambda: sandbox.connected) == [leaf.credentials.id]
        with pytest.raises(InvalidStatus) as caught, connect(url, proxy=None):
            pass
    assert caught.value.response.status_code == 401
    assert b'"error": "ticket' in caught.value.response.body
    sandbox.wait_for(lambda: not sandbox.connected)


@pytest.mark.parametrize("query", ["", "?ticket=x", "?ticket={ticket_id}", "?ticket={ticket_id}&request_id=wrong"])
def test_an_upgrade_without_a_good_ticket_is_401(sandbox: Sandbox, leaf: RawLeaf, query: str) -> None:
    url = sandbox.url.replace("http", "ws") + "/api/v1/ws" + query.format(**leaf.ticket())
    with pytest.raises(InvalidStatus) as caught, connect(url, proxy=None):
        pass
    assert caught.value.response.status_code == 401
    assert caught.value.response.headers["content-type"] == "application/json"
    assert sandbox.connected == []


def test_an_expired_ticket_is_401() -> None:
    with Sandbox(ticket_lifetime_s=0.05) as sandbox:
        leaf = RawLeaf(sandbox)
        ticket = leaf.ticket()
        sandbox.wait_for(lambda: time.time() > ticket["expires_at"])
        with pytest.raises(InvalidStatus) as caught, connect(leaf.websocket_url(ticket), proxy=None):
            pass
    assert caught.value.response.status_code == 401


def test_a_plain_get_where_an_upgrade_belongs_is_a_json_error(sandbox: Sandbox) -> None:
    answer = requests.get(f"{sandbox.url}/api/v1/ws", timeout=TIMEOUT_S)
    assert answer.status_code == 404
    assert isinstance(answer.json()["error"], str)


# --- news -----------------------------------------------------------------------------------------------------------------


def test_all_leaves_hear_of_an_aggregate_and_of_the_run(sandbox: Sandbox) -> None:
    with RawLeaf(sandbox, 0).connected() as first, RawLeaf(sandbox, 1).connected() as second:
        sandbox.wait_for(lambda: len(sandbox.connected) == 2)
        aggregation_id = sandbox.publish([np.zeros(1)])
        sandbox.pause()
        for websocket in (first, second):
            assert [received(websocket), received(websocket)] == [aggregate_ready(aggregation_id), run_is("pause")]
        sandbox.stop()
        assert received(first) == run_is("stop")
        sandbox.start()
        assert received(first) == run_is("start")


def test_a_start_of_a_started_run_is_announced_all_the_same(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        sandbox.start()
        assert received(websocket) == run_is("start")


def test_any_text_and_bytes_can_be_sent(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        sandbox.notify("{not json")
        sandbox.notify(b"\xff\xfe")
        sandbox.notify("")
        assert [websocket.recv(timeout=TIMEOUT_S) for _ in range(3)] == ["{not json", b"\xff\xfe", ""]


def test_raw_texts_all_arrive_in_order(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        for number in range(2000):
            sandbox.notify(str(number))
        assert [websocket.recv(timeout=TIMEOUT_S) for _ in range(2000)] == [str(number) for number in range(2000)]


def test_an_aggregate_stored_without_notice_is_announced_to_nobody(sandbox: Sandbox, leaf: RawLeaf) -> None:
    sandbox.publish([np.zeros(1)], "quiet", notify=False)
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        assert silent(websocket)
    assert leaf.download("quiet")[0].tolist() == [0.0]


def test_a_leaf_that_connects_late_hears_the_newest_aggregate_that_it_lacks(sandbox: Sandbox, leaf: RawLeaf) -> None:
    sandbox.publish([np.zeros(1)])
    newest = sandbox.publish([np.ones(1)])
    with leaf.connected() as websocket:
        assert received(websocket) == aggregate_ready(newest)
        assert silent(websocket)


def test_the_news_is_repeated_at_each_connect_until_the_leaf_asks_for_the_aggregate(sandbox: Sandbox) -> None:
    first, second = RawLeaf(sandbox, 0), RawLeaf(sandbox, 1)
    aggregation_id = sandbox.publish([np.zeros(1)])
    for _ in range(2):
        with first.connected() as websocket:
            assert received(websocket) == aggregate_ready(aggregation_id)
    first.link(aggregation_id)
    with first.connected() as websocket:
        assert silent(websocket)
    with second.connected() as websocket:
        assert received(websocket) == aggregate_ready(aggregation_id)


def test_a_leaf_that_missed_a_change_of_the_run_hears_it_when_it_connects(sandbox: Sandbox, leaf: RawLeaf) -> None:
    leaf.run()
    sandbox.pause()
    with leaf.connected() as websocket:
        assert received(websocket) == run_is("pause")
    with leaf.connected() as websocket:
        assert silent(websocket)
    sandbox.start()
    leaf.run()
    with leaf.connected() as websocket:
        assert silent(websocket)


def test_what_is_announced_while_a_leaf_connects_reaches_it_exactly_once(sandbox: Sandbox, leaf: RawLeaf) -> None:
    for number in range(30):
        wanted = f"a{number}"
        publisher = threading.Thread(target=sandbox.publish_raw, args=(b"x", wanted))
        publisher.start()
        with leaf.connected() as websocket:
            # An older id may come first, for the leaf asks for none of them.
            seen = []
            while wanted not in seen:
                seen.append(received(websocket)["body"]["aggregation_id"])
            publisher.join()
            sandbox.notify("end")
            assert websocket.recv(timeout=TIMEOUT_S) == "end"
            assert seen in ([wanted], [f"a{number - 1}", wanted])


def test_several_sockets_of_one_leaf_all_hear_the_news(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as first, leaf.connected() as second:
        sandbox.wait_for(lambda: len(sandbox.connected) == 2)
        aggregation_id = sandbox.publish([np.zeros(1)])
        assert received(first) == received(second) == aggregate_ready(aggregation_id)


def test_what_a_leaf_sends_is_ignored(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as websocket:
        websocket.send("hello")
        websocket.send(b"\x00")
        sandbox.wait_for(lambda: sandbox.connected)
        sandbox.notify("still here")
        assert websocket.recv(timeout=TIMEOUT_S) == "still here"


# --- a slow leaf, a dead leaf -----------------------------------------------------------------------------------------------


def raw_upgrade(leaf: RawLeaf) -> socket.socket:
    """Open a WebSocket on a bare socket that then reads nothing."""
    url = urlsplit(leaf.websocket_url(leaf.ticket()))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(TIMEOUT_S)
    connection.connect((url.hostname, url.port))
    key = base64.b64encode(bytes(16)).decode()
    connection.sendall(
        f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert connection.recv(12) == b"HTTP/1.1 101"
    return connection


def test_a_leaf_that_reads_nothing_holds_up_nobody_and_the_sandbox_still_closes_in_time() -> None:
    with Sandbox(leaves=2) as sandbox, raw_upgrade(RawLeaf(sandbox, 0)), RawLeaf(sandbox, 1).connected() as quick:
        sandbox.wait_for(lambda: len(sandbox.connected) == 2)
        for _ in range(300):
            sandbox.notify("x" * 60_000)  # about 18 MB: more than the buffers of both ends hold
            assert len(quick.recv(timeout=TIMEOUT_S)) == 60_000
        aggregation_id = sandbox.publish([np.zeros(1)])
        assert received(quick) == aggregate_ready(aggregation_id)
        started = time.monotonic()
        sandbox.close()
        assert time.monotonic() - started < 2.5


def test_a_leaf_that_answers_no_ping_is_dropped_and_one_that_does_stays() -> None:
    with Sandbox(leaves=2, ping_interval_s=0.1) as sandbox, contextlib.ExitStack() as stack:
        dead = stack.enter_context(raw_upgrade(RawLeaf(sandbox, 0)))
        alive = stack.enter_context(RawLeaf(sandbox, 1).connected())
        sandbox.wait_for(lambda: len(sandbox.connected) == 2)
        sandbox.wait_for(lambda: sandbox.connected == [sandbox.credentials[1].id])
        frames = dead.recv(4096)
        while piece := dead.recv(4096):
            frames += piece
        assert b"\x89\x04" in frames  # a ping
        assert frames.endswith(b"\x88" + bytes([2 + 22]) + struct.pack(">H", 1011) + b"keepalive ping timeout")
        sandbox.notify("still here")
        assert alive.recv(timeout=TIMEOUT_S) == "still here"


# --- the end ----------------------------------------------------------------------------------------------------------------


def close_code(websocket) -> int:
    with pytest.raises(ConnectionClosed) as caught:
        websocket.recv(timeout=TIMEOUT_S)
    return caught.value.rcvd.code if caught.value.rcvd else 1006


def test_closing_the_sandbox_closes_websockets_with_1012(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        sandbox.close()
        assert close_code(websocket) == 1012


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 4000])
def test_all_websockets_can_be_closed_with_any_code(sandbox: Sandbox, leaf: RawLeaf, code: int) -> None:
    with leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        assert sandbox.disconnect(code) == 1
        assert close_code(websocket) == code
    sandbox.wait_for(lambda: not sandbox.connected)


def test_websockets_can_be_reset_one_leaf_at_a_time(sandbox: Sandbox) -> None:
    first, second = RawLeaf(sandbox, 0), RawLeaf(sandbox, 1)
    with first.connected() as gone, second.connected() as kept:
        sandbox.wait_for(lambda: len(sandbox.connected) == 2)
        assert sandbox.disconnect(None, first.credentials.id) == 1
        assert close_code(gone) == 1006
        sandbox.wait_for(lambda: sandbox.connected == [second.credentials.id])
        sandbox.notify("still here")
        assert kept.recv(timeout=TIMEOUT_S) == "still here"


def test_a_leaf_that_leaves_is_forgotten(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with leaf.connected():
        sandbox.wait_for(lambda: sandbox.connected)
    sandbox.wait_for(lambda: not sandbox.connected)
    sandbox.publish([np.zeros(1)])
