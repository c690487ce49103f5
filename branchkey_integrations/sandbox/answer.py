"""An HTTP answer as a value: what an endpoint decides, what a test may put in its place, and how it goes out."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_PIECE_BYTES = 1 << 18
_LONGEST_CUT_WAIT_S = 1.0


@dataclass(frozen=True)
class Answer:
    """Say what the sandbox answers to one request.

    Args:
        status: HTTP status; 0 resets the connection before a single byte of an answer.
        body: the bytes, or the path of a file to stream.
        content_type: value of the ``Content-Type`` header.
        headers: further headers.
        cut_after_bytes: send the full ``Content-Length``, but only so many bytes of the body, then end the connection.
    """

    status: int
    body: Union[bytes, os.PathLike[str]] = field(default=b"", repr=False)  # it, or a header, may hold a signed link
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    cut_after_bytes: int | None = None

    @classmethod
    def json(cls, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        """Make a JSON answer; text that no UTF-8 can hold goes out escaped."""
        return cls(status, json.dumps(content).encode("ascii"), headers=headers or {})

    @classmethod
    def error(cls, status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Make an error as every official client reads it: a JSON object with a string ``error``."""
        return cls.json({"error": message}, status, headers)

    @classmethod
    def xml(cls, status: int, code: str, message: str) -> Answer:
        """Make an error as an S3 object store words it. ``code`` and ``message`` must need no escaping."""
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        return cls(status, text.encode("utf-8"), "application/xml")

    @classmethod
    def cut(cls) -> Answer:
        """Reset the connection instead of answering."""
        return cls(0)

    def read(self) -> bytes:
        """Give the whole body."""
        if isinstance(self.body, bytes):
            return self.body
        with open(self.body, "rb") as file:
            return file.read()

    def pieces(self) -> Iterator[bytes]:
        """Give the body piece by piece, up to the cut."""
        left = self.cut_after_bytes
        if isinstance(self.body, bytes):
            yield self.body if left is None else self.body[:left]
            return
        with open(self.body, "rb") as file:
            while left is None or left > 0:
                piece = file.read(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES))
                if not piece:
                    return
                left = None if left is None else left - len(piece)
                yield piece

    @property
    def size_bytes(self) -> int:
        """Length of the whole body."""
        return len(self.body) if isinstance(self.body, bytes) else os.path.getsize(self.body)


async def send_answer(answer: Answer, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an answer through ASGI; resets need the transport that :mod:`.server` leaves in the scope's state."""
    if answer.status == 0:
        reset(transport_of(scope))
        await _gone(receive)
        return
    names = {"content-type": answer.content_type, "content-length": str(answer.size_bytes)}
    names.update({name.lower(): value for name, value in answer.headers.items()})
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in names.items()]
    if scope["type"] == "websocket":
        await send({"type": "websocket.http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": answer.read(), "more_body": False})
        return
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if scope["method"] != "HEAD":
        for piece in answer.pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            # A large file on a fast link never makes ``send`` wait, and others want their turn.
            await asyncio.sleep(0)
    if answer.cut_after_bytes is not None:
        await _break_off(transport_of(scope))
        await _gone(receive)
        return
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def transport_of(scope: Scope) -> Any:
    """Give the connection that a request came through."""
    return scope["state"]["transport"]


def reset(transport: Any) -> None:
    """End a connection the hard way: the other side gets a reset and no goodbye."""
    connection = transport.get_extra_info("socket")
    # The client may be gone already.
    if connection is not None and connection.fileno() != -1:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _break_off(transport: Any) -> None:
    """End a connection in the middle of a body: what was sent so far arrives, and nothing after it."""
    deadline = time.monotonic() + _LONGEST_CUT_WAIT_S
    # An abort throws away what waits here, and a reset also what waits in the kernel.
    while transport.get_write_buffer_size() and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    transport.abort()


async def _gone(receive: Receive) -> None:
    async def gone() -> None:
        # The server notices in its own time; an app that returns earlier would make it answer 500.
        while (await receive())["type"] not in ("http.disconnect", "websocket.disconnect"):
            pass

    try:
        await asyncio.wait_for(gone(), _LONGEST_CUT_WAIT_S)
    except asyncio.TimeoutError:
        return
