"""Files that appear under their name when they are whole, and what processes that were killed have left of others."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

#: A part that has not grown for so long is deleted where its lock is free: longer than any transfer stalls.
IDLE_S = 600.0
#: The same where files cannot be locked.
IDLE_WITHOUT_LOCKS_S = 86_400.0

_OURS = re.compile(r"\..{1,100}[.-][0-9a-f]{12,16}\.part", re.DOTALL)
_TRIES = 5


@contextlib.contextmanager
def replacing(path: str, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a new file beside ``path`` that takes its name at the end of the block, or goes away if that raises.

    A lock says that it is being written, and ends with the process, however that ends.

    Args:
        path: what it replaces; its folder exists.
        durable: hand the file to the disk before it takes the name.

    Raises:
        OSError: it cannot be written.
    """
    part, file = _new_part(path)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if os.name == "nt":
                file.close()  # where open files cannot be renamed, nor deleted by others
            # Else while it is locked: unlocked parts are anybody's to delete.
            os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(part)
        raise


def sweep(folder: str, *endings: str) -> None:
    """Delete the parts that nobody writes any more; those of living processes stay. What cannot be deleted stays, too.

    Args:
        folder: may be missing.
        endings: of other names that count as parts here.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            ours = _OURS.fullmatch(entry.name) or entry.name.endswith(endings)
            if ours and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _delete_if_left(entry.path)


def _new_part(path: str) -> tuple[str, BinaryIO]:
    folder, base = os.path.split(path)
    for _ in range(_TRIES):
        part = os.path.join(folder, f".{base[:64]}.{secrets.token_hex(8)}.part")
        # Mode "x" gives the rights that any new file here gets; tempfile would give none to the group.
        file = open(part, "x+b")  # noqa: SIM115 - replacing() closes it
        # Somebody who sweeps may have found it before it was locked.
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            return part, file
        file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


def _delete_if_left(path: str) -> None:
    with open(path, "r+b") as file:  # writeable, as some network file systems demand of who locks
        idle_s = time.time() - os.fstat(file.fileno()).st_mtime
        if idle_s <= IDLE_S:
            return
        free = _lock(file)
        if free or (free is None and idle_s > IDLE_WITHOUT_LOCKS_S):
            os.unlink(path)


def _lock(file: BinaryIO) -> bool | None:
    """Lock a file until it is closed; False if somebody else has, None where files cannot be locked."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return None
