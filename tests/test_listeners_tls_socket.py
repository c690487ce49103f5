"""A TLS socket between a thread that reads and one that writes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from branchkey_integrations.listeners.tls_socket import SharedTLSSocket

_CONNECTIONS = 150
_DEADLINE_S = 10.0


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    client.sslsocket_class = SharedTLSSocket
    return server, client


@pytest.fixture
def echo(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[int]:
    """A server that answers each connection's bytes until it ends; gives its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                accepted, _ = listening.accept()
            except OSError:
                return
            accepted.settimeout(_DEADLINE_S)
            # A client that refuses the certificate ends the handshake.
            with accepted, contextlib.suppress(OSError), contexts[0].wrap_socket(accepted, server_side=True) as peer:
                while data := peer.recv(65536):
                    peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(_DEADLINE_S)


def connect(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), timeout=_DEADLINE_S)
    wrapped = context.wrap_socket(plain, server_hostname="localhost")
    wrapped.settimeout(_DEADLINE_S)
    return wrapped


def test_a_reader_and_a_writer_that_start_together_never_hang(
    echo: int, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    for _ in range(_CONNECTIONS):
        with connect(echo, contexts[1]) as wrapped:
            assert isinstance(wrapped, SharedTLSSocket)
            received: list[bytes] = []
            reader = threading.Thread(target=lambda wrapped=wrapped, kept=received: kept.append(wrapped.recv(100)))
            reader.start()
            wrapped.sendall(b"upgrade")
            reader.join(_DEADLINE_S)
            assert received == [b"upgrade"]


def test_much_goes_both_ways_at_once_and_arrives_whole(
    echo: int, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    sent = bytes(range(256)) * 16384
    with connect(echo, contexts[1]) as wrapped:
        received = bytearray()

        def read() -> None:
            while len(received) < len(sent):
                received.extend(wrapped.recv(65536))

        reader = threading.Thread(target=read)
        reader.start()
        wrapped.sendall(sent)
        reader.join(_DEADLINE_S)
        assert bytes(received) == sent


def test_a_read_that_gets_nothing_ends_at_its_timeout(
    echo: int, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    with connect(echo, contexts[1]) as wrapped:
        wrapped.settimeout(0.05)
        assert wrapped.gettimeout() == 0.05
        with pytest.raises(socket.timeout):
            wrapped.recv(1)
        wrapped.settimeout(_DEADLINE_S)
        wrapped.sendall(b"still works")
        assert wrapped.recv(100) == b"still works"


def test_an_untrusted_certificate_is_refused_as_ever(
    echo: int,
) -> None:
    stranger = ssl.create_default_context()
    stranger.sslsocket_class = SharedTLSSocket
    with (
        socket.create_connection(("127.0.0.1", echo), timeout=_DEADLINE_S) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        stranger.wrap_socket(plain, server_hostname="localhost")
