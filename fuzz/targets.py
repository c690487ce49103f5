"""The parsers, each as a function of bytes that may only return, or raise one of our own errors."""

from __future__ import annotations

import hashlib
import io
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import urllib3.util.connection

from branchkey_integrations.api import Api
from branchkey_integrations.archive import Archive, ArchiveInfo
from branchkey_integrations.config import Endpoint, RetryPolicy
from branchkey_integrations.credentials import Credentials
from branchkey_integrations.errors import BranchKeyError
from branchkey_integrations.events import parse_notification
from branchkey_integrations.transport import Transport

#: Layers up to this size are read as a model would read them; of larger ones only the stream is checked, in pieces.
_READ_BYTES = 1 << 20
#: As many as most seeds have.
_LAYERS = 3
#: Longest object that is fetched.
_OBJECT_BYTES = 1 << 10
_TOKEN = "token-of-the-fuzzer-0123456789"
_UPDATE = b"an update"


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: on the command line.
        run: takes an input; returns when it was good, raises a :class:`BranchKeyError` when it was refused.
        longest_bytes: of an input.
    """

    name: str
    run: Callable[[bytes], None]
    longest_bytes: int = 1 << 16


def archive(data: bytes) -> None:
    """Read an archive as a leaf does, in one of eight cases as one that knows how many layers it must have."""
    layers = _LAYERS if len(data) % 8 == 0 else None
    with Archive.open(io.BytesIO(data), max_bytes=1 << 40, layers=layers) as opened:
        assert layers in (None, len(opened))
        for index, header in enumerate(opened.headers):
            if header.nbytes <= _READ_BYTES:
                layer = opened[index]
                assert (layer.shape, layer.dtype) == (header.shape, header.dtype)
        opened.check()


def notification(data: bytes) -> None:
    """Parse a notification, as bytes and as the text that a WebSocket may give."""
    refusal: BranchKeyError | None = None
    for raw in (data, data.decode("utf-8", "surrogateescape"), data.decode("latin-1")):
        try:
            parse_notification(raw)
        except BranchKeyError as error:
            assert len(str(error)) < 1000
            refusal = error
    if refusal is not None:
        raise refusal


class _Wire:
    """Stand in for the network: every connection finds the same bytes, and then the end."""

    def __init__(self) -> None:
        self.data = b""

    def connect(self, *_: Any, **__: Any) -> socket.socket:
        near, far = socket.socketpair()
        with far:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            far.settimeout(5)
            far.sendall(self.data)
            far.shutdown(socket.SHUT_WR)
            # What is not read when it closes would turn the end into a reset, and the answer into nothing.
            near.settimeout(5)
        return near


_wire = _Wire()


def _calls(api: Api, transport: Transport) -> list[Callable[[], object]]:
    info = ArchiveInfo(len(_UPDATE), hashlib.sha256(_UPDATE).digest())
    return [
        api.run_details,
        api.websocket_ticket,
        api.branch_config,
        lambda: api.upload(io.BytesIO(_UPDATE), info, "update.npz", {}),
        lambda: api.send_metrics("a1", '{"loss": 1}', "train"),
        lambda: transport.fetch("download of a1", "http://127.0.0.1:9/o?X-Amz-Signature=secret", io.BytesIO()),
        lambda: _limited(api),
    ]


def _limited(api: Api) -> None:
    target = io.BytesIO()
    try:
        api.download("a1", target, _OBJECT_BYTES)
    finally:
        assert len(target.getbuffer()) <= _OBJECT_BYTES, "more was kept than is allowed"


def http_answer(data: bytes) -> None:
    """Take an answer off the wire: the first byte says to which call, the rest is what the server sends."""
    _wire.data = data[1:]
    real, urllib3.util.connection.create_connection = urllib3.util.connection.create_connection, _wire.connect
    credentials = Credentials("leaf", "name", _TOKEN, "tree", "branch")
    transport = Transport(
        Endpoint.parse("http://127.0.0.1:9"),
        credentials,
        timeout_s=5.0,
        retry=RetryPolicy(attempts=1),
        proxies={"no_proxy": "*"},
    )
    try:
        calls = _calls(Api(transport, credentials), transport)
        calls[(data[0] if data else 0) % len(calls)]()
    except BranchKeyError as error:
        text = f"{error} {error!r}"
        assert _TOKEN not in text, "the error shows the token"
        assert "X-Amz-Signature=secret" not in text, "the error shows the presigned URL"
        raise
    finally:
        urllib3.util.connection.create_connection = real
        transport.close()


TARGETS = {
    target.name: target
    for target in (
        Target("archive", archive),
        Target("notification", notification, 1 << 17),
        Target("http", http_answer, 1 << 16),
    )
}
