"""What this package adds to uvicorn's connections: a way to cut them, silence about tickets, and what older releases lack."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class HttpProtocol(H11Protocol):
    """Let the application reach its connection, so that it can be cut, and keep signed links out of the log."""

    def connection_made(self, transport: Any) -> None:  # noqa: D102 - as in the base
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        # Whatever the configuration says, uvicorn logs each request with its query once the user's root logger shows INFO.
        self.access_log = False


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Keep the upgrade's URL, and with it the ticket, out of the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logging.getLogger("branchkey_integrations.sandbox.uvicorn")
        self.logger.setLevel(logging.WARNING)
        # The base gave its own one away already, and with DEBUG on that one shows the request line.
        self.conn.logger, self.conn.debug = self.logger, False


class OldWebSocketProtocol(WebSocketProtocol):
    """Ping, wait for a slow reader, refuse in JSON and send empty texts, which the last uvicorn for Python 3.9 (0.39) cannot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered = b""
        self._refusal: Any = {}

    async def send(self, message: Any) -> None:
        """Take over what the base does wrongly: headers of a refusal would go out twice, empty texts not at all."""
        if message["type"] == "websocket.http.response.start":
            self._refusal = message
        elif message["type"] == "websocket.http.response.body":
            self._refuse(self._refusal["status"], self._refusal["headers"], message["body"])
        elif message["type"] == "websocket.send" and message.get("text") == "" and not self.close_sent:
            self.conn.send_text(b"")
            self.transport.write(b"".join(self.conn.data_to_send()))
        else:
            await super().send(message)

    def _refuse(self, status: int, headers: Any, body: bytes) -> None:
        response = self.conn.reject(status, body.decode("utf-8"))
        for name, value in ((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers):
            if name in response.headers:
                del response.headers[name]
            response.headers[name] = value
        self.conn.send_response(response)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
        self.handshake_complete = self.close_sent = True
        self.transport.close()

    def pause_writing(self) -> None:  # noqa: D102 - as in the base
        self.writable.clear()

    def resume_writing(self) -> None:  # noqa: D102 - as in the base
        self.writable.set()

    def connection_made(self, transport: Any) -> None:  # noqa: D102 - as in the base
        super().connection_made(transport)
        self._schedule()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102 - as in the base
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:  # noqa: D102 - as in the base
        # Any sign of life will do: a leaf sends nothing of its own accord but pongs.
        self._unanswered = b""
        super().data_received(data)

    def _schedule(self) -> None:
        if self.config.ws_ping_interval:
            self._timer = self.loop.call_later(self.config.ws_ping_interval, self._ping)

    def _ping(self) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        if self._unanswered:
            self.conn.fail(1011, "keepalive ping timeout")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()
            return
        if self.handshake_complete:
            self._unanswered = os.urandom(4)
            self.conn.send_ping(self._unanswered)
            self.transport.write(b"".join(self.conn.data_to_send()))
        self._schedule()


def websocket_protocol() -> type[asyncio.Protocol]:
    """Choose what suits the uvicorn that is installed."""
    return WebSocketProtocol if hasattr(WebSocketsSansIOProtocol, "start_keepalive") else OldWebSocketProtocol
