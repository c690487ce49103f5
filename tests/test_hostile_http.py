"""What a hostile or broken network does to requests: each ends in time, in one of our errors, and shows no secret."""

from __future__ import annotations

import datetime
import hashlib
import io
import itertools
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from branchkey_integrations import http_errors
from branchkey_integrations.api import Api
from branchkey_integrations.archive import ArchiveInfo
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.errors import (
    ApiError,
    DeadlineError,
    DownloadError,
    TLSError,
    TransportError,
    UnreachableError,
    UploadUncertainError,
)
from branchkey_integrations.redaction import without_queries
from branchkey_integrations.sandbox import Sandbox
from branchkey_integrations.transport import Transport
from tests.support.credentials import make_credentials
from tests.support.raw_leaf import digest_of, npz
from tests.support.raw_server import Exchange, RawServer, answer

ONCE = RetryPolicy(attempts=1)
STARTED = answer(200, json.dumps({"data": {"run_status": "start", "run_number": 1}}).encode())
UPDATE = npz([[1.0, 2.0, 3.0]], 5.0)


class Leaf:
    """The two floors under test."""

    def __init__(self, url: str, credentials: Any = None, **options: Any) -> None:
        self.credentials = credentials or make_credentials()
        self.transport = Transport(
            Endpoint.parse(url), self.credentials, **{"retry": ONCE, "timeout_s": 5.0, **options}
        )
        self.api = Api(self.transport, self.credentials)

    def upload(self) -> str:
        info = ArchiveInfo(len(UPDATE), hashlib.sha256(UPDATE).digest())
        return self.api.upload(io.BytesIO(UPDATE), info, "update.npz", {})

    def __enter__(self) -> Leaf:
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()


# --- servers that never come to the point ---------------------------------------------------------------------------------


def headers_without_end(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    exchange.trickle(b"x" * 600, 0.1)


def status_line_in_crumbs(exchange: Exchange) -> None:
    exchange.trickle(b"HTTP/1.1 200 " + b"O" * 600, 0.1)


def interim_answers_without_end(exchange: Exchange) -> None:
    for _ in range(600):
        exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if exchange.closing.wait(0.1):
            return


@pytest.mark.parametrize("script", [headers_without_end, status_line_in_crumbs, interim_answers_without_end])
def test_headers_that_trickle_in_are_a_deadline(script: Any) -> None:
    with RawServer(script) as server, Leaf(server.url, timeout_s=0.5) as leaf:
        began = time.monotonic()
        with pytest.raises(DeadlineError, match=r"move on within 0\.5 s"):
            leaf.api.run_details()
        with pytest.raises(DeadlineError):
            leaf.transport.fetch("download of a1", f"{server.url}/o?signature=abc", io.BytesIO())
        assert time.monotonic() - began < 20


def test_an_upload_whose_answer_trickles_in_is_uncertain_and_is_not_sent_again() -> None:
    def script(exchange: Exchange) -> None:
        exchange.read_body()
        headers_without_end(exchange)

    with RawServer(script) as server, Leaf(server.url, timeout_s=0.5, retry=RetryPolicy(attempts=3)) as leaf:
        with pytest.raises(UploadUncertainError, match="may have been received") as caught:
            leaf.upload()
        assert caught.value.digest == digest_of(UPDATE)
    assert len(server.exchanges) == 1


def test_a_body_may_take_longer_than_its_headers_had_time() -> None:
    def script(exchange: Exchange) -> None:
        exchange.send(answer(200, b"", length=10))
        exchange.trickle(b"PK01234567", 0.15)

    target = io.BytesIO()
    with RawServer(script) as server, Leaf(server.url, timeout_s=0.5) as leaf:
        assert leaf.transport.fetch("download of a1", f"{server.url}/o", target) == 10
    assert target.getvalue() == b"PK01234567"


# --- redirects that lead nowhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        b"http://127.0.0.1:notaport/x?signature=secret",
        b"http://127.0.0.1:99999/x?signature=secret",
        b"http://127.0.0.1:0/",
        b"http://[::1",
        b"ftp://127.0.0.1/x",
        b"file:///etc/passwd",
        b"javascript:alert(1)",
        b"http://127.0.0.1/\xff\xfe\x80",
    ],
)
def test_a_redirect_to_no_address_is_refused_in_our_words(location: bytes) -> None:
    moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\nLocation: " + location + b"\r\n\r\n"
    with RawServer(lambda exchange: exchange.send(moved)) as server, Leaf(server.url) as leaf:
        for ask in (
            leaf.api.run_details,
            lambda: leaf.transport.fetch("download of a1", f"{server.url}/o?signature=abc", io.BytesIO()),
        ):
            with pytest.raises(TransportError, match="found a redirect to no address") as caught:
                ask()
            assert "signature" not in f"{caught.value} {caught.value!r}"
    assert len(server.exchanges) == 2


def test_a_redirect_in_a_circle_ends() -> None:
    moved = answer(302, b"", {"Location": "/again"})
    with (
        RawServer(lambda exchange: exchange.send(moved)) as server,
        Leaf(server.url) as leaf,
        pytest.raises(TransportError, match="found redirects without end"),
    ):
        leaf.api.run_details()
    assert 10 < len(server.exchanges) < 50


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:notaport/o?s=secret", "http:///o", "http://h:0/"])
def test_a_download_link_that_is_no_address_is_refused_in_our_words(url: str) -> None:
    with Leaf("http://127.0.0.1:9") as leaf, pytest.raises(DownloadError, match="absolute download URL") as caught:
        leaf.transport.fetch("download of a1", url, io.BytesIO())
    assert "secret" not in str(caught.value)


# --- what an answer may make us say -----------------------------------------------------------------------------------------


def refused_with(content: bytes) -> ApiError:
    """Let a server answer a question with the bytes, and give what that becomes."""
    with (
        RawServer(lambda exchange: exchange.send(content)) as server,
        Leaf(server.url) as leaf,
        pytest.raises(ApiError) as caught,
    ):
        leaf.api.run_details()
    return caught.value


def test_a_signed_link_in_an_error_of_the_server_is_not_shown() -> None:
    message = "no copy at https://store.example/o?X-Amz-Signature=0123 or HTTP://other/x?sig=456, try later?"
    refusal = answer(400, json.dumps({"error": message}).encode())
    caught = refused_with(refusal)
    shown = str(caught)
    assert "https://store.example/o?<hidden> or HTTP://other/x?<hidden> try later?" in shown
    assert "0123" not in shown
    assert "456" not in shown


@pytest.mark.parametrize("place", ["kind", "key", "value", "reason"])
def test_a_token_that_comes_back_in_any_place_is_not_shown(place: str) -> None:
    credentials = make_credentials()
    token = credentials.session_token
    sent = {
        "kind": answer(200, b"<br/>", {"Content-Type": f"application/{token}"}),
        "key": answer(200, json.dumps({"data": {token: 1, "run_status": 5}}).encode()),
        "value": answer(400, json.dumps({"error": f"no leaf with {token}"}).encode()),
        "reason": f"HTTP/1.1 418 {token}\r\nContent-Length: 0\r\n\r\n".encode(),
    }[place]
    with (
        RawServer(lambda exchange: exchange.send(sent)) as server,
        Leaf(server.url, credentials) as leaf,
        pytest.raises(ApiError) as caught,
    ):
        leaf.api.run_details()
    assert token not in f"{caught.value} {caught.value!r}"
    if place == "key":
        assert "found the keys ['…', 'run_status']" in str(caught.value) or "['run_status', '…']" in str(caught.value)


def test_headers_that_cannot_be_parsed_are_not_quoted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    # What follows the broken line is no header any more for the parser, and is shown in a warning.
    broken = b"HTTP/1.1 200 OK\r\nBroken\x00\x01line\r\nX-Link: http://store/o?X-Amz-Signature=0123456789\r\n\r\n{}"
    with RawServer(lambda exchange: exchange.send(broken)) as server, Leaf(server.url) as leaf:
        with pytest.raises(ApiError):
            leaf.api.run_details()
        leaf.transport.fetch("download of a1", f"{server.url}/o?signature=0123456789", io.BytesIO())
    (first, second) = [record for record in caplog.records if "Failed to parse headers" in record.getMessage()]
    assert (
        first.getMessage()
        == f"Failed to parse headers (url={server.url}/api/v1/run/{leaf.credentials.branch_id}): HeaderParsingError"
    )
    assert second.getMessage() == "Failed to parse headers (url=<hidden>): HeaderParsingError"
    assert "Signature" not in caplog.text


def test_urls_without_a_query_are_left_alone() -> None:
    text = "see https://status.example/page, ok? 'http://h/a?b=c' end"
    assert without_queries(text) == "see https://status.example/page, ok? 'http://h/a?<hidden>' end"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("text/html; charset=utf-8", "5 bytes of text/html"),
        ("application/vnd.x+json", "5 bytes of application/vnd.x+json"),
        ("http://127.0.0.1/o?X-Amz-Signature=0123", "5 bytes of an unreadable content type"),
        ("text/" + "x" * 500, "5 bytes of an unreadable content type"),
    ],
)
def test_of_a_content_type_only_what_is_one_is_shown(kind: str, shown: str) -> None:
    page = answer(200, b"<br/>", {"Content-Type": kind})
    caught = refused_with(page)
    assert shown in str(caught)
    assert "0123" not in str(caught)


# --- clocks that are wrong ------------------------------------------------------------------------------------------------


def test_a_moment_to_come_back_is_counted_from_the_servers_own_clock() -> None:
    for day in ("Wed, 21 Oct 2015", "Thu, 01 Jan 2099"):
        headers = {"Retry-After": f"{day} 07:28:01 GMT", "Date": f"{day} 07:28:00 GMT"}
        first = answer(503, b'{"error": "later"}', headers)
        script = lambda exchange, first=first: exchange.send(first if exchange.number == 1 else STARTED)  # noqa: E731
        with RawServer(script) as server, Leaf(server.url, retry=RetryPolicy(attempts=2, budget_s=5)) as leaf:
            began = time.monotonic()
            assert leaf.api.run_details().number == 1
            assert 1.0 <= time.monotonic() - began < 5
        assert len(server.exchanges) == 2


@pytest.mark.parametrize(
    "value",
    [
        "Wed, 21 Oct 2099 07:" + "28" * 50 + ":00 GMT",
        "Wed, 21 Oct 99999 07:28:00 GMT",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "Wed, 21 Oct 2099 07:28:00 +" + "9" * 30,
    ],
)
def test_a_moment_that_is_none_is_no_wish(value: str) -> None:
    assert http_errors.retry_after_s(value) in (None, 0.0)
    assert http_errors.retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT", value) is not None


@pytest.mark.parametrize(
    ("from_days", "to_days", "words"), [(10, 20, "not yet valid"), (-20, -10, "expired")], ids=["early", "late"]
)
def test_a_certificate_out_of_its_time_points_to_the_clock(
    from_days: int, to_days: int, words: str, tmp_path: Path
) -> None:
    now, authority = datetime.datetime.now(datetime.timezone.utc), trustme.CA()
    day = datetime.timedelta(days=1)
    issued = authority.issue_cert("127.0.0.1", not_before=now + from_days * day, not_after=now + to_days * day)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "chain.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    with Sandbox(tls=(tmp_path / "chain.pem", tmp_path / "key.pem")) as sandbox:
        trust = str(tmp_path / "ca.pem")
        with Leaf(sandbox.url, verify=trust) as leaf, pytest.raises(TLSError, match=words) as caught:
            leaf.api.run_details()
        assert "this machine's clock" in str(caught.value)
        assert sandbox.hits("run") == 0


# --- names that come and go -------------------------------------------------------------------------------------------------


def test_a_name_that_cannot_be_resolved_for_a_while_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = socket.getaddrinfo, itertools.count(1)
    asked: list[object] = []

    def resolver(host: object, *rest: Any, **more: Any) -> Any:
        if host != "branch.test":
            return real(host, *rest, **more)
        asked.append(host)
        if next(count) % 3:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real("127.0.0.1", *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    quick = RetryPolicy(attempts=3, backoff_s=0.01)
    with Sandbox(leaves=2) as sandbox:
        host = sandbox.url.replace("127.0.0.1", "branch.test")
        with Leaf(host, sandbox.credentials[0], retry=quick) as leaf:
            assert leaf.api.run_details().status == "start"
            leaf.transport._adapter.forget()
            # Nothing left this machine, so an upload is as free to be tried again as a question.
            assert leaf.upload() == sandbox.uploads[0].file_id
        assert len(asked) == 6
        assert len(sandbox.uploads) == 1
        with (
            Leaf(host) as leaf,
            pytest.raises(UnreachableError, match=r"a connection to branch\.test.*name resolution"),
        ):
            leaf.api.run_details()


# --- connections used by several threads ---------------------------------------------------------------------------------


def test_one_slow_answer_holds_up_no_other_thread() -> None:
    release = threading.Event()

    def script(exchange: Exchange) -> None:
        if exchange.number == 1:
            release.wait(20)
        exchange.send(STARTED)

    done: list[int] = []
    with RawServer(script) as server, Leaf(server.url, timeout_s=20.0) as leaf:
        slow = threading.Thread(target=lambda: done.append(leaf.api.run_details().number))
        slow.start()
        deadline = time.monotonic() + 10
        while not server.exchanges and time.monotonic() < deadline:
            time.sleep(0.005)
        assert leaf.api.run_details().number == 1
        assert done == []
        release.set()
        slow.join(10)
    assert done == [1]
