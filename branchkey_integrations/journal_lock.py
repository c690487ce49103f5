"""See to it that one training at a time writes a journal: among processes by a lock of the system, within one by a list.

The lock is on a file of its own, beside the journal. A lock of the system (``fcntl``) is let go of when *any* handle of
its file is closed by the process, so that reading the journal in a notebook would end a lock on the journal itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TRIES = 20
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class Holder(Protocol):
    """Who holds a lock."""

    def hand_over(self) -> None:
        """Give way to a newer holder in this process."""
        ...


@dataclass(eq=False)
class _Held:
    name: str
    file: tuple[int, int]
    handle: int
    holder: weakref.ref[Holder]


_held: list[_Held] = []
#: To be taken twice by one thread: garbage is collected at any moment, and a journal may be among it.
_guard = threading.RLock()


class HeldElsewhereError(Exception):
    """Another process holds the lock."""


def alone() -> threading.RLock:
    """Give what keeps other threads from taking a lock, for a holder that is not ready to give way yet."""
    return _guard


def take(path: str, holder: Holder) -> bool:
    """Take the lock for ``holder``; who holds it in this process gives way, and the lock is never free in between.

    Returns:
        False where the file system has no locks: then only holders of this process are told apart.

    Raises:
        HeldElsewhereError: another process holds it.
        OSError: the file cannot be made.
    """
    with _guard:
        for _ in range(_TRIES):
            name, file = os.path.realpath(path), _file(path)
            for held in [each for each in _held if name == each.name or file == each.file]:
                former, held.holder, held.name = held.holder(), weakref.ref(holder), name
                if former is not None:
                    former.hand_over()
                if held.file == file and held in _held:
                    return True
                # Somebody took its file away, so that it keeps nobody out any more.
                _let_go(held)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                works = _lock(handle)
                made = os.fstat(handle)
            except BaseException:
                os.close(handle)
                raise
            if _file(path) == (made.st_dev, made.st_ino):
                _held.append(_Held(name, (made.st_dev, made.st_ino), handle, weakref.ref(holder)))
                return works
            # Who held it before took the file away between our opening and our locking it.
            os.close(handle)
        raise HeldElsewhereError


def release(path: str, holder: Holder, *, at_once: bool = False) -> None:
    """Let go of the lock and take its file away, unless a newer holder has it. May be repeated.

    Args:
        at_once: do so only if no other thread is about to take or release a lock; who takes this one next tidies up.
    """
    if not _guard.acquire(blocking=not at_once):
        return
    try:
        name = os.path.realpath(path)
        for held in [each for each in _held if name == each.name and each.holder() in (holder, None)]:
            # First, so that who locks it next finds that it is not the file any more. Windows refuses while it is open.
            if held.file == _file(path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            _let_go(held)
    finally:
        _guard.release()


def _let_go(held: _Held) -> None:
    if held in _held:
        _held.remove(held)
        os.close(held.handle)


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            # Of the process, not of the file handle: a data loader's forked worker does not hold it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise HeldElsewhereError from error
        return False
    return True


def _forked() -> None:
    """Forget what a forked process found here: it is its parent's, which may also have been in the middle of a step."""
    global _guard
    _guard = threading.RLock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
