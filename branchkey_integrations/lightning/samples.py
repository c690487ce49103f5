"""Count the samples of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def count_samples(batch: Any) -> int | None:
    """Give the number of samples in ``batch``: the length of the first tensor or array in it that has one.

    Looks into mappings, sequences, dataclasses and plain objects, in order. A sequence of texts counts its items, a packed
    sequence its sequences, a batch of graphs its graphs; where there are scalar tensors only, it is one sample. None: there
    is nothing to count by.
    """
    if type(batch) in (list, tuple) and batch and type(batch[0]) is Tensor and batch[0].dim():
        # What most loaders give, first, since this is asked for every batch.
        return int(batch[0].size(0))
    found, scalar = _look(batch)
    return found if found is not None else 1 if scalar else None


def count_in_each(loaders: Any, batch: Any) -> int | None:
    """Give the samples of a batch that was put together from one batch of each of ``loaders``: the sum of them.

    Args:
        loaders: a data loader, or mappings and sequences of them, as the Trainer holds them (``trainer.train_dataloader``).
        batch: built alike; None stands where a loader has run out.
    """
    if isinstance(loaders, Mapping) and isinstance(batch, Mapping):
        pairs = [(loaders[name], batch[name]) for name in loaders if name in batch]
    elif isinstance(loaders, (list, tuple)) and isinstance(batch, Sequence) and len(loaders) == len(batch):
        pairs = list(zip(loaders, batch))
    else:
        return count_samples(batch)
    found = [0 if part is None else count_in_each(loader, part) for loader, part in pairs]
    counts = [count for count in found if count is not None]
    return sum(counts) if len(counts) == len(found) else None


def _look(batch: Any) -> tuple[int | None, bool]:
    """Give a number of samples if there is one, and whether there was a scalar."""
    if isinstance(batch, Tensor):
        return (int(batch.size(0)), False) if batch.dim() else (None, True)
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0]), False
    if hasattr(batch, "shape") and hasattr(batch, "dtype"):
        return (int(batch.shape[0]), False) if len(batch.shape) else (None, True)
    if isinstance(batch, Mapping):
        return _first(batch.values())
    if isinstance(batch, (list, tuple)):
        found, scalar = _first(batch)
        if found is None and not scalar and batch and all(isinstance(item, (str, bytes, int, float)) for item in batch):
            return len(batch), False
        return found, scalar
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size, False
    if isinstance(batch, type):
        return None, False
    if dataclasses.is_dataclass(batch):
        return _first(getattr(batch, field.name) for field in dataclasses.fields(batch))
    return _first(vars(batch).values()) if hasattr(batch, "__dict__") else (None, False)


def _first(parts: Iterable[Any]) -> tuple[int | None, bool]:
    scalars = False
    for part in parts:
        found, scalar = _look(part)
        if found is not None:
            return found, False
        scalars = scalars or scalar
    return None, scalars
