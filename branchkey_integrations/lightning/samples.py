"""Count the samples of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def count_samples(batch: Any) -> int | None:
    """Give the number of samples in ``batch``: the length of the first tensor or array found in it.

    Looks into mappings, sequences and dataclasses, in order. A sequence of texts counts its items; a scalar tensor is one
    sample. None: there is nothing to count by.
    """
    if isinstance(batch, Tensor) or (hasattr(batch, "shape") and hasattr(batch, "dtype")):
        return int(batch.shape[0]) if len(batch.shape) else 1
    if isinstance(batch, Mapping):
        return _first(batch.values())
    if isinstance(batch, (list, tuple)):
        found = _first(batch)
        if found is None and batch and all(isinstance(item, (str, bytes, int, float)) for item in batch):
            return len(batch)
        return found
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _first(getattr(batch, field.name) for field in dataclasses.fields(batch))
    size = getattr(batch, "batch_size", None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _first(parts: Any) -> int | None:
    for part in parts:
        found = count_samples(part)
        if found is not None:
            return found
    return None
