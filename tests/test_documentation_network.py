"""What the documentation says of proxies and TLS runs as it is written there, with only the import changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from branchkey_integrations import Client, RetryPolicy
from branchkey_integrations.errors import (
    BranchKeyError,
    TLSError,
    UnreachableError,
)
from branchkey_integrations.sandbox import Sandbox
from tests.support import documentation
from tests.support.documentation import PLATFORM, run, saved
from tests.support.proxy import ForwardProxy, Passage
from tests.support.tls import private_tls

_TIMEOUT_S = 10


pytestmark = pytest.mark.usefixtures("folder_of_its_own")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[Client]:
    with Client(sandbox.credentials[0].to_dict(), host=sandbox.url) as opened:
        yield opened


# --- proxies --------------------------------------------------------------------------------------------------------------


def proxied(sandbox: Sandbox, proxy: ForwardProxy, login: str = "user:password") -> dict[str, str]:
    return {
        "user:password@proxy.example.com:8080": f"{login}@{proxy.netloc}" if login else proxy.netloc,
        PLATFORM: sandbox.url,
    }


def one_round(client: Client, sandbox: Sandbox) -> None:
    """Upload, hear of the aggregate, and download it from its presigned link."""
    client.file_upload(saved(client))
    aggregation_id = client.queue.get(timeout=_TIMEOUT_S)
    assert [aggregation_id] == sandbox.aggregates
    client.file_download(aggregation_id)


@pytest.mark.parametrize("login", ["user:password", ""], ids=["login", "open"])
def test_http_and_websocket_both_go_through_the_documented_proxy(sandbox: Sandbox, login: str) -> None:
    with ForwardProxy(*login.split(":")) as proxy:
        names = run(
            documentation.PROXIES,
            proxied(sandbox, proxy, login),
            Client=Client,
            credentials=sandbox.credentials[0].to_dict(),
        )
        with names["client"] as client:
            one_round(client, sandbox)
        passages = proxy.passages
    netloc = sandbox.url[len("http://") :]
    assert all(passage.admitted for passage in passages)
    assert [passage.target for passage in passages if passage.method == "CONNECT"] == [netloc]
    requested = [passage.target[len(sandbox.url) :] for passage in passages if passage.method != "CONNECT"]
    assert all(passage.target.startswith(f"{sandbox.url}/") for passage in passages if passage.method != "CONNECT")
    # The sandbox saw no request that the proxy did not carry.
    for route, path in (
        ("run", "/run/"),
        ("ticket", "/ws/ticket"),
        ("upload", "/file/upload"),
        ("download", "/download/"),
    ):
        assert sum(path in each for each in requested) == sandbox.hits(route) > 0
    assert len(requested) == sum(sandbox.hits(route) for route in ("run", "ticket", "upload", "download", "object"))
    assert sandbox.hits("object") == 1
    assert sandbox.hits("ws") == 1


def test_an_https_platform_is_reached_by_tunnels_only(tmp_path: Path) -> None:
    files = private_tls(tmp_path)
    with Sandbox(tls=files.pair) as sandbox, ForwardProxy("user", "password") as proxy:
        replacements = {**proxied(sandbox, proxy), "proxies=proxies": f"proxies=proxies, ssl={files.ca!r}"}
        names = run(documentation.PROXIES, replacements, Client=Client, credentials=sandbox.credentials[0].to_dict())
        with names["client"] as client:
            one_round(client, sandbox)
        netloc = sandbox.url[len("https://") :]
        # One for the notifications, and one for the requests at least.
        assert len(proxy.passages) >= 2
        assert set(proxy.passages) == {Passage("CONNECT", netloc, admitted=True)}


def test_without_the_option_http_and_websocket_both_follow_the_environment(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = sandbox.credentials[0].to_dict()
    with ForwardProxy() as proxy, monkeypatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("http_proxy", proxy.url)
        with Client(leaf, host=sandbox.url) as client:
            one_round(client, sandbox)
        carried = proxy.passages
        patch.setenv("no_proxy", "127.0.0.1")
        with Client(leaf, host=sandbox.url):
            assert sandbox.hits("ws") == 2
        assert proxy.passages == carried
    methods = [passage.method for passage in carried]
    assert (methods.count("CONNECT"), methods.count("POST"), methods.count("GET")) == (1, 2, 3)


def test_a_wrong_login_at_the_proxy_is_an_error_that_does_not_show_it(sandbox: Sandbox) -> None:
    with ForwardProxy("user", "password") as proxy:
        login = {"http": f"http://user:mistaken-secret@{proxy.netloc}"}
        with pytest.raises(BranchKeyError) as caught:
            Client(sandbox.credentials[0].to_dict(), host=sandbox.url, proxies=login)
        assert proxy.passages
        assert not any(passage.admitted for passage in proxy.passages)
    assert "mistaken-secret" not in f"{caught.value} {caught.value!r}"
    assert sandbox.hits("run") == 0


def test_a_proxy_that_is_not_there_is_an_error_and_not_gone_around(sandbox: Sandbox) -> None:
    with ForwardProxy() as proxy:
        gone = proxy.url
    with pytest.raises(UnreachableError):
        Client(
            sandbox.credentials[0].to_dict(),
            host=sandbox.url,
            proxies={"http": gone},
            retry=RetryPolicy(attempts=1),
        )
    assert sandbox.hits("run") == 0


# --- TLS ------------------------------------------------------------------------------------------------------------------


def test_one_ca_path_is_enough_for_https_and_wss(tmp_path: Path) -> None:
    files = private_tls(tmp_path)
    with Sandbox(tls=files.pair) as sandbox:
        assert sandbox.url.startswith("https://")
        with Client(sandbox.credentials[0].to_dict(), host=sandbox.url, ssl=files.ca) as client:
            assert client.notifications == "websocket"
            assert sandbox.connected == [client.leaf_id]
            one_round(client, sandbox)


def test_a_private_ca_that_nobody_named_is_refused_and_nothing_is_sent(tmp_path: Path) -> None:
    with Sandbox(tls=private_tls(tmp_path).pair) as sandbox:
        # That no thread or socket is left is watched in every test.
        with pytest.raises(TLSError, match="ssl="):
            Client(sandbox.credentials[0].to_dict(), host=sandbox.url, ssl=True)
        assert (sandbox.hits("run"), sandbox.hits("ticket")) == (0, 0)


def test_a_certificate_for_another_host_is_refused_although_its_ca_is_known(tmp_path: Path) -> None:
    files = private_tls(tmp_path, "elsewhere.example.com")
    with Sandbox(tls=files.pair) as sandbox:
        with pytest.raises(TLSError):
            Client(sandbox.credentials[0].to_dict(), host=sandbox.url, ssl=files.ca)
        assert sandbox.hits("run") == 0


def test_ssl_false_speaks_tls_without_checking_it_and_warns_once(tmp_path: Path) -> None:
    with Sandbox(tls=private_tls(tmp_path).pair) as sandbox, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Client(sandbox.credentials[0].to_dict(), host=sandbox.url, ssl=False) as client:
            one_round(client, sandbox)
    # One of ours that says what to do, not one of a library's for each request.
    assert ["ssl=False" in str(warning.message) for warning in caught] == [True]
