"""What a hostile server puts into an answer: bombs, forged lines, terminal commands, cookies, ways out of TLS."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import pickle
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from branchkey_integrations.api import Api
from branchkey_integrations.config import Endpoint, RetryPolicy, Verify
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import ApiError, AuthenticationError, TransportError, UploadUncertainError, shown
from branchkey_integrations.exchange import packed
from branchkey_integrations.sandbox import Answer, Call, Sandbox
from branchkey_integrations.transport import Transport
from tests.support.credentials import make_credentials
from tests.support.raw_server import Exchange, RawServer, answer
from tests.support.tls import private_tls

STARTED = json.dumps({"data": {"run_status": "start", "run_number": 66}}).encode()


@contextlib.contextmanager
def connected(url: str, credentials: Credentials | None = None, verify: Verify = True) -> Iterator[Api]:
    """Give the calls of a leaf that tries once."""
    credentials = credentials or make_credentials()
    once = RetryPolicy(attempts=1)
    transport = Transport(Endpoint.parse(url), credentials, verify=verify, retry=once, timeout_s=10.0)
    try:
        yield Api(transport, credentials)
    finally:
        transport.close()


def serving(content: bytes) -> RawServer:
    """Serve the same bytes again and again."""
    return RawServer(lambda exchange: exchange.send(content))


# --- too much -------------------------------------------------------------------------------------------------------------


def bomb(layers: int) -> bytes:
    """Pack 100 MiB of zeros as often as asked."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1024 * 1024)
    data = b"".join(packer.compress(zeros) for _ in range(100)) + packer.flush()
    for _ in range(layers - 1):
        data = gzip.compress(data)
    return data


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_packed_answer_that_grows_is_cut_before_it_fills_the_memory(layers: int) -> None:
    bombed = answer(200, bomb(layers), {"Content-Encoding": ", ".join(["gzip"] * layers)})
    with serving(bombed) as server, connected(server.url) as api:
        tracemalloc.start()
        try:
            with pytest.raises(ApiError, match="an answer of at most 4194304 bytes, found a larger one"):
                api.run_details()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 32 * 1024 * 1024


def test_an_error_of_the_platform_is_kept_short_whatever_it_says() -> None:
    refusal = answer(400, json.dumps({"error": "no " + "x" * 3_000_000}).encode())
    with serving(refusal) as server, connected(server.url) as api, pytest.raises(ApiError) as caught:
        api.run_details()
    assert caught.value.found == "400: no " + "x" * 291 + "…"
    assert len(pickle.dumps(caught.value)) < 1000


# --- words that do something --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\r\nERROR root: forged", "a ERROR root: forged"),
        ("a\x0b\x0c\x1c\x85\u2028\u2029b", "a b"),
        ("\x9b31mred\x7f\x08", r"\x9b31mred\x7f\x08"),
        ("file\u202egpj.exe\u2066", r"file\u202egpj.exe\u2066"),
        ("\ud800 alone\x00", r"\ud800 alone\x00"),
        ("Größe 3 µm ✓ 数据", "Größe 3 µm ✓ 数据"),
    ],
)
def test_what_a_server_says_is_one_printable_line(said: str, read: str) -> None:
    refusal = answer(403, json.dumps({"error": said}).encode())
    with serving(refusal) as server, connected(server.url) as api, pytest.raises(ApiError) as caught:
        api.run_details()
    assert caught.value.found == f"403: {read}"
    assert f"found 403: {read}. Check" in str(caught.value)
    assert shown(said) == read


@pytest.mark.parametrize("file_id", ["a\nERROR root: forged", "\x1b[2J", "x" * 257, "a b", ""])
def test_an_id_of_a_file_that_is_none_is_not_logged(file_id: str, caplog: pytest.LogCaptureFixture) -> None:
    taken = Answer.json({"data": {"file_id": file_id}}, 201)
    with (
        caplog.at_level(logging.DEBUG, "branchkey_integrations"),
        Sandbox() as sandbox,
        connected(sandbox.url, sandbox.credentials[0]) as api,
        sandbox.intercept("upload", taken),
        packed([np.ones(2)], 1.0) as (file, info),
    ):
        with pytest.raises(UploadUncertainError, match="found the keys") as caught:
            api.upload(file, info, "update.npz", {})
        assert sandbox.hits("upload") == 1
    for text in ("forged", "\x1b", "xxx"):
        assert text not in caplog.text + str(caught.value)


@pytest.mark.parametrize(
    "head",
    [
        b"Transfer-Encoding: chunked\r\n\r\n-5\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFF\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        b"X-Long: " + b"a" * 100_000 + b"\r\n\r\n{}",
        b"".join(b"X-%d: a\r\n" % number for number in range(200)) + b"\r\n{}",
    ],
    ids=["negative", "huge", "no number", "long header", "many headers"],
)
def test_a_body_or_headers_that_make_no_sense_are_errors_of_ours(head: bytes) -> None:
    def serve(exchange: Exchange) -> None:
        link = answer(200, json.dumps({"data": {"download_url": f"{server.url}/o"}}).encode())
        exchange.send(link if "download" in exchange.target else b"HTTP/1.1 200 OK\r\n" + head)

    with RawServer(serve) as server, connected(server.url) as api:
        with pytest.raises(TransportError, match="a whole answer from"):
            api.run_details()
        with pytest.raises(TransportError, match="a whole answer from"):
            api.download("a1", io.BytesIO())


# --- what would follow us, or lead us away -----------------------------------------------------------------------------


def test_cookies_are_neither_kept_nor_sent_along_a_redirect() -> None:
    def serve(exchange: Exchange) -> None:
        cookie = {"Set-Cookie": f"id=tracked-{exchange.number}; Path=/"}
        moved = answer(302, b"", {"Location": "/moved", **cookie})
        exchange.send(moved if exchange.number == 1 else answer(200, STARTED, cookie))

    with RawServer(serve) as server, connected(server.url) as api:
        assert [api.run_details().number for _ in range(2)] == [66, 66]
    assert [exchange.headers.get("cookie") for exchange in server.exchanges] == [None, None, None]


def test_a_redirect_from_https_to_plain_http_is_not_followed(tmp_path: Path) -> None:
    tls, target = private_tls(tmp_path), io.BytesIO()
    with serving(answer(200, STARTED)) as plain, Sandbox(tls=tls.pair) as sandbox:
        aggregation_id = sandbox.publish([np.zeros(2)], notify=False)
        away = Answer(302, b"", "x/y", {"Location": f"{plain.url}/o?signature=short"})
        with connected(sandbox.url, sandbox.credentials[0], tls.ca) as api:
            with sandbox.intercept("run", away), pytest.raises(TransportError, match="from https to plain http"):
                api.run_details()
            with sandbox.intercept("object", away), pytest.raises(TransportError, match="from https to plain http"):
                api.download(aggregation_id, target)
    assert plain.exchanges == []
    assert target.getvalue() == b""


def test_a_redirect_from_http_to_https_is_followed_without_our_headers(tmp_path: Path) -> None:
    tls = private_tls(tmp_path)
    seen: list[str | None] = []

    def note(call: Call) -> None:
        seen.append(call.headers.get("authorization"))

    with Sandbox(tls=tls.pair) as sandbox, sandbox.intercept("run", note):
        credentials = sandbox.credentials[0]
        there = f"{sandbox.url}/api/v1/run/{credentials.branch_id}"
        moved = serving(answer(308, b"", {"Location": there}))
        with moved, connected(moved.url, credentials, tls.ca) as api, pytest.raises(AuthenticationError):
            api.run_details()
    assert seen == [None]
