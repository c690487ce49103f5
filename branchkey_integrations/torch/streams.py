"""Let a tensor be written to an archive, and read from one, piece by piece, without a second copy of the model.

A model is loaded in place in two passes over the archive. The first, which the gate has made or :func:`load_in_place`
makes, unpacks it to nothing and checks everything: lengths, CRC, shapes, types, ranges. The second unpacks straight into the
memory of the parameters. It can end in the middle for two reasons only. An interrupt: then the pass is made again before the
interrupt goes on, so that the model holds the aggregate and nothing else; the file, which has no name, is still as it was
checked. Or the disk fails under an open file, or the process is killed: a disk that does not give back what it gave a moment
ago leaves a :class:`MixedModelError`, which no setting turns into an outcome. Being able to put the old weights back would
take one more model of memory for that case alone; who wants it has it with ``Gate(max_metric_drop=...)`` or by writing a
list of arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import BranchKeyError, MixedModelError
from branchkey_integrations.parallel import over_layers
from branchkey_integrations.parameters import Layout
from branchkey_integrations.screening import screen

_log = logging.getLogger("branchkey_integrations.torch")

#: Fetched from an accelerator at a time; smaller pieces would wait for it more often than they move.
_DEVICE_BYTES = 4 * 1024 * 1024
#: So often is the second pass begun before a model is given up as mixed; each Ctrl-C may cost one.
_TRIES = 3


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
        LayoutError, ArchiveError: it does not fit, or is damaged; nothing was written.
        MixedModelError: the file could be read when it was checked, and not any more.
    """
    if archive.checked_for != layout:
        screen(archive, layout, finite=False)
    # Tensors that share memory are written in order, so that the last one wins as it does elsewhere.
    alone = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors)
    sizes = [header.nbytes for header in archive.headers]
    stopped: BaseException | None = None
    for _ in range(_TRIES):
        try:
            over_layers(sizes, lambda index: _fill(tensors[index], archive, index), alone=alone)
        except BaseException as error:  # noqa: BLE001  raised again below, once the model is whole
            # Signal handlers raise whatever they like, at any place: finish first, tell afterwards.
            stopped, alone = error, True
            _log.warning("Loading was stopped by %s; it is finished first", type(error).__name__)
            continue
        if stopped is not None and not isinstance(stopped, BranchKeyError):
            raise stopped
        return
    raise MixedModelError(
        what="model",
        expected="the aggregate in every layer",
        found="some layers of the aggregate and some of before: its file could not be read a second time",
        fix="Load a checkpoint, or collect the aggregate again; check the disk that holds temporary files",
    ) from stopped


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
