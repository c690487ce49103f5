"""Let a tensor be written to an archive, and read from one, piece by piece, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from branchkey_integrations import in_place
from branchkey_integrations.archive import Archive
from branchkey_integrations.parameters import Layout

#: Fetched from an accelerator at a time; smaller pieces would wait for it more often than they move.
_DEVICE_BYTES = 4 * 1024 * 1024


class TensorLayer:
    """Give a live tensor's values piece by piece, from its device and widened as they go (a ``LayerStream``).

    Args:
        tensor: must not change until the pieces are used up.
        dtype: what numpy calls the type of the pieces.
    """

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any]) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = np.dtype(dtype)
        self.nbytes = tensor.numel() * self.dtype.itemsize
        self._tensor = tensor.detach()

    def pieces(self, items: int) -> Iterator[np.ndarray]:
        """Give the values in C order as flat arrays of at most ``items``."""
        flat = self._tensor.reshape(-1)  # a copy on the tensor's own device where it is not contiguous: of one layer
        wanted = torch.from_numpy(np.empty(0, self.dtype)).dtype
        block = items if flat.device.type == "cpu" else max(items, _DEVICE_BYTES // flat.element_size())
        for start in range(0, flat.numel(), block):
            values = flat[start : start + block].to(device="cpu", dtype=wanted).numpy()
            yield from (values[at : at + items] for at in range(0, len(values), items))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give all values as an array of their own."""
        del copy  # it is one in any case
        parts = list(self.pieces(max(self._tensor.numel(), 1)))
        whole = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return whole.reshape(self.shape).astype(self.dtype if dtype is None else dtype)


def live_layer(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray | TensorLayer:
    """Give a tensor as a layer that holds no values of its own: a view of its memory where numpy can have one."""
    if tensor.device.type == "cpu" and str(tensor.dtype).split(".")[-1] == dtype.name:
        view: np.ndarray = tensor.detach().numpy()
        return view
    return TensorLayer(tensor, dtype)


def load_in_place(layout: Layout, tensors: Sequence[Tensor], archive: Archive) -> None:
    """Unpack an archive that nobody else can change into ``tensors``, in the memory of a few pieces.

    Args:
        layout: of the tensors.
        tensors: dense; memory, strides, types and devices stay. A layer that is neither contiguous here nor in C order in
            the archive takes its own size once.
        archive: private. Checked here unless it was, for this very layout.

    Raises:
        BranchKeyError: as :func:`branchkey_integrations.in_place.load_in_place`.
    """
    # Tensors that share memory are written in order, so that the last one wins as it does elsewhere.
    alone = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors)
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        # The threads copy on streams of their own; what training has queued on this one must not land behind them.
        torch.cuda.current_stream(device).synchronize()
    in_place.load_in_place(layout, archive, lambda index: _fill(tensors[index], archive, index), alone=alone)


def _fill(tensor: Tensor, archive: Archive, index: int) -> None:
    target = tensor.detach()
    header = archive.headers[index]
    kind = str(tensor.dtype).split(".")[-1]
    # A tensor made in inference mode can be changed in inference mode only; no_grad comes last, since leaving
    # inference mode switches gradients on. Both are matters of each thread.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad(), np.errstate(all="ignore"):
        if not (target.is_contiguous() and archive.in_c_order(index)):
            target.copy_(_convertible(archive[index], kind))
            return
        flat = target.view(-1)
        if target.device.type == "cpu" and kind == header.dtype.name:
            archive.read_into(index, target.numpy())
            _tell_autograd(tensor)
            return
        start = 0
        for piece in archive.pieces(index):
            # copy_ is done with the piece when it returns: from ordinary memory it does not run ahead.
            flat[start : start + piece.size].copy_(_convertible(piece, kind))
            start += piece.size


def _convertible(values: np.ndarray, kind: str) -> Tensor:
    """Give values as a tensor that ``copy_`` takes to ``kind`` with the rounding that numpy has."""
    native = "float32" if kind.startswith(("bfloat16", "float8")) else kind
    return torch.from_numpy(np.asarray(values, dtype=native))


def _tell_autograd(tensor: Tensor) -> None:
    """Count the change, as an operation of torch would: a graph that still needs the old values must not be run backward."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
