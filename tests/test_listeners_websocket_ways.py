"""The ways to a WebSocket: TLS with a private authority, and proxies, as for HTTP."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator

import pytest

from branchkey_integrations.config import Endpoint
from branchkey_integrations.errors import (
    ConfigurationError,
    TLSError,
    UnreachableError,
)
from branchkey_integrations.listeners.proxy import proxy_for
from tests.support.channels import (
    WebSocketChannel,
    close_in_time,
    our_threads,
    started,
    wait_until,
)
from tests.support.proxy import ForwardProxy
from tests.support.rabbitmq import aggregate
from tests.support.relay import blackhole, silent_peer
from tests.support.tls import PrivateTls, private_tls
from tests.support.websocket_server import WebSocketServer, websocket_server

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def server() -> Iterator[WebSocketServer]:
    with websocket_server() as made:
        yield made


@pytest.fixture
def channel(server: WebSocketServer) -> WebSocketChannel:
    return WebSocketChannel(server)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> PrivateTls:
    return private_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(tls: PrivateTls) -> Iterator[WebSocketChannel]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*tls.pair)
    with websocket_server(context) as made:
        yield WebSocketChannel(made)


@pytest.fixture
def no_proxy_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def _swallow(start: object) -> None:
    with pytest.raises(Exception, match="closed"):
        start(60)  # type: ignore[operator]


def test_the_tls_flag_does_not_disturb_plain_http(channel: WebSocketChannel) -> None:
    for verify in (True, False):
        with started(channel.listener(verify=verify)) as listener:
            assert listener.connected


def test_with_a_private_ca_it_speaks_tls(secure: WebSocketChannel, tls: PrivateTls) -> None:
    with started(secure.listener(verify=tls.ca)):
        secure.send(aggregate("a1"))
        wait_until(lambda: secure.heard.ids == ["a1"])


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_system_trust_takes_a_private_ca_from_the_environment(
    secure: WebSocketChannel, tls: PrivateTls, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, tls.ca)
    with started(secure.listener(verify=True)) as listener:
        assert listener.connected


def test_an_unknown_ca_is_refused(secure: WebSocketChannel) -> None:
    with pytest.raises(TLSError, match=r"certificate of 127\.0\.0\.1.*ssl=<path"):
        secure.listener(verify=True).start(10)
    assert our_threads() == []
    assert secure.server.requests == []


def test_without_verification_any_certificate_will_do(secure: WebSocketChannel) -> None:
    with started(secure.listener(verify=False)) as listener:
        assert listener.connected


@pytest.mark.parametrize("where", [silent_peer, blackhole])
def test_close_ends_a_tls_handshake_that_hangs(secure: WebSocketChannel, where: object) -> None:
    with where() as port:  # type: ignore[operator]
        listener = secure.listener(port=port, verify=False)
        starter = threading.Thread(target=_swallow, args=(listener.start,))
        starter.start()
        wait_until(lambda: secure.server.tickets)
        close_in_time(listener)
        starter.join(2)
        assert not starter.is_alive()


def test_a_given_proxy_is_used_for_the_socket(channel: WebSocketChannel) -> None:
    with ForwardProxy() as proxy, started(channel.listener(proxies={"http": proxy.url})):
        channel.server.send(aggregate("a1"))
        wait_until(lambda: channel.heard.ids == ["a1"])
        assert [(each.method, each.target) for each in proxy.passages] == [("CONNECT", f"127.0.0.1:{channel.port}")]


def test_tls_goes_through_a_proxy_with_a_login(secure: WebSocketChannel, tls: PrivateTls) -> None:
    with ForwardProxy("anna", "p@ss word") as proxy:
        proxies = {"https": f"http://anna:p%40ss%20word@{proxy.netloc}"}
        with started(secure.listener(verify=tls.ca, proxies=proxies)):
            secure.server.send(aggregate("a1"))
            wait_until(lambda: secure.heard.ids == ["a1"])
        assert [each.admitted for each in proxy.passages] == [True]


def test_a_proxy_that_wants_a_login_says_so(channel: WebSocketChannel) -> None:
    refused = pytest.raises(UnreachableError, match=r"proxy 127\.0\.0\.1.*status 407")
    with ForwardProxy("anna", "secret") as proxy, refused:
        channel.listener(proxies={"http": proxy.url}).start(10)
    assert our_threads() == []


@pytest.mark.parametrize("where", [silent_peer, blackhole])
def test_close_ends_a_proxy_that_hangs(channel: WebSocketChannel, where: object) -> None:
    with where() as port:  # type: ignore[operator]
        listener = channel.listener(proxies={"http": f"http://127.0.0.1:{port}"})
        starter = threading.Thread(target=_swallow, args=(listener.start,))
        starter.start()
        wait_until(lambda: channel.server.tickets)
        close_in_time(listener)
        starter.join(2)
        assert not starter.is_alive()


def test_the_environments_proxy_is_used_unless_no_proxy_names_the_host(
    channel: WebSocketChannel, no_proxy_settings: pytest.MonkeyPatch
) -> None:
    with ForwardProxy() as proxy:
        no_proxy_settings.setenv("HTTP_PROXY", proxy.url)
        with started(channel.listener()):
            pass
        assert len(proxy.passages) == 1
        no_proxy_settings.setenv("NO_PROXY", "127.0.0.1")
        with started(channel.listener()):
            pass
        assert len(proxy.passages) == 1


def test_the_choice_of_a_proxy_is_that_of_requests(no_proxy_settings: pytest.MonkeyPatch) -> None:
    plain, secure = Endpoint.parse("http://app.test"), Endpoint.parse("https://app.test:8443")
    assert proxy_for(plain, None) is None
    given = {"http": "one.test:3128", "https": "https://two.test", "all": "socks5://three.test"}
    assert proxy_for(plain, given) == "http://one.test:3128"
    assert proxy_for(secure, given) == "https://two.test"
    assert proxy_for(secure, {"all": "socks5://three.test"}) == "socks5://three.test"
    assert proxy_for(secure, {"https://app.test": "http://four.test"}) == "http://four.test"
    no_proxy_settings.setenv("https_proxy", "http://env.test:8080")
    assert proxy_for(secure, None) == "http://env.test:8080"
    assert proxy_for(secure, {"http": "http://one.test"}) == "http://env.test:8080"
    assert proxy_for(secure, given) == "https://two.test"
    assert proxy_for(secure, {"no_proxy": "app.test"}) is None
    no_proxy_settings.setenv("no_proxy", ".test")
    assert proxy_for(secure, None) is None
    # What was given on purpose counts also for hosts that the environment excepts.
    assert proxy_for(secure, given) == "https://two.test"


@pytest.mark.parametrize("proxy", ["http://:8080", "http://host:port", "http://user:geheim@host:99999"])
def test_a_proxy_that_is_no_url_is_refused_by_the_constructor(channel: WebSocketChannel, proxy: str) -> None:
    with pytest.raises(ConfigurationError, match="proxies") as caught:
        channel.listener(proxies={"http": proxy})
    assert "geheim" not in str(caught.value)
