"""Keep large arrays out of main memory while a round goes on: in temporary files that have no name."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections.abc import Sequence

import numpy as np

_log = logging.getLogger("branchkey_integrations.torch")

#: Arrays up to this size are not worth a file.
_SMALL_BYTES = 1024 * 1024


def scratch_array(shape: Sequence[int], dtype: np.dtype | str | type) -> np.ndarray:
    """Make an array, of no particular values, whose memory the system may write out to the disk.

    It lies in an unlinked file of the system's folder for temporary files, and is gone with the last reference to it. Where
    that folder has no room for it, and for small arrays, it lies in main memory.
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if size <= _SMALL_BYTES or not hasattr(os, "posix_fallocate"):
        return np.empty(shape, kind)
    try:
        with tempfile.TemporaryFile() as file:
            # Reserved, since a full disk would otherwise end the process at the first write that meets it.
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        _log.info("No room for %d bytes among temporary files (%s); they are kept in memory", size, error)
        return np.empty(shape, kind)
    return np.frombuffer(memory, kind).reshape(shape)
