"""Write layers as an NPZ archive in bounded memory, hashing it on the way, so that nothing need be read again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, Union, cast

import numpy as np

from branchkey_integrations import archive_npy, archive_zip, parts
from branchkey_integrations.archive_pack import Layer, ZipWriter
from branchkey_integrations.archive_values import ArchiveInfo, LayerHeader, LayerStream, check_weighting
from branchkey_integrations.archive_zip import DEFLATED, STORED
from branchkey_integrations.errors import ArchiveError, ConfigurationError
from branchkey_integrations.parallel import WORTH_BYTES, cores

Target = Union[str, "os.PathLike[str]", BinaryIO]


def write_archive(
    target: Target,
    arrays: Sequence[Layer],
    weighting: float | None = None,
    *,
    compression: Literal["deflate", "store"] = "deflate",
    finite: bool = False,
) -> ArchiveInfo:
    """Write ``arrays`` as ``layer_0``, ``layer_1`` and so on, and the weighting before them where there is one.

    Equal arrays give equal bytes (with the same version of the same deflate library). The arrays must not change meanwhile.
    Memory: some 3 MB, whatever the size of the layers.

    Args:
        target: a path, which holds the whole archive or what it held before; or a binary file, which is written from where
            it stands and left open. A file that can be read and sought, too, saves packing its large layers twice.
        arrays: one array of real numbers (float16, float32, float64, int, uint, bool) a layer, of any shape, order and
            strides; or a :class:`LayerStream`, which makes the layer as it is written.
        weighting: what an update carries; None writes the aggregate format, layers only.
        compression: ``"deflate"``, or ``"store"`` for fast local networks: no work, 8 % larger for float32.
        finite: also refuse NaN and infinity, at no extra pass; what ``validate_upload`` would refuse later.

    Returns:
        Size, digest, layers and weighting.

    Raises:
        ArchiveError: an array that cannot be a layer (named), an update without layers, or a target that cannot be written.
        WeightingError: see ``check_weighting``.
    """
    if compression not in ("deflate", "store"):
        raise ConfigurationError(
            what="compression", expected='"deflate" or "store"', found=repr(compression), fix='Leave it at "deflate"'
        )
    if weighting is not None:
        weighting = check_weighting(weighting)
    layers = _prepare(arrays, needed=weighting is not None)
    method = DEFLATED if compression == "deflate" else STORED
    name = os.fspath(target) if isinstance(target, (str, os.PathLike)) else "archive"
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(parts.replacing(name)) if isinstance(target, (str, os.PathLike)) else target
            writer = ZipWriter(file, method, beside=_worth_a_thread(layers))
            stack.callback(writer.close)
            if weighting is not None:
                writer.add("weighting", np.array([weighting], dtype="<f8"), finite=False)
            for index, layer in enumerate(layers):
                writer.add(f"layer_{index}", layer, finite=finite)
            size, sha256 = writer.finish()
    except OSError as error:
        raise ArchiveError(
            what=f"file {name}",
            expected="a place where the archive can be written",
            found=error.strerror or str(error),
            fix="Check the folder, the rights on it and the space left; no half file was left there",
        ) from error
    return ArchiveInfo(size, sha256, _headers(layers), weighting)


def _worth_a_thread(layers: Sequence[Layer]) -> bool:
    return cores() > 1 and sum(layer.nbytes for layer in layers) >= WORTH_BYTES


def _prepare(arrays: Iterable[Any], needed: bool) -> list[Layer]:
    if isinstance(arrays, (np.ndarray, str, bytes, Mapping)) or not isinstance(arrays, Iterable):
        # A bare array would be taken apart along its first axis.
        raise ArchiveError(
            what="layers",
            expected="a list of arrays",
            found=type(arrays).__name__,
            fix="Pass [array] for a single layer",
        )
    layers = [_as_layer(f"layer_{index}", value) for index, value in enumerate(arrays)]
    if needed and not layers:
        raise ArchiveError(
            what="update",
            expected="at least one layer",
            found="none",
            fix="Check that the model is built and trainable",
        )
    if len(layers) >= archive_zip.MAX_MEMBERS:
        expected = f"fewer than {archive_zip.MAX_MEMBERS} layers"
        raise ArchiveError(what="layers", expected=expected, found=str(len(layers)), fix="Send fewer, larger layers")
    return layers


def _headers(layers: Iterable[Layer]) -> tuple[LayerHeader, ...]:
    # Layers of one shape share one header: models of many layers have few shapes.
    known: dict[tuple[tuple[int, ...], np.dtype[Any]], LayerHeader] = {}
    headers = []
    for layer in layers:
        key = (layer.shape, layer.dtype.newbyteorder("="))
        headers.append(known.setdefault(key, LayerHeader(*key)))
    return tuple(headers)


def _as_layer(what: str, value: object) -> Layer:
    if not isinstance(value, np.ndarray) and hasattr(value, "pieces"):
        # Asking isinstance() of a protocol takes longer than packing a small layer.
        return cast(LayerStream, value)
    found, reason = "", None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, Warning) as error:  # ragged lists, tensors with a gradient or on a GPU
        found, reason = f"{type(value).__name__} ({error})", error
    else:
        if archive_npy.dtype_code(array.dtype) not in archive_npy.DTYPES:
            found = f"dtype {array.dtype}"
        elif array.ndim > archive_npy.MAX_AXES:
            found = f"{array.ndim} axes"
        else:
            return array
    raise ArchiveError(
        what=what,
        expected="an array of real numbers (float16, float32, float64, int, uint or bool)",
        found=found,
        fix="Convert it to a float32 numpy array before the upload",
    ) from reason
