"""A TLS socket that one thread may read while another writes.

Before Python 3.13 nothing keeps ``SSL_read`` and ``SSL_write`` of one connection apart, and OpenSSL allows only one of them
at a time. A WebSocket is read by a thread of its own, and right after a TLS 1.3 handshake that thread takes in the server's
session tickets just while the upgrade request is written: about one connection in a hundred then hung (measured on 3.9 and
3.11 over loopback; none with this class).
"""

from __future__ import annotations

import functools
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class SharedTLSSocket(ssl.SSLSocket):
    """Take turns between reading and writing, and wait for the other side outside of the turn.

    Set it as a context's ``sslsocket_class``. Turns are taken from the end of the handshake on.
    """

    _turn: threading.Lock | None = None
    _patience_s: float | None = None

    def do_handshake(self, block: bool = False) -> None:
        """Make the handshake as usual; from then on several threads may use the socket."""
        super().do_handshake(block)
        self._patience_s = super().gettimeout()
        super().settimeout(0.0)
        self._turn = threading.Lock()

    def settimeout(self, value: float | None) -> None:
        """Set how long a call may wait, in seconds; None waits for ever."""
        if self._turn is None:
            super().settimeout(value)
        else:
            self._patience_s = value

    def gettimeout(self) -> float | None:
        """Give how long a call may wait, in seconds."""
        return super().gettimeout() if self._turn is None else self._patience_s

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Read at most ``buflen`` bytes; none at the end of the stream."""
        if self._turn is None:
            return super().recv(buflen, flags)
        return self._in_turn(lambda: ssl.SSLSocket.recv(self, buflen, flags), reading=True)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all of ``data``."""
        if self._turn is None:
            super().sendall(data, flags)
            return
        with memoryview(data) as view, view.cast("B") as rest:
            sent = 0
            while sent < len(rest):
                piece = rest[sent : sent + 64 * 1024]
                sent += self._in_turn(functools.partial(ssl.SSLSocket.send, self, piece, flags), reading=False)

    def _in_turn(self, act: Callable[[], Result], *, reading: bool) -> Result:
        deadline = None if self._patience_s is None else time.monotonic() + self._patience_s
        turn = self._turn
        if turn is None:
            return act()
        while True:
            awaits_input = reading
            with turn:
                try:
                    return act()
                except ssl.SSLWantReadError:
                    awaits_input = True
                except ssl.SSLWantWriteError:
                    awaits_input = False
                except BlockingIOError:
                    # After a shutdown of one half Python reads and writes past TLS.
                    pass
            self._await(awaits_input, deadline)

    def _await(self, reading: bool, deadline: float | None) -> None:
        descriptor = self.fileno()
        if descriptor < 0:
            raise OSError("the socket was closed")
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise socket.timeout("timed out")
        poller = select.poll()
        poller.register(descriptor, select.POLLIN if reading else select.POLLOUT)
        # A close in another thread does not end poll(), and shutting down does: this is for sockets that are only closed.
        poller.poll(1000 if left is None else min(1000.0, left * 1000))
