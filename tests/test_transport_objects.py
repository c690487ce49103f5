"""Objects behind presigned addresses, and whose credentials go where."""

from __future__ import annotations

import io
import json
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from branchkey_integrations.config import RetryPolicy
from branchkey_integrations.errors import (
    ApiError,
    BranchKeyError,
    ClientClosedError,
    DownloadError,
    NotFoundError,
    TransportError,
)
from branchkey_integrations.sandbox import Answer, Sandbox
from branchkey_integrations.transport import Repeat
from tests.support.raw_server import Exchange, RawServer, answer
from tests.support.transport import ACCEPTED, QUICK, STARTED, Leaf


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(leaves=2) as opened:
        yield opened


@pytest.fixture
def leaf(sandbox: Sandbox) -> Iterator[Leaf]:
    with Leaf(sandbox.url, sandbox.credentials[0]) as made:
        yield made


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
