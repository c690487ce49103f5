"""What this machine can do at most in each step of a round: the limits that the figures of a run are read against."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import models
from branchkey_integrations import deflate

_SIZE = 64 * 1024 * 1024
_FEED = 128 * 1024


def measured() -> dict[str, float]:
    """Give megabytes a second of one core, by what was done; the best of three tries each."""
    values = models.layer((_SIZE // 4,), 1, "float32")
    raw = memoryview(values.view(np.uint8).data)
    packed = zlib.compress(raw[: _SIZE // 8], 6)
    target = np.empty_like(values)
    target.fill(0)
    found = {
        "memory copy": _rate(_SIZE, lambda: np.copyto(target, values)),
        "memory copy into fresh pages": _rate(_SIZE, lambda: values.copy()),
        "all finite": _rate(_SIZE, lambda: _feed(raw, lambda piece: np.isfinite(np.frombuffer(piece, "f4")).all())),
        "SHA-256": _rate(_SIZE, lambda: hashlib.sha256(raw)),
        f"CRC-32 ({deflate.backend()})": _rate(_SIZE, lambda: _feed(raw, deflate.crc32)),
        f"deflate ({deflate.backend()})": _rate(_SIZE, lambda: _deflate(raw)),
        "deflate (zlib, level 6)": _rate(_SIZE // 8, lambda: zlib.compress(raw[: _SIZE // 8], 6), tries=1),
        f"inflate ({deflate.backend()})": _rate(_SIZE // 8, lambda: _inflate(packed)),
        "inflate (zlib)": _rate(_SIZE // 8, lambda: zlib.decompress(packed)),
    }
    with tempfile.TemporaryFile(buffering=0) as file:
        found["file write"] = _rate(_SIZE, lambda: (file.seek(0), file.truncate(), _all(file.write, raw)))
        found["file read"] = _rate(_SIZE, lambda: (file.seek(0), file.readinto(target)))
    found["loopback TCP"] = _rate(_SIZE, lambda: _loopback(raw))
    return found


def machine() -> str:
    """Describe the machine in a line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    try:
        load = "load {:.1f} {:.1f} {:.1f}".format(*os.getloadavg())
    except OSError:
        load = "load unknown"
    return (
        f"{name}, {os.cpu_count()} cores, {load}; {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, deflate by {deflate.backend()}"
    )


def _rate(size: int, action: Callable[[], Any], tries: int = 3) -> float:
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return size / best / 1e6


def _feed(raw: memoryview, action: Callable[[memoryview], Any]) -> None:
    for start in range(0, len(raw), _FEED):
        action(raw[start : start + _FEED])


def _all(write: Callable[[memoryview], int], raw: memoryview) -> None:
    while len(raw):
        raw = raw[write(raw) :]


def _deflate(raw: memoryview) -> None:
    packer = deflate.compressor(raw[:_FEED])
    _feed(raw, packer.compress)
    packer.flush()


def _inflate(packed: bytes) -> None:
    stream = deflate.decompressor()
    tail = packed[2:]  # without zlib's own two bytes in front
    while not stream.eof:
        stream.decompress(tail, 256 * 1024)
        tail = stream.unconsumed_tail


def _loopback(raw: memoryview) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_drain, args=(server, len(raw)))
        thread.start()
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(raw)
            thread.join()


def _drain(server: socket.socket, size: int) -> None:
    connection, _ = server.accept()
    buffer = bytearray(1 << 20)
    with connection:
        while size > 0:
            count = connection.recv_into(buffer)
            if not count:
                return
            size -= count
