"""Watches: each takes a picture when made, and says later what was left behind since."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tests.support import network

REPOSITORY = Path(__file__).resolve().parents[2]
#: Threads and sockets may need a moment to end after their owner was closed, seconds.
PATIENCE_S = 2.0

#: Threads that libraries start once and keep, by the module of what they run. Ours are never among them.
_KEPT_THREADS = {
    "tqdm": "the monitor of progress bars, one for the process",
    "torch._inductor": "reads from the compiler's pool of processes, one for the process",
    "anyio": "idle workers of a server's event loop; the loop's own thread is watched like any other",
    "tensorflow": "the summary writer and the data service, one for the process",
}
#: Variables that tools set in passing: pytest for each phase, the others when a framework is first imported.
_PASSING_VARIABLES = (
    "PYTEST_",
    "TF_",
    "TF2_",
    "TPU_",
    "KMP_",
    "HDF5_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "PYTORCH_NVML_",
    "ENABLE_RUNTIME_UPTIME_TELEMETRY",
    "CUDA_MODULE_LOADING",
    # Lightning's seed_everything(), which the user's script calls.
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
)
#: Folders of tools, which come and go on their own.
_TOOL_FOLDERS = {".git", ".venv", ".tox", "__pycache__", "build", "dist"}
#: What people edit. A test does not write source, and a person may while tests run.
_EDITED = {".py", ".pyi", ".md", ".toml", ".ini", ".sh", ".txt"}


class Watch(Protocol):
    """A picture taken when made, to be compared later."""

    def complaints(self) -> list[str]:
        """Name what was left behind since, a line each."""
        ...


class Threads:
    """Watch for threads that outlive the test."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def complaints(self) -> list[str]:
        """Wait a moment for the new threads to end, and name those that do not."""
        new = self._new()
        if new:
            gc.collect()  # executors and loops that nobody closed end their threads when they are collected
        deadline = time.monotonic() + PATIENCE_S  # only now: collecting takes seconds where a framework is loaded
        for thread in new:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [f"thread {t.name!r} (runs {_runs(t)}) is still alive" for t in self._new()]

    def _new(self) -> list[threading.Thread]:
        dummy = getattr(threading, "_DummyThread")  # noqa: B009  # a foreign thread that once called Python; has no end
        return [
            thread
            for thread in threading.enumerate()
            if thread not in self._before
            and thread.is_alive()
            and not isinstance(thread, dummy)
            and not any((_runs(thread) + ".").startswith(kept + ".") for kept in _KEPT_THREADS)
        ]


def _runs(thread: threading.Thread) -> str:
    """Name the module whose code the thread runs."""
    target = getattr(thread, "_target", None)
    target = getattr(target, "func", target)
    return str(getattr(target, "__module__", None) or type(thread).__module__)


class Environment:
    """Watch for environment variables that were set, changed or removed; puts them back."""

    def __init__(self) -> None:
        self._before = dict(os.environ)

    def complaints(self) -> list[str]:
        """Name the variables that differ. Never their values, which may be secret."""
        names = sorted(
            name
            for name in {*self._before, *os.environ}
            if self._before.get(name) != os.environ.get(name) and not name.startswith(_PASSING_VARIABLES)
        )
        for name in names:
            if name in self._before:
                os.environ[name] = self._before[name]
            else:
                del os.environ[name]
        return [f"environment variable {name} was left changed" for name in names]


class Files:
    """Watch for files and folders left in the repository or the current folder, and for a changed current folder."""

    def __init__(self) -> None:
        self._folder = os.getcwd()
        self._before = self._listing()

    def complaints(self) -> list[str]:
        """Name what is new."""
        found = []
        if os.getcwd() != self._folder:
            found.append(f"the current folder was left changed to {os.getcwd()}")
            os.chdir(self._folder)
        new = self._new()
        if new:
            # Editors and version control write under a passing name first, next to the file; a leak stays.
            time.sleep(0.2)
            new &= self._new()
        return found + [f"left behind: {path}" for path in sorted(new)]

    def _new(self) -> set[str]:
        return {path for path in self._listing() - self._before if Path(path).suffix not in _EDITED}

    def _listing(self) -> set[str]:
        listing = set(_walk(str(REPOSITORY)))
        if not (Path(self._folder) == REPOSITORY or REPOSITORY in Path(self._folder).parents):
            listing.update(entry.path for entry in os.scandir(self._folder))
        return listing


def _walk(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in _TOOL_FOLDERS or entry.name.endswith(("_cache", ".egg-info")):
                continue
            if entry.name in (".hypothesis", ".coverage", ".venvs"):
                continue
            if entry.is_dir(follow_symlinks=False):
                # An empty folder is no source either; one that holds source is somebody's new package.
                content = list(_walk(entry.path))
                if not any(Path(path).suffix in _EDITED for path in content):
                    yield entry.path
                yield from content
            else:
                yield entry.path


class Sockets:
    """Watch for sockets that are still open, whoever holds them."""

    def __init__(self) -> None:
        self._before = _open_sockets()

    def complaints(self) -> list[str]:
        """Wait a moment for the new sockets to close, and describe those that do not."""
        deadline = time.monotonic() + PATIENCE_S
        new = _open_sockets() - self._before
        if new:
            gc.collect()
        while new and time.monotonic() < deadline:
            time.sleep(0.01)
            new = _open_sockets() - self._before
        return [f"socket left open: {_describe(inode)}" for inode in sorted(new)]


def _open_sockets() -> set[str]:
    """Give the inodes of this process's sockets (Linux; elsewhere nothing is watched)."""
    folder = "/proc/self/fd"
    found = set()
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        try:
            link = os.readlink(f"{folder}/{name}")
        except OSError:  # closed in between, like the one that lists this folder
            continue
        if link.startswith("socket:["):
            found.add(link[len("socket:[") : -1])
    return found


def _describe(inode: str) -> str:
    """Say to which ports a socket belongs, from the kernel's tables."""
    for table in ("tcp", "tcp6", "udp", "udp6"):
        try:
            rows = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for row in (line.split() for line in rows):
            if len(row) > 9 and row[9] == inode:
                local, remote = (int(end.rsplit(":", 1)[1], 16) for end in row[1:3])
                return f"{table} from port {local} to port {remote}"
    return "a Unix socket (an event loop that was not closed?)"


class Network:
    """Watch for attempts to leave this machine."""

    def __init__(self) -> None:
        self._before = len(network.attempts)

    def complaints(self) -> list[str]:
        """Name the attempts, also those whose refusal was caught by the code under test."""
        return [f"tried to leave this machine: {attempt}" for attempt in network.attempts[self._before :]]
