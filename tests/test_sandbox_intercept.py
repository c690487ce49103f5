"""The place between request and answer where tests stand: say something else, later, after the work, or nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from websockets.exceptions import InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from branchkey_integrations.sandbox import ROUTES, Answer, Call, Sandbox
from tests.support.raw_leaf import TIMEOUT_S, RawLeaf, aggregate_ready, layers_of, npz, received


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> RawLeaf:
    return RawLeaf(sandbox)


CONTENT = npz([np.array([1.0, 2.0])])


def test_the_server_stores_and_then_says_502(sandbox: Sandbox, leaf: RawLeaf) -> None:
    def store_and_fail(call: Call) -> Answer:
        call.proceed()
        return Answer(502, b"<html>bad gateway</html>", "text/html")

    with sandbox.intercept("upload", store_and_fail, times=1) as interception:
        answer = leaf.upload(CONTENT)
        assert (answer.status_code, answer.text, answer.headers["content-type"]) == (
            502,
            "<html>bad gateway</html>",
            "text/html",
        )
        assert len(sandbox.uploads) == 1
        again = leaf.upload(CONTENT)
        assert again.status_code == 201
        assert again.json()["data"]["file_id"] == sandbox.uploads[0].file_id
    assert len(sandbox.uploads) == 1
    assert interception.count == 1
    assert sandbox.hits("upload") == 2


def test_the_aggregate_is_announced_before_the_upload_is_answered(sandbox: Sandbox, leaf: RawLeaf) -> None:
    order: list[str] = []

    def publish_first(call: Call) -> None:
        sandbox.publish([np.zeros(1)], "early")
        order.append("published")
        call.wait(heard, TIMEOUT_S)
        order.append("answered")

    heard = threading.Event()
    with leaf.connected() as websocket, sandbox.intercept("upload", publish_first):
        sandbox.wait_for(lambda: sandbox.connected)
        answers: list[requests.Response] = []
        upload = threading.Thread(target=lambda: answers.append(leaf.upload(CONTENT)))
        upload.start()
        assert received(websocket) == aggregate_ready("early")
        order.append("heard")
        assert answers == []
        heard.set()
        upload.join(TIMEOUT_S)
    assert answers[0].status_code == 201
    assert sorted(order[:2]) == ["heard", "published"]
    assert order[2] == "answered"


def test_a_link_is_refused_once_in_xml_and_then_good(sandbox: Sandbox, leaf: RawLeaf) -> None:
    link = leaf.link(sandbox.publish([np.array([5.0])]))
    with sandbox.intercept("object", Answer.xml(403, "AccessDenied", "Request has expired"), times=1):
        refused = requests.get(link, timeout=TIMEOUT_S)
        assert refused.status_code == 403
        assert refused.headers["content-type"] == "application/xml"
        assert "<Code>AccessDenied</Code>" in refused.text
        assert layers_of(requests.get(link, timeout=TIMEOUT_S).content)[0].tolist() == [5.0]


def test_a_503_asks_to_come_back_later_and_the_upload_comes_in_whole_each_time(sandbox: Sandbox, leaf: RawLeaf) -> None:
    sizes: list[int] = []

    def busy(call: Call) -> Answer:
        sizes.append(len(call.read()))
        return Answer.error(503, "busy", {"Retry-After": "7"})

    with sandbox.intercept("upload", busy, times=2):
        answers = [leaf.upload(CONTENT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 201]
    assert answers[0].headers["retry-after"] == "7"
    assert answers[0].json() == {"error": "busy"}
    assert sizes[0] == int(answers[0].request.headers["Content-Length"])
    assert len(sandbox.uploads) == 1


def test_a_body_that_was_read_can_still_be_taken_in(sandbox: Sandbox, leaf: RawLeaf) -> None:
    def look(call: Call) -> Answer | None:
        assert CONTENT in call.read()
        return call.proceed()

    with sandbox.intercept("upload", look):
        assert leaf.upload(CONTENT).status_code == 201
    assert sandbox.uploads[0].size_bytes == len(CONTENT)


def test_a_call_says_what_was_asked(sandbox: Sandbox, leaf: RawLeaf) -> None:
    calls: list[Call] = []
    aggregation_id = sandbox.publish([np.zeros(1)])
    with sandbox.intercept("object", lambda call: calls.append(call)):
        link = leaf.link(aggregation_id)
        for _ in range(2):
            requests.get(link, headers={"X-Test": "yes"}, timeout=TIMEOUT_S)
    assert [call.number for call in calls] == [1, 2]
    assert (calls[0].route, calls[0].method, calls[0].path) == ("object", "GET", f"/objects/{aggregation_id}")
    assert link.endswith(calls[0].query)
    assert calls[0].headers["x-test"] == "yes"
    with sandbox.intercept("run", lambda call: calls.append(call)):
        leaf.run()
    assert leaf.credentials.session_token not in repr(calls[-1])
    assert calls[-1].headers["authorization"] == leaf.authorization["Authorization"]


def test_a_slow_answer_holds_up_nobody_else(sandbox: Sandbox, leaf: RawLeaf) -> None:
    go_on = threading.Event()
    slow: list[requests.Response] = []
    with sandbox.intercept("run", lambda call: call.wait(go_on) and None):
        thread = threading.Thread(target=lambda: slow.append(leaf.run()))
        thread.start()
        sandbox.wait_for(lambda: sandbox.hits("run") == 1)
        assert leaf.upload(CONTENT).status_code == 201
        assert slow == []
        go_on.set()
        thread.join(TIMEOUT_S)
    assert slow[0].status_code == 200


def test_the_real_answer_can_be_changed(sandbox: Sandbox, leaf: RawLeaf) -> None:
    def paused(call: Call) -> Answer:
        answer = call.proceed()
        assert answer is not None
        content = json.loads(answer.read())
        content["data"]["run_status"] = "pause"
        return Answer.json(content, answer.status)

    with sandbox.intercept("run", paused):
        assert leaf.run().json()["data"]["run_status"] == "pause"
    assert leaf.run().json()["data"]["run_status"] == "start"


def test_proceeding_twice_does_the_work_once(sandbox: Sandbox, leaf: RawLeaf) -> None:
    def twice(call: Call) -> Answer | None:
        assert call.proceed() is call.proceed()
        return None

    with sandbox.intercept("metrics", twice):
        assert leaf.request("POST", "/api/v1/performance/analysis", data=b"{}").status_code == 201
    assert sandbox.metrics == [{}]


@pytest.mark.parametrize("route", ["run", "upload"])
def test_a_connection_is_cut_before_any_answer(sandbox: Sandbox, leaf: RawLeaf, route: str) -> None:
    with sandbox.intercept(route, Answer.cut(), times=1), pytest.raises(requests.ConnectionError):
        leaf.run() if route == "run" else leaf.upload(CONTENT)
    assert leaf.run().status_code == 200
    assert sandbox.uploads == []


def test_a_connection_is_cut_after_the_work_was_done(sandbox: Sandbox, leaf: RawLeaf) -> None:
    def lose_the_answer(call: Call) -> Answer:
        call.proceed()
        return Answer.cut()

    with sandbox.intercept("upload", lose_the_answer), pytest.raises(requests.ConnectionError):
        leaf.upload(CONTENT)
    assert len(sandbox.uploads) == 1


@pytest.mark.parametrize("kept", [0, 1, 70_000, 9_000_000])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_body_is_cut_short_after_exactly_so_many_bytes(
    sandbox: Sandbox, leaf: RawLeaf, kept: int, streamed: bool
) -> None:
    content = np.random.default_rng(0).bytes(kept + 3_000_000)
    link = urlsplit(leaf.link(sandbox.publish_raw(content)))

    def shorten(call: Call) -> Answer:
        answer = call.proceed()
        assert answer is not None
        return replace(answer, body=answer.body if streamed else answer.read(), cut_after_bytes=kept)

    with sandbox.intercept("object", shorten), socket.create_connection((link.hostname, link.port), TIMEOUT_S) as raw:
        raw.sendall(f"GET {link.path}?{link.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        got = bytearray()
        try:
            while piece := raw.recv(1 << 16):
                got += piece
        except ConnectionResetError:
            pass
    head, _, body = bytes(got).partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head
    assert len(body) == kept
    assert body == content[:kept]


def test_a_redirect_can_be_sent(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with Sandbox() as other:
        location = {"Location": RawLeaf(other).link(other.publish_raw(b"elsewhere"))}
        link = leaf.link(sandbox.publish([np.zeros(1)]))
        with sandbox.intercept("object", Answer(302, headers=location)):
            assert requests.get(link, timeout=TIMEOUT_S).content == b"elsewhere"


def test_the_newest_handler_stands_outermost_and_all_get_their_turn(sandbox: Sandbox, leaf: RawLeaf) -> None:
    order: list[str] = []

    def named(name: str):
        def handler(call: Call) -> Answer | None:
            order.append(f"{name} in")
            answer = call.proceed()
            order.append(f"{name} out")
            return answer

        return handler

    with sandbox.intercept("run", named("inner")), sandbox.intercept("run", named("outer")):
        assert leaf.run().status_code == 200
    assert order == ["outer in", "inner in", "inner out", "outer out"]
    leaf.run()
    assert len(order) == 4


def test_an_upgrade_can_be_refused_delayed_and_cut(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with sandbox.intercept("ws", Answer.error(403, "no"), times=1):
        with pytest.raises(InvalidStatus) as caught, connect(leaf.websocket_url(leaf.ticket()), proxy=None):
            pass
        assert caught.value.response.status_code == 403
    with sandbox.intercept("ws", Answer.cut(), times=1):
        with pytest.raises((InvalidMessage, OSError)), connect(leaf.websocket_url(leaf.ticket()), proxy=None):
            pass
        assert sandbox.connected == []
    with sandbox.intercept("ws", lambda call: call.sleep(0.05)), leaf.connected() as websocket:
        sandbox.wait_for(lambda: sandbox.connected)
        sandbox.notify("in")
        assert websocket.recv(timeout=TIMEOUT_S) == "in"


def test_a_ticket_route_can_answer_what_an_older_platform_says(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with sandbox.intercept("ticket", Answer.error(404, "no such path")):
        assert leaf.request("POST", "/api/v1/ws/ticket").status_code == 404


def test_a_handler_that_fails_answers_500_and_fails_the_block(sandbox: Sandbox, leaf: RawLeaf) -> None:
    answers: list[requests.Response] = []
    with pytest.raises(ZeroDivisionError), sandbox.intercept("run", lambda call: 1 / 0):  # type: ignore[arg-type,return-value]
        answers.append(leaf.run())
    assert answers[0].status_code == 500
    assert "ZeroDivisionError" in answers[0].json()["error"]
    assert leaf.run().status_code == 200


def test_a_handler_that_fails_is_named_where_the_block_fails_of_it(sandbox: Sandbox, leaf: RawLeaf) -> None:
    with pytest.raises(ZeroDivisionError) as caught, sandbox.intercept("run", lambda call: 1 / 0):  # type: ignore[arg-type,return-value]
        assert leaf.run().status_code == 200
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_client_that_leaves_in_the_middle_is_no_fault_of_the_handler(sandbox: Sandbox, leaf: RawLeaf) -> None:
    statuses: list[int] = []

    def note(call: Call) -> None:
        answer = call.proceed()
        assert answer is not None
        statuses.append(answer.status)

    def broken_off() -> Iterator[bytes]:
        yield b"--b\r\n"
        raise OSError("out of breath")

    with sandbox.intercept("upload", note):
        with pytest.raises((requests.ConnectionError, OSError)):
            leaf.request(
                "POST",
                "/api/v1/file/upload",
                headers={"Content-Type": "multipart/form-data; boundary=b"},
                data=broken_off(),
            )
        sandbox.wait_for(lambda: statuses)
    assert statuses == [0]


def test_an_unknown_route_is_refused_at_once(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="'uploads'") as caught, sandbox.intercept("uploads", Answer.cut()):
        pass
    assert all(repr(route) in str(caught.value) for route in ROUTES)


def test_closing_wakes_handlers_that_wait_and_ends_in_time(sandbox: Sandbox, leaf: RawLeaf) -> None:
    never = threading.Event()
    entered = threading.Barrier(4)

    def sleep(call: Call) -> None:
        entered.wait(TIMEOUT_S)
        call.sleep(60)

    def wait(call: Call) -> None:
        entered.wait(TIMEOUT_S)
        call.wait(never, 60)

    def hang(ask) -> None:
        try:
            ask()
        except requests.ConnectionError:
            return

    with sandbox.intercept("run", sleep), sandbox.intercept("config", wait), sandbox.intercept("upload", sleep):
        path = f"/api/v1/config/branch/{leaf.credentials.branch_id}"
        asks = [leaf.run, lambda: leaf.request("GET", path), lambda: leaf.upload(CONTENT)]
        threads = [threading.Thread(target=hang, args=(ask,)) for ask in asks]
        for thread in threads:
            thread.start()
        entered.wait(TIMEOUT_S)
        started = time.monotonic()
        sandbox.close()
        assert time.monotonic() - started < 2
        for thread in threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
