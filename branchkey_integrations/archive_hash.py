"""Hash an archive as it is written, in a thread that follows the writer through the file."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

#: Read back from the system's cache at a time.
_PIECE_BYTES = 256 * 1024
#: Given to the thread at a time, from this on; less would cost more calls than it gains.
_TURN_BYTES = 4 * 1024 * 1024


class Follower:
    """Hash what was written to a file, in order, while more is written behind it.

    Args:
        descriptor: of an open file; its bytes stay as they are once :meth:`reached` has named them.
        start: the first byte that counts.
    """

    def __init__(self, descriptor: int, start: int) -> None:
        self._descriptor = descriptor
        self._given = start
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "branchkey-hash")
        self._turns: list[Future[None]] = []

    def wants(self, end: int) -> bool:
        """Tell whether the file has grown enough by ``end`` to go on."""
        return end - self._given >= _TURN_BYTES

    def reached(self, end: int) -> None:
        """Say up to where the file is as it will stay, all of it handed to the system."""
        try:
            self._turns.append(self._pool.submit(self._hash, self._given, end))
        except RuntimeError:
            # The main thread has ended while another one goes on training: Python begins no threads from then on.
            self.digest()
            self._hash(self._given, end)
        self._given = end

    def digest(self) -> bytes:
        """Wait until all that was named is hashed; give the SHA-256.

        Raises:
            OSError: the file cannot be read back.
        """
        for turn in self._turns:
            turn.result()
        return self._sha256.digest()

    def close(self) -> None:
        """End the thread: it finishes the turn that it is at. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hash(self, at: int, end: int) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while at < end:
            count = os.preadv(self._descriptor, [buffer[: end - at]], at)
            if not count:
                raise OSError("the file lost what was written to it")
            self._sha256.update(buffer[:count])
            at += count


def can_follow(file: object) -> int | None:
    """Give the descriptor by which a thread can follow the writing of a file; None where it cannot."""
    # Wrappers may pass the descriptor on and the bytes not.
    if not hasattr(os, "preadv") or type(file) not in (io.BufferedRandom, io.FileIO):
        return None
    return int(cast(Any, file).fileno())
