"""An ASGI application on a loopback port, in a thread that starts ready and stops for certain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, Union

import uvicorn

from branchkey_integrations.errors import SandboxError
from branchkey_integrations.sandbox.protocols import HttpProtocol, websocket_protocol

_log = logging.getLogger("branchkey_integrations.sandbox")
HOST = "127.0.0.1"
_START_TIMEOUT_S = 10.0
_GRACE_S = 1
#: The platform's load balancer is not known; what is usual is longer than the pause between two epochs of a small model.
_KEEP_ALIVE_S = 75
_MOST_MESSAGE_BYTES = 1 << 16


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready
        self.leave = asyncio.Event()

    async def startup(self, sockets: Union[list[socket.socket], None] = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    async def main_loop(self) -> None:
        # The original looks ten times a second whether it should end; this one is told.
        await self.on_tick(0)
        await self.leave.wait()


class ServerThread:
    """Serve ``app`` on ``127.0.0.1``.

    Args:
        app: the ASGI application.
        port: 0 for any free one.
        tls: paths of certificate chain and key, or None for plain HTTP.
        ping_interval_s: seconds between pings on each WebSocket; one that does not answer as long is closed.
    """

    def __init__(self, app: Any, port: int, tls: tuple[str, str] | None, ping_interval_s: float) -> None:
        self._app = app
        self._wanted_port = port
        self._tls = tls
        self._ping_interval_s = ping_interval_s
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: _Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Base URL."""
        return f"{'http' if self._tls is None else 'https'}://{HOST}:{self.port}"

    def start(self) -> None:
        """Bind, listen, and return when requests are answered.

        Raises:
            SandboxError: the port is taken, or certificate and key do not serve.
        """
        listener = self._bind()
        try:
            config = self._configure()
            self.port = listener.getsockname()[1]
            self._thread = threading.Thread(
                target=self._run, args=(config, listener), name="branchkey-sandbox-server", daemon=True
            )
            self._thread.start()
            if not self._started.wait(_START_TIMEOUT_S) or self._failure is not None:
                raise SandboxError(
                    what="server of the sandbox",
                    expected=f"a start within {_START_TIMEOUT_S:g} s",
                    found=type(self._failure).__name__ if self._failure else "none",
                    fix="See the log",
                ) from self._failure
        except BaseException:
            self.stop()
            listener.close()
            raise

    def _bind(self) -> socket.socket:
        # The protocol is named since asyncio sets TCP_NODELAY by it; without, each answer waits 40 ms for an acknowledgement.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, self._wanted_port))
            listener.listen(512)
        except (OSError, OverflowError) as error:
            listener.close()
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise SandboxError(
                what=f"port {self._wanted_port} of {HOST}",
                expected="a free port",
                found=reason,
                fix="Choose another port, or 0 for any free one",
            ) from error
        return listener

    def _configure(self) -> uvicorn.Config:
        certificate, key = self._tls or (None, None)
        config = uvicorn.Config(
            self._app,
            http=HttpProtocol,
            ws=websocket_protocol(),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=_MOST_MESSAGE_BYTES,
            ws_ping_interval=self._ping_interval_s,
            ws_ping_timeout=self._ping_interval_s,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise SandboxError(
                what="tls",
                expected="the paths of a certificate chain and its key in PEM",
                found=error.strerror or type(error).__name__,
                fix="Check both files",
            ) from error
        return config

    def _run(self, config: uvicorn.Config, listener: socket.socket) -> None:
        try:
            asyncio.run(self._serve(config, listener))
        except BaseException as error:  # noqa: BLE001 - raised by start(), or logged
            self._failure = error
            if self._started.is_set():
                _log.exception("The sandbox's server died")
        finally:
            listener.close()
            self._started.set()

    async def _serve(self, config: uvicorn.Config, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server = _Server(config, self._started.set)
        await server.serve(sockets=[listener])
        for connection in list(server.server_state.connections):
            # Who does not take its last bytes within the grace does not get them.
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a function in the server's loop, soon and in order; nothing happens when the loop has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)

    def run(self, coroutine: Any, timeout_s: float = 10.0) -> Any:
        """Run a coroutine in the server's loop and give its result."""
        if self._loop is None:
            coroutine.close()
            raise SandboxError(what="sandbox", expected="an open one", found="a closed one", fix="Open it first")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def stop(self) -> None:
        """Stop listening, close WebSockets with 1012, finish or cancel what is under way, and end the thread."""
        if self._thread is None:
            return
        server = self._server
        if server is not None:
            self.post(server.leave.set)
        self._thread.join(_GRACE_S + 4.0)
        if self._thread.is_alive():
            _log.error("The sandbox's server thread did not end in time")
        self._thread = None
        self._loop = None
