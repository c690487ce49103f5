"""A platform of sockets and nothing else: takes uploads, hands out aggregates, at the speed of a link. Needs no package.

It does as little as it can, so that what is measured is the leaf; the speed limit is kept here, in both directions.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

_PIECE = 1 << 20
_STEP_S = 0.005


class Sink:
    """Serve one run on a loopback port.

    ``rate`` is in bits a second and counts for bodies in each direction by itself; 0 is no limit.
    """

    def __init__(self) -> None:
        self.rate = 0
        self.keep: str | None = None
        self.objects: dict[str, str] = {}
        self.uploaded: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def serve(self) -> None:
        """Answer until the process ends or ``close`` is called."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _talk(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(ConnectionError):
            rest = b""
            while True:
                while b"\r\n\r\n" not in rest:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    rest += piece
                head, _, rest = rest.partition(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, path, _ = first.split(" ")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                length = int(headers.get("content-length", 0))
                rest = self._answer(connection, method, path, length, rest)

    def _answer(self, connection: socket.socket, method: str, path: str, length: int, rest: bytes) -> bytes:
        if path == "/api/v1/file/upload":
            self._take(connection, length, rest)
            _reply(connection, 201, {"data": {"file_id": f"file-{len(self.uploaded)}"}})
            return b""
        while len(rest) < length:
            rest += connection.recv(65536)
        body, rest = rest[:length], rest[length:]
        name = path.rsplit("/", 1)[-1]
        if path == "/control":
            self._control(json.loads(body))
            _reply(connection, 200, {"uploaded": self.uploaded})
        elif path.startswith("/api/v1/run/"):
            _reply(connection, 200, {"data": {"run_status": "start", "run_number": 1}})
        elif path.startswith("/api/v1/file/download/"):
            _reply(connection, 200, {"data": {"download_url": f"http://127.0.0.1:{self.port}/objects/{name}"}})
        elif path.startswith("/objects/") and method == "GET" and name.split("-")[0] in self.objects:
            # Each round's aggregate has an id of its own, such as stored-17; a leaf drops repeats.
            self._give(connection, self.objects[name.split("-")[0]])
        else:
            _reply(connection, 404, {"error": f"nothing at {path}"})
        return rest

    def _control(self, wanted: dict[str, Any]) -> None:
        self.rate = wanted.get("rate", self.rate)
        self.keep = wanted.get("keep", self.keep)
        self.objects.update(wanted.get("objects", {}))

    def _take(self, connection: socket.socket, length: int, rest: bytes) -> None:
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(open(self.keep, "wb")) if self.keep else None
            if kept:
                kept.write(rest)
            buffer = memoryview(bytearray(_PIECE))
            left = length - len(rest)
            for allowed in paces(self.rate, left):
                # Whatever was announced must come: a short upload would look like a fast one.
                done = 0
                while done < allowed:
                    count = connection.recv_into(buffer, min(allowed - done, _PIECE))
                    if not count:
                        raise ConnectionError("the leaf hung up")
                    if kept:
                        kept.write(buffer[:count])
                    done += count
        self.uploaded.append(length)

    def _give(self, connection: socket.socket, path: str) -> None:
        size = os.path.getsize(path)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        with open(path, "rb") as file:
            at = 0
            for allowed in paces(self.rate, size):
                end = at + allowed
                while at < end:
                    at += os.sendfile(connection.fileno(), file.fileno(), at, end - at)


def paces(rate: int, size: int, clock: Any = time.monotonic, sleep: Any = time.sleep) -> Iterator[int]:
    """Say how many bytes may go now, as often as it takes to move ``size``; ends when a link of ``rate`` bit/s would have."""
    if not rate:
        if size:
            yield size
        return
    started = clock()
    step = max(int(rate / 8 * _STEP_S), 1)
    done = 0
    while done < size:
        count = min(step, size - done)
        yield count
        done += count
        ahead = done * 8 / rate - (clock() - started)
        if ahead > 0:
            sleep(ahead)


def _reply(connection: socket.socket, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} Told\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


if __name__ == "__main__":
    sink = Sink()
    print(sink.port, flush=True)
    threading.Thread(target=sink.serve, daemon=True).start()
    sys.stdin.read()  # ends with the process that started this one
