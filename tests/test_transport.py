"""What is repeated and what is not, what a slow link may do, and what a wire fault becomes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from branchkey_integrations.api import Api
from branchkey_integrations.archive import ArchiveInfo
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import (
    ApiError,
    AuthenticationError,
    BranchKeyError,
    ClientClosedError,
    DeadlineError,
    DownloadError,
    NotFoundError,
    TransportError,
    UnreachableError,
    UploadUncertainError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from branchkey_integrations.transport import Repeat, Transport
from tests.support.credentials import make_credentials
from tests.support.raw_leaf import npz
from tests.support.raw_server import Exchange, RawServer, answer, free_port

QUICK = RetryPolicy(attempts=4, backoff_s=0.01, backoff_max_s=0.02, budget_s=5.0)
STARTED = answer(200, json.dumps({"data": {"run_status": "start", "run_number": 1}}).encode())
ACCEPTED = answer(201, json.dumps({"data": {"file_id": "file-1"}}).encode())
UPDATE = npz([[1.0, 2.0, 3.0]], 5.0)


def info_of(content: bytes) -> ArchiveInfo:
    return ArchiveInfo(len(content), hashlib.sha256(content).digest())


class Leaf:
    """The two floors under test, and how a script would use them."""

    def __init__(self, url: str, credentials: Credentials | None = None, **options: object) -> None:
        self.credentials = credentials or make_credentials()
        options = {"retry": QUICK, "timeout_s": 5.0, **options}
        self.transport = Transport(Endpoint.parse(url), self.credentials, **options)  # type: ignore[arg-type]
        self.api = Api(self.transport, self.credentials)

    def upload(self, content: bytes = UPDATE) -> str:
        return self.api.upload(io.BytesIO(content), info_of(content), "update.npz", {})

    def __enter__(self) -> Leaf:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()


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


# --- deadlines ---------------------------------------------------------------------------------------------------------


def test_nobody_there_is_unreachable_and_names_the_host() -> None:
    port = free_port()
    with Leaf(f"http://127.0.0.1:{port}") as leaf:
        for ask in (leaf.api.run_details, leaf.upload):
            with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}.*Connection refused"):
                ask()


def test_a_name_that_does_not_resolve_is_unreachable() -> None:
    with Leaf("http://branch.invalid") as leaf, pytest.raises(UnreachableError, match=r"branch\.invalid"):
        leaf.api.run_details()


def test_a_server_that_never_answers_a_question_is_a_deadline() -> None:
    once = RetryPolicy(attempts=1)
    with RawServer(Exchange.stall) as server, Leaf(server.url, timeout_s=0.3, retry=once) as leaf:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"move on within 0\.3 s"):
            leaf.api.run_details()
        assert time.monotonic() - began < 2


def test_an_answer_that_trickles_in_is_a_deadline() -> None:
    head, _, body = STARTED.partition(b"\r\n\r\n")

    def trickle(exchange: Exchange) -> None:
        exchange.send(head + b"\r\n\r\n")
        exchange.trickle(body, 0.1)

    with RawServer(trickle) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            leaf.api.run_details()
        assert time.monotonic() - began < 2


def test_an_upload_over_a_slow_link_that_keeps_moving_may_take_longer_than_the_timeout() -> None:
    content = bytes(6 << 20)

    def slow(exchange: Exchange) -> None:
        exchange.read_body(bytes_per_s=2.5 * (1 << 20))
        exchange.send(ACCEPTED)

    with RawServer(slow, receive_buffer_bytes=65536) as server, Leaf(server.url, timeout_s=1.0) as leaf:
        began = time.monotonic()
        assert leaf.upload(content) == "file-1"
        assert time.monotonic() - began > 2
    (exchange,) = server.exchanges
    assert exchange.missing == 0


def test_an_upload_whose_reader_stalls_is_a_deadline_and_not_uncertain() -> None:
    with (
        RawServer(Exchange.stall, receive_buffer_bytes=65536) as server,
        Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf,
    ):
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            leaf.upload(bytes(16 << 20))
        assert time.monotonic() - began < 4


def test_a_download_over_a_slow_link_that_keeps_moving_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    def slow(exchange: Exchange) -> None:
        exchange.send(answer(200, b"", length=12))
        exchange.trickle(b"PK0123456789", 0.1)

    target = io.BytesIO()
    with RawServer(slow) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=1)) as leaf:
        assert leaf.transport.fetch("download", f"{server.url}/o?signature=abc", target) == 12
    assert target.getvalue() == b"PK0123456789"


def test_a_download_that_stalls_is_a_deadline() -> None:
    def stall(exchange: Exchange) -> None:
        exchange.send(answer(200, b"PK", length=100))
        exchange.stall()

    with (
        RawServer(stall) as server,
        Leaf(server.url, timeout_s=0.3, retry=RetryPolicy(attempts=1)) as leaf,
        pytest.raises(DeadlineError),
    ):
        leaf.transport.fetch("download of a1", f"{server.url}/o?signature=abc", io.BytesIO())


# --- the presigned object ----------------------------------------------------------------------------------------------


def test_a_cut_download_is_started_again_from_the_first_byte() -> None:
    content = b"PK" + bytes(range(256)) * 40

    def first_cuts(exchange: Exchange) -> None:
        exchange.send(answer(200, content if exchange.number > 2 else content[:5000], length=len(content)))

    target = io.BytesIO()
    with RawServer(first_cuts) as server, Leaf(server.url) as leaf:
        assert leaf.transport.fetch("download", f"{server.url}/o", target) == len(content)
    assert target.getvalue() == content
    assert len(server.exchanges) == 3


def test_a_download_that_is_always_cut_fails_without_showing_its_url() -> None:
    with RawServer(lambda exchange: exchange.send(answer(200, b"PK", length=9))) as server, Leaf(server.url) as leaf:
        url = f"{server.url}/o?signature=" + "secret".upper() * 3
        with pytest.raises((DownloadError, TransportError)) as caught:
            leaf.transport.fetch("download of a1", url, io.BytesIO())
    text = "".join(traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__))
    assert "SECRETSECRET" not in text + repr(caught.value)
    assert "download of a1" in str(caught.value)
    assert len(server.exchanges) == QUICK.attempts


def test_a_download_larger_than_allowed_is_refused_by_its_length_and_by_its_bytes() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"

    def serve(exchange: Exchange) -> None:
        if exchange.target == "/declared":
            exchange.send(answer(200, b"x" * 100))
        else:
            exchange.send(chunked + b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n")

    with RawServer(serve) as server, Leaf(server.url) as leaf:
        for path in ("/declared", "/chunked"):
            with pytest.raises(DownloadError, match="at most 99 bytes"):
                leaf.transport.fetch("download", server.url + path, io.BytesIO(), max_bytes=99)
            assert leaf.transport.fetch("download", server.url + path, io.BytesIO(), max_bytes=100) == 100
    assert len(server.exchanges) == 4


def test_an_object_of_no_bytes_is_refused() -> None:
    with (
        RawServer(lambda exchange: exchange.send(answer(200))) as server,
        Leaf(server.url, retry=RetryPolicy(attempts=1)) as leaf,
        pytest.raises(DownloadError, match="0 bytes"),
    ):
        leaf.transport.fetch("download", f"{server.url}/o", io.BytesIO())


def test_a_length_that_is_no_number_is_not_relied_on() -> None:
    odd = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: ²\r\n\r\n".encode("latin-1") + b"PK"
    with RawServer(lambda exchange: exchange.send(odd)) as server, Leaf(server.url) as leaf:
        assert leaf.transport.fetch("download", f"{server.url}/o", io.BytesIO()) == 2


def test_a_packed_transfer_is_stored_as_it_came() -> None:
    packed = answer(200, b"PK not really gzip", {"Content-Encoding": "gzip"})
    target = io.BytesIO()
    with RawServer(lambda exchange: exchange.send(packed)) as server, Leaf(server.url) as leaf:
        leaf.transport.fetch("download", f"{server.url}/o", target)
    assert target.getvalue() == b"PK not really gzip"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/relative", "", "//host/x"])
def test_a_download_url_of_another_kind_is_refused(url: str) -> None:
    with Leaf("http://127.0.0.1:9") as leaf, pytest.raises(DownloadError, match="absolute download URL"):
        leaf.transport.fetch("download", url, io.BytesIO())


def test_a_platform_on_https_may_not_hand_out_plain_links() -> None:
    with Leaf("https://127.0.0.1:9") as leaf, pytest.raises(DownloadError, match="plain http"):
        leaf.transport.fetch("download", "http://127.0.0.1:9/x?signature=secretsecret", io.BytesIO())


def test_closing_ends_a_download_at_its_next_piece() -> None:
    arrived = threading.Event()
    large = 64 << 20

    def endless(exchange: Exchange) -> None:
        exchange.send(answer(200, b"", length=large))
        for _ in range(64):
            exchange.send(bytes(1 << 20))
            arrived.set()
            exchange.closing.wait(0.05)

    caught: list[BaseException] = []
    with RawServer(endless) as server, Leaf(server.url) as leaf:

        def download() -> None:
            try:
                leaf.transport.fetch("download", f"{server.url}/o", io.BytesIO())
            except BranchKeyError as error:
                caught.append(error)

        thread = threading.Thread(target=download, daemon=True)
        thread.start()
        assert arrived.wait(5)
        leaf.transport.close()
        thread.join(5)
        assert not thread.is_alive()
    assert [type(error) for error in caught] == [ClientClosedError]


# --- whose credentials go where ------------------------------------------------------------------------------------------


def test_netrc_neither_replaces_the_bearer_nor_reaches_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password netrcpassword\n")
    (tmp_path / ".netrc").write_text(netrc.read_text())
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))

    def serve(exchange: Exchange) -> None:
        exchange.read_body()
        if exchange.target.startswith("/object"):
            exchange.send(answer(200, b"PK"))
        elif exchange.target.startswith("/hop"):
            exchange.send(answer(302, b"", {"Location": "/object?signature=x"}))
        elif "download" in exchange.target:
            exchange.send(answer(200, json.dumps({"data": {"download_url": f"{server.url}/hop?s=x"}}).encode()))
        else:
            exchange.send(ACCEPTED if exchange.head.startswith(b"POST") else STARTED)

    with RawServer(serve) as server, Leaf(server.url) as leaf:
        leaf.api.run_details()
        leaf.upload()
        leaf.api.download("a1", io.BytesIO())
    bearer = f"Bearer {leaf.credentials.id}:{leaf.credentials.session_token}"
    sent = [exchange.headers.get("authorization") for exchange in server.exchanges]
    assert sent == [bearer, bearer, bearer, None, None]
    assert [exchange.headers.get("leaf") for exchange in server.exchanges] == ["true"] * 3 + [None] * 2


def test_a_redirect_of_the_platform_to_another_host_goes_without_our_headers(tmp_path: Path) -> None:
    with RawServer(lambda exchange: exchange.send(STARTED)) as other:
        away = answer(302, b"", {"Location": f"{other.url}/elsewhere"})
        with RawServer(lambda exchange: exchange.send(away)) as server, Leaf(server.url) as leaf:
            assert leaf.api.run_details().number == 1
    (exchange,) = other.exchanges
    assert "authorization" not in exchange.headers
    assert "leaf" not in exchange.headers


def test_a_redirect_within_the_platform_keeps_the_bearer() -> None:
    def serve(exchange: Exchange) -> None:
        here = "moved" in exchange.target
        exchange.send(STARTED if here else answer(302, b"", {"Location": "/moved"}))

    with RawServer(serve) as server, Leaf(server.url) as leaf:
        leaf.api.run_details()
    assert [exchange.headers["authorization"][:7] for exchange in server.exchanges] == ["Bearer "] * 2


@pytest.mark.parametrize(("fresh_s", "connections"), [(0.0, 2), (60.0, 1)])
def test_a_connection_is_used_again_unless_it_was_idle_too_long(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, leaf: Leaf, fresh_s: float, connections: int
) -> None:
    monkeypatch.setattr("branchkey_integrations.transport._FRESH_S", fresh_s)
    used = set()
    for ask in (leaf.api.run_details, leaf.upload):
        ask()
        (pool,) = (leaf.transport._adapter.poolmanager.pools.get(key) for key in _keys(leaf))
        (connection,) = (each for each in pool.pool.queue if each is not None)
        used.add(connection.sock.getsockname())
    assert len(used) == connections


def _keys(leaf: Leaf) -> list[object]:
    return list(leaf.transport._adapter.poolmanager.pools.keys())


def test_closing_closes_idle_connections_though_an_error_is_kept(sandbox: Sandbox, leaf: Leaf) -> None:
    with sandbox.intercept("run", Answer.error(404, "no")), pytest.raises(NotFoundError) as caught:
        leaf.api.run_details()
    (pool,) = (leaf.transport._adapter.poolmanager.pools.get(key) for key in _keys(leaf))
    (connection,) = (each for each in pool.pool.queue if each is not None)
    assert connection.sock is not None
    leaf.transport.close()
    assert connection.sock is None
    assert caught.value.__traceback__ is not None


def test_call_repeats_only_as_it_is_told(sandbox: Sandbox, leaf: Leaf) -> None:
    from branchkey_integrations.transport import AnswerLostError

    bad = Answer(502, b"", "text/html")
    with sandbox.intercept("ticket", bad) as interception:
        with pytest.raises(AnswerLostError):
            leaf.transport.call("ticket", "POST", "/api/v1/ws/ticket", success=200, repeat=Repeat.IF_NOT_TAKEN)
        assert interception.count == 1
        with pytest.raises(ApiError):
            leaf.transport.call("ticket", "POST", "/api/v1/ws/ticket", success=200, repeat=Repeat.ALWAYS)
        assert interception.count == 1 + QUICK.attempts
