"""What this package adds to uvicorn's connections: a way to cut them, silence about tickets, and what older releases lack."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class HttpProtocol(H11Protocol):
    """Let the application reach its connection, so that it can be cut."""

    def connection_made(self, transport: Any) -> None:  # noqa: D102 - as in the base
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Keep the upgrade's URL, and with it the ticket, out of the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logging.getLogger("branchkey_integrations.sandbox.uvicorn")
        self.logger.setLevel(logging.WARNING)


class PingingWebSocketProtocol(WebSocketProtocol):
    """Ping, and wait for a slow reader, where uvicorn (before 0.40, the last ones for Python 3.9) does neither."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered = b""

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
    return WebSocketProtocol if hasattr(WebSocketsSansIOProtocol, "start_keepalive") else PingingWebSocketProtocol
