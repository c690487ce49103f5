"""Processes that end with their owner, whatever ends it, and leave nothing on disk."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

_STOP_S = 20.0
#: Run as ``python -c``: asks the kernel to end this process with its parent, keeps Ctrl-C away from it (the owner stops it
#: in good order) and becomes the given command. Doing so between fork and exec of a threaded parent could deadlock.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
signal.signal(signal.SIGINT, signal.SIG_IGN)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
#: Waits for the end of its owner, which closes the pipe, then for the process whose id stands in the file ``node.pid``
#: (20 seconds at most), and removes the folder.
_SWEEPER = """
trap "" INT TERM HUP
cat >/dev/null
[ -d "$1" ] || exit 0
pid=$(cat "$1/node.pid" 2>/dev/null)
tries=0
while [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; do
  tries=$((tries + 1))
  [ $tries -gt 200 ] && kill -9 "$pid"
  sleep 0.1
done
rm -rf -- "$1"
"""


class Keeper:
    """Start processes from one thread that lives as long as they do.

    The kernel ties "end with the parent" to the thread that started a process, not to the whole program.
    """

    def __init__(self) -> None:
        self._orders: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def launch(self, command: list[str], environment: Mapping[str, str], output: int | None) -> subprocess.Popen[bytes]:
        """Start ``command`` (an absolute path and arguments) so that it ends with this program.

        Args:
            output: file descriptor for what it prints; None drops it.
        """
        result: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()

        def start() -> None:
            try:
                result.put(
                    subprocess.Popen(  # noqa: S603 - commands of this package, no shell
                        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command],
                        env=dict(environment),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL if output is None else output,
                        stderr=subprocess.STDOUT,
                    )
                )
            except OSError as error:
                result.put(error)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="branchkey-keeper", daemon=True)
            self._thread.start()
        self._orders.put(start)
        started = result.get()
        if isinstance(started, OSError):
            raise started
        return started

    def stop(self) -> None:
        """End the thread; its processes must have been ended before."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._orders.put(None)
            thread.join()

    def _work(self) -> None:
        for order in iter(self._orders.get, None):
            order()


class Sweeper:
    """Remove a folder when this program ends without having done so."""

    def __init__(self, folder: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - a script of ours; the folder is an argument, not part of it
            ["/bin/sh", "-c", _SWEEPER, "sweeper", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def dismiss(self) -> None:
        """End it; the folder must be gone by now, or it is removed."""
        # communicate() closes the pipe, and that is the word it waits for.
        self._process.communicate()


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """Send a signal and wait; after 20 seconds SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Find ports on loopback that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def answers(port: int, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until a port on loopback takes connections; False when its process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.02)
    return False


def write(path: str, text: str) -> None:
    """Write a file that only its owner can read; it may hold passwords."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
