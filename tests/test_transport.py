"""What is repeated and what is not, and what a wire fault becomes."""

from __future__ import annotations

import gzip
import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    ApiError,
    AuthenticationError,
    BranchKeyError,
    ClientClosedError,
    NotFoundError,
    TransportError,
    UploadUncertainError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from tests.support.raw_server import Exchange, RawServer, answer, free_port
from tests.support.transport import ACCEPTED, QUICK, STARTED, UPDATE, Leaf, info_of


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2) as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> Iterator[Leaf]:
    with Leaf(sandbox.url, sandbox.credentials[0]) as made:
        yield made


# --- a request that changes something -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_upload_that_was_stored_but_answered_with_an_error_is_not_sent_again(
    sandbox: Sandbox, leaf: Leaf, status: int
) -> None:
    def stored(call: object) -> Answer:
        call.proceed()  # type: ignore[attr-defined]
        return Answer(status, b"<html>bad gateway</html>", "text/html")

    with sandbox.intercept("upload", stored) as interception, pytest.raises(UploadUncertainError) as caught:
        leaf.upload()
    assert interception.count == 1
    (counted,) = sandbox.uploads
    assert caught.value.digest == counted.digest == info_of(UPDATE).digest
    assert "may have been received" in str(caught.value)
    assert str(status) in str(caught.value)


def test_an_upload_answered_after_the_read_timeout_is_not_sent_again(sandbox: Sandbox) -> None:
    release = threading.Event()

    def late(call: object) -> Answer:
        result = call.proceed()  # type: ignore[attr-defined]
        call.wait(release, 10)  # type: ignore[attr-defined]
        return result  # type: ignore[no-any-return]

    with (
        Leaf(sandbox.url, sandbox.credentials[0], timeout_s=0.4) as leaf,
        sandbox.intercept("upload", late) as interception,
    ):
        began = time.monotonic()
        with pytest.raises(UploadUncertainError) as caught:
            leaf.upload()
        assert time.monotonic() - began < 3
        release.set()
    assert interception.count == 1
    assert [upload.digest for upload in sandbox.uploads] == [caught.value.digest]


@pytest.mark.parametrize("status", [503, 429, 408, 425])
def test_an_upload_the_server_says_it_did_not_take_is_sent_again_whole(
    sandbox: Sandbox, leaf: Leaf, status: int
) -> None:
    bodies: list[tuple[int, bytes]] = []

    def busy(call: object) -> Answer | None:
        content = call.read()  # type: ignore[attr-defined]
        bodies.append((int(call.headers["content-length"]), content))  # type: ignore[attr-defined]
        return Answer.error(status, "later") if call.number < 3 else None  # type: ignore[attr-defined]

    with sandbox.intercept("upload", busy):
        file_id = leaf.upload()
    assert [len(content) for _, content in bodies] == [length for length, _ in bodies]
    assert len(bodies) == 3
    assert len({content for _, content in bodies}) == 1
    assert UPDATE in bodies[2][1]
    assert [upload.file_id for upload in sandbox.uploads] == [file_id]


def test_an_upload_to_a_port_that_opens_late_arrives_once() -> None:
    port = free_port()
    bodies: list[bytes] = []

    def accept(exchange: Exchange) -> None:
        bodies.append(exchange.read_body())
        exchange.send(ACCEPTED)

    failures: list[int] = []

    class Counting(RetryPolicy):
        def delay_s(self, failures_: int, spent_s: float, retry_after_s: float | None = None) -> float | None:
            failures.append(failures_)
            if failures_ == 2:
                opened.set()
                assert serving.wait(5)
            return super().delay_s(failures_, spent_s, retry_after_s)

    opened, serving, done = threading.Event(), threading.Event(), threading.Event()

    def serve() -> None:
        assert opened.wait(5)
        with RawServer(accept, port=port):
            serving.set()
            done.wait(10)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with Leaf(f"http://127.0.0.1:{port}", retry=Counting(attempts=4, backoff_s=0.01, budget_s=5)) as leaf:
            assert leaf.upload() == "file-1"
    finally:
        opened.set()
        done.set()
        thread.join(10)
    assert failures == [1, 2]
    assert len(bodies) == 1
    assert UPDATE in bodies[0]


def test_a_connection_reset_behind_the_whole_body_leaves_the_upload_uncertain() -> None:
    def reset(exchange: Exchange) -> None:
        exchange.read_body()
        exchange.reset()

    with RawServer(reset) as server, Leaf(server.url) as leaf, pytest.raises(UploadUncertainError) as caught:
        leaf.upload()
    assert len(server.exchanges) == 1
    assert isinstance(caught.value.__cause__, TransportError)


def test_a_connection_reset_in_the_middle_of_the_body_is_tried_again() -> None:
    large = UPDATE + bytes(8 << 20)

    def first_resets(exchange: Exchange) -> None:
        if exchange.number == 1:
            exchange.reset()
            return
        exchange.read_body()
        exchange.send(ACCEPTED)

    with RawServer(first_resets, receive_buffer_bytes=65536) as server, Leaf(server.url) as leaf:
        assert leaf.upload(large) == "file-1"
    assert len(server.exchanges) == 2
    assert server.exchanges[1].missing == 0


def test_a_refusal_sent_before_the_body_was_read_is_told_as_such() -> None:
    def refuse(exchange: Exchange) -> None:
        exchange.send(answer(413, b'{"error": "at most 1 MB"}'))
        exchange.read_body()

    with RawServer(refuse) as server, Leaf(server.url) as leaf, pytest.raises(ApiError, match="at most 1 MB") as caught:
        leaf.upload(bytes(4 << 20))
    assert caught.value.status == 413


def test_an_upload_is_never_redirected(sandbox: Sandbox, leaf: Leaf) -> None:
    elsewhere: list[Exchange] = []
    with RawServer(lambda exchange: elsewhere.append(exchange)) as other:
        away = Answer(307, b"", headers={"Location": f"{other.url}/take?secret=1"})
        with sandbox.intercept("upload", away) as interception, pytest.raises(ApiError) as caught:
            leaf.upload()
    assert elsewhere == []
    assert interception.count == 1
    assert caught.value.status == 307
    assert f"127.0.0.1:{other.port}" in str(caught.value)
    assert "secret=1" not in str(caught.value)


# --- a request that changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_question_is_asked_again_until_it_is_answered(sandbox: Sandbox, leaf: Leaf, status: int) -> None:
    with sandbox.intercept("run", Answer(status, b"<html>", "text/html"), times=3):
        assert leaf.api.run_details().status == "start"
    assert sandbox.hits("run") == 4


def test_a_question_is_asked_no_more_often_than_the_policy_says(sandbox: Sandbox, leaf: Leaf) -> None:
    with sandbox.intercept("run", Answer(502, b"", "text/html")) as interception, pytest.raises(ApiError) as caught:
        leaf.api.run_details()
    assert interception.count == QUICK.attempts
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, ApiError), (401, AuthenticationError), (403, AuthenticationError), (404, NotFoundError), (413, ApiError)],
)
def test_a_refusal_is_final_and_one_line(sandbox: Sandbox, leaf: Leaf, status: int, kind: type[ApiError]) -> None:
    told = f"no\nentry for\n {leaf.credentials.session_token}"
    for route, ask in (("run", leaf.api.run_details), ("upload", leaf.upload)):
        refusal = Answer.error(status, told)
        with sandbox.intercept(route, refusal) as interception, pytest.raises(kind) as caught:
            ask()
        assert interception.count == 1
        assert type(caught.value) is kind
        assert caught.value.status == status
        text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__))
        assert leaf.credentials.session_token not in text + repr(caught.value)
        assert "\n" not in str(caught.value)
        assert f"{status}: no entry for ***" in str(caught.value)


@pytest.mark.parametrize("status", [200, 201, 400, 404, 413])
def test_an_error_page_is_described_and_not_quoted(sandbox: Sandbox, leaf: Leaf, status: int) -> None:
    page = Answer(status, b"<html><body>Sign in here</body></html>", "text/html; charset=utf-8")
    for route, ask in (("run", leaf.api.run_details), ("upload", leaf.upload)):
        taken = (route, status) == ("upload", 201)
        with sandbox.intercept(route, page), pytest.raises(UploadUncertainError if taken else ApiError) as caught:
            ask()
        assert "38 bytes of text/html" in str(caught.value)
        assert "Sign in" not in str(caught.value)
        assert taken or caught.value.status == status


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b"[" * 100_000, b"\xff\xfe", b'{"data": null}', b"{}"])
def test_an_answer_that_is_no_usable_object_is_an_api_error(sandbox: Sandbox, leaf: Leaf, body: bytes) -> None:
    with sandbox.intercept("run", Answer(200, body)), pytest.raises(ApiError, match="run details"):
        leaf.api.run_details()


def test_an_answer_in_chunks_or_packed_is_put_together() -> None:
    body = STARTED.partition(b"\r\n\r\n")[2]
    chunks = b"".join(b"1\r\n" + body[i : i + 1] + b"\r\n" for i in range(len(body))) + b"0\r\n\r\n"
    answers = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks,
        answer(200, gzip.compress(body), {"Content-Encoding": "gzip"}),
        b"HTTP/1.0 200 OK\r\n\r\n" + body,
    ]
    with RawServer(lambda exchange: exchange.send(answers[exchange.number - 1])) as server, Leaf(server.url) as leaf:
        for _ in answers:
            assert leaf.api.run_details().number == 1


def test_an_answer_that_is_cut_short_is_asked_for_again() -> None:
    def serve(exchange: Exchange) -> None:
        exchange.send(STARTED[:-5] if exchange.number == 1 else STARTED)

    with RawServer(serve) as server, Leaf(server.url) as leaf:
        assert leaf.api.run_details().number == 1
    assert len(server.exchanges) == 2


def test_an_endless_answer_is_cut(sandbox: Sandbox, leaf: Leaf) -> None:
    with (
        sandbox.intercept("run", Answer(200, b" " * (5 << 20))),
        pytest.raises(ApiError, match="at most 4194304 bytes"),
    ):
        leaf.api.run_details()


# --- Retry-After -------------------------------------------------------------------------------------------------------


def test_retry_after_is_obeyed_within_the_budget(sandbox: Sandbox, leaf: Leaf) -> None:
    with sandbox.intercept("run", Answer.error(503, "later", {"Retry-After": "1"}), times=1):
        began = time.monotonic()
        leaf.api.run_details()
        assert 1.0 <= time.monotonic() - began < 3


@pytest.mark.parametrize("after", ["21600", "Fri, 01 Jan 2099 00:00:00 GMT"])
def test_retry_after_beyond_the_budget_ends_the_call_at_once(sandbox: Sandbox, leaf: Leaf, after: str) -> None:
    refusal = Answer.error(503, "maintenance", {"Retry-After": after})
    for route, ask in (("run", leaf.api.run_details), ("upload", leaf.upload)):
        began = time.monotonic()
        with sandbox.intercept(route, refusal) as interception, pytest.raises(ApiError, match="maintenance") as caught:
            ask()
        assert time.monotonic() - began < 1
        assert interception.count == 1
        assert caught.value.status == 503


def test_closing_ends_a_wait_for_the_next_try_at_once(sandbox: Sandbox) -> None:
    patient = RetryPolicy(attempts=3, backoff_s=60, backoff_max_s=60, jitter=0)
    with Leaf(sandbox.url, sandbox.credentials[0], retry=patient) as leaf:
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                leaf.api.run_details()
            except BranchKeyError as error:
                outcome.append(error)

        with sandbox.intercept("run", Answer.error(503, "later")) as interception:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            sandbox.wait_for(lambda: interception.count == 1)
            began = time.monotonic()
            leaf.transport.close()
            thread.join(5)
        assert time.monotonic() - began < 1
        assert [type(error) for error in outcome] == [ClientClosedError]
        with pytest.raises(ClientClosedError):
            leaf.api.run_details()
