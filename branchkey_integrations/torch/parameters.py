"""Read a torch module's parameters into owned numpy arrays, and write arrays back in place, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.parameters import LayerSpec, Layout, Selection, Selector, headers_of
from branchkey_integrations.torch.names import (
    CanonicalNames,
    is_fully_sharded,
    persistent_buffers,
    unwrap,
    wrapped_child,
)
from branchkey_integrations.torch.streams import TensorLayer, live_layer, load_in_place

#: Types that numpy lacks; float32 holds each of their values exactly.
_WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_NUMPY_TYPES = (
    *("float16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


class TorchParameters:
    """Offer the federated parameters of a live module as layers (a ``ParameterStore``).

    The module is looked at anew in each call, through any DDP, DataParallel, ``torch.compile`` and activation-checkpoint
    wrapper, so the layout is the same with and without them. Layers come in the order of ``named_parameters()``: frozen
    parameters included, tied weights once, and integer parameters as they are.

    Args:
        module: the model, wrapped or not.
        parameters: ``"all"``, ``"trainable"``, glob patterns on canonical names, or ``f(name, tensor) -> bool``.
        buffers: also floating-point buffers (BatchNorm statistics), after the parameters. Patterns and functions choose
            among them too; ``"trainable"`` keeps them all. Integer and complex buffers and those registered with
            ``persistent=False`` always stay at home.

    Raises:
        ConfigurationError: ``module`` is no torch module, or is a Keras model; the selection is malformed.
    """

    def __init__(self, module: nn.Module, *, parameters: Selection = "all", buffers: bool = False) -> None:
        _check_module(module)
        if not isinstance(buffers, bool):
            raise ConfigurationError(
                what="buffers", expected="True or False", found=repr(buffers), fix="Pass buffers=True or leave it out"
            )
        self._module = module
        self._selector = Selector(parameters)
        self._buffers = buffers

    @property
    def is_lazy(self) -> bool:
        """Tell whether a selected parameter has no shape yet because the module has not seen data (``LazyLinear``)."""
        return any(is_lazy(tensor) for _, tensor in self._select())

    def layout(self) -> Layout:
        """Describe the selected parameters in order.

        Raises:
            ConfigurationError: nothing is selected.
            LayoutError: a selected tensor cannot be a layer (lazy, meta, sharded, sparse, quantised, complex…).
        """
        return _layout(self._select())

    def tensors(self) -> list[Tensor]:
        """Give the live tensors behind the layers, in layout order, whether they can be layers now or not."""
        return [tensor for _, tensor in self._select()]

    def read(self) -> list[np.ndarray]:
        """Copy the selected parameters into C-ordered arrays that own their memory.

        bfloat16 and float8 come as float32, exactly; every other type as it is. Needs the size of the model in memory.

        Raises:
            ConfigurationError, LayoutError: as :meth:`layout`.
        """
        selected = self._select()
        arrays = []
        for spec, (_, tensor) in zip(_layout(selected), selected):
            array = np.empty(spec.shape, numpy_type(tensor.dtype))
            with torch.no_grad():
                torch.from_numpy(array).copy_(tensor)
            arrays.append(array)
        return arrays

    def view(self) -> list[np.ndarray | TensorLayer]:
        """Give the selected parameters as :meth:`read` does, but without a copy: live, and read while they are written.

        They must not change until whoever got them is done.

        Raises:
            ConfigurationError, LayoutError: as :meth:`layout`.
        """
        selected = self._select()
        _layout(selected)
        return [live_layer(tensor, numpy_type(tensor.dtype)) for _, tensor in selected]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy ``arrays`` into the parameters in place: all of them, or none and an error.

        Storage, device, dtype, strides, ``requires_grad`` and the optimizer's references stay. Everything is decoded,
        checked and converted in main memory before the first parameter is touched, which needs the size of the model
        once more; a failure after that, an interrupt included, is undone before it is raised. An archive that nobody else
        can change (the client's) is checked and then unpacked in place, in a megabyte; an interrupt waits until it is in.

        Args:
            arrays: one numpy array a layer, of the layer's shape; any real type and byte order for a floating layer,
                whole numbers that fit for an integer one. May be lazy; each item is taken once if it has ``headers``,
                else twice.

        Raises:
            LayoutError: count, shape, dtype or range does not fit.
            ConfigurationError: as :meth:`layout`.
            MixedModelError: disk or memory failed while an archive was put in place.
        """
        selected = self._select()
        layout = _layout(selected)
        if isinstance(arrays, Archive) and arrays.private:
            load_in_place(layout, [tensor for _, tensor in selected], arrays)
            return
        layout.check_headers(headers_of(arrays))
        staged = [stage(layout, index, tensor, arrays[index]) for index, (_, tensor) in enumerate(selected)]
        _commit([tensor for _, tensor in selected], staged)

    def _select(self) -> list[tuple[str, Tensor]]:
        canonical = CanonicalNames(self._module)
        chosen: list[tuple[str, Tensor]] = []
        names = []
        for raw, parameter in self._module.named_parameters():
            name = canonical(raw)
            names.append(name)
            if self._selector(name, parameter, parameter.requires_grad):
                chosen.append((name, parameter))
        if self._buffers:
            for raw, buffer in persistent_buffers(self._module):
                name = canonical(raw)
                if buffer.is_floating_point() and self._selector(name, buffer, trainable=True):
                    chosen.append((name, buffer))
        self._selector.require_some(len(chosen), names)
        _check_gathered(self._module)
        return chosen


def _check_module(module: object) -> None:
    inner = unwrap(module) if isinstance(module, nn.Module) else module
    if any(cls.__module__.split(".")[0] in ("keras", "tf_keras") for cls in type(inner).__mro__):
        # On its torch backend a Keras model is a torch module, but one that lists its weights in another order.
        raise ConfigurationError(
            what="model",
            expected="a torch module",
            found=f"the Keras model {type(inner).__name__}",
            fix="Use BranchKeyCallback or KerasParameters from branchkey_integrations.keras",
        )
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            what="model",
            expected="a torch.nn.Module",
            found=type(module).__name__,
            fix="Pass the model itself, wrapped by DDP or torch.compile or not",
        )


def _check_gathered(root: nn.Module) -> None:
    """Refuse a fully sharded module whose parameters are shards just now."""
    for path, module in root.named_modules():
        if is_fully_sharded(module):
            # Even where they lie there whole for a while: nothing that is written into them then would last.
            raise LayoutError(
                what=f"model{f' ({path})' if path else ''}",
                expected="whole parameters",
                found="a module under fully_shard, of which each rank holds a shard",
                fix="Give the model to BranchKeyHook, which puts layers together one by one",
            )
        if wrapped_child(module) != "_fsdp_wrapped_module":
            continue
        state = getattr(module, "training_state", None)
        if getattr(state, "name", "") != "SUMMON_FULL_PARAMS":
            raise LayoutError(
                what=f"model{f' ({path})' if path else ''}",
                expected="whole parameters",
                found="FullyShardedDataParallel, which holds a shard of each",
                fix="Give the model to BranchKeyHook, or call inside "
                "FullyShardedDataParallel.summon_full_params(model, writeback=True)",
            )


def _obstacle(tensor: Tensor) -> tuple[str, str] | None:
    """Say what keeps ``tensor`` from being a layer, and what to do about it."""
    dtype = str(tensor.dtype).split(".")[-1]
    leave_out = "Leave it out with the parameters option"
    if is_lazy(tensor):
        return "no shape yet (lazy)", "Run one batch through the model first"
    if tensor.is_meta:
        return "no values (device meta)", "Materialise the model first, with to_empty() and its own initialisation"
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"a {type(tensor).__name__}, whose values are kept in parts", leave_out
    if tensor.is_quantized:
        return f"quantised {dtype}", leave_out
    if tensor.is_complex():
        return f"complex {dtype}", "Keep real and imaginary part as two parameters, or leave it out"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"layout {str(tensor.layout).split('.')[-1]}", leave_out
    if dtype not in _NUMPY_TYPES and dtype not in _WIDENED:
        return f"dtype {dtype}", leave_out
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape)):
        return "elements that share one place in memory (expanded)", "Give the parameter its own memory with clone()"
    return None


def _layout(selected: Sequence[tuple[str, Tensor]]) -> Layout:
    return Layout(tuple(describe(name, tensor) for name, tensor in selected))


def describe(name: str, tensor: Tensor) -> LayerSpec:
    """Describe ``tensor`` as a layer.

    Raises:
        LayoutError: it cannot be one.
    """
    obstacle = _obstacle(tensor)
    if obstacle is not None:
        found, fix = obstacle
        raise LayoutError(what=name, expected="a dense tensor of real numbers", found=found, fix=fix)
    return LayerSpec(name, tuple(tensor.shape), str(tensor.dtype).split(".")[-1])


def numpy_type(dtype: torch.dtype) -> np.dtype:
    """Give the type of array that holds every value of ``dtype``."""
    name = str(dtype).split(".")[-1]
    return np.dtype(np.float32 if name in _WIDENED else name)


def stage(layout: Layout, index: int, tensor: Tensor, array: np.ndarray) -> Tensor:
    """Decode and convert one layer into a new tensor in main memory, of the parameter's dtype and, if dense, strides.

    Raises:
        LayoutError: ``array`` is not what its header said, or holds a value that the parameter cannot.
    """
    spec = layout.layers[index]
    # A lazy sequence decodes here; what comes out is held to its header, because copyto would broadcast.
    if array.shape != spec.shape or array.dtype.kind not in ("fiub" if spec.is_float else "iub"):
        raise LayoutError(
            what=f"layer_{index} ({spec.name})",
            expected=f"{spec.dtype}{list(spec.shape)}",
            found=f"{array.dtype}{list(array.shape)} when decoded",
            fix="The archive contradicts itself; nothing was loaded",
        )
    layout.check_range(index, array)
    staged = torch.empty_like(tensor.detach(), device="cpu", requires_grad=False)
    widened = spec.dtype in _WIDENED
    native = torch.empty(spec.shape, dtype=torch.float32) if widened else staged
    with np.errstate(all="ignore"):  # losing digits is what a narrower type means, whatever np.seterr() was told
        # Type, byte order and strides in one go, with one rounding.
        np.copyto(native.numpy(), array, casting="unsafe")
    if widened:
        staged.copy_(native)
    return staged


def _commit(tensors: Sequence[Tensor], staged: list[Tensor]) -> None:
    """Copy ``staged`` into ``tensors``; on any failure put back what was there.

    Uses up ``staged``: each entry becomes the old value, so that undoing costs one more copy but no more memory.
    """
    done = 0
    try:
        for index, tensor in enumerate(tensors):
            previous = tensor.detach().to("cpu", copy=True)
            values, staged[index] = staged[index], previous
            done = index + 1
            _copy(tensor, values)
    except BaseException:
        # An interrupt (Ctrl-C) may fall between two layers as well as an error into one.
        for tensor, previous in zip(tensors[:done], staged[:done]):
            _copy(tensor, previous)
        raise


def _copy(target: Tensor, source: Tensor) -> None:
    # A tensor made in inference mode can be changed in inference mode only; no_grad comes last, since leaving
    # inference mode switches gradients on.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(source)
