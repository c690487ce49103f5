"""Read a Keras model's weights into owned numpy arrays, and assign arrays to them, all or nothing, on any backend."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from branchkey_integrations.archive import Archive
from branchkey_integrations.errors import ConfigurationError, LayoutError
from branchkey_integrations.in_place import load_in_place
from branchkey_integrations.parameters import LayerSpec, Layout, Selection, Selector, headers_of

#: Types that numpy lacks; float32 holds each of their values exactly.
_WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
#: The name that Keras gives to a weight without one counts all such weights of the process.
_UNNAMED = re.compile(r"^variable(_\d+)?$")


class KerasParameters:
    """Offer the federated weights of a live Keras 3 model as layers (a ``ParameterStore``).

    The model is looked at anew in each call. Layers come in the order of ``model.trainable_weights``. A layer is named by
    its position there and the weight's own name (``0/kernel``), because ``variable.path`` counts the models of a process
    and differs between leaves and after a resume.

    Args:
        model: a built ``keras.Model``.
        parameters: ``"all"`` or ``"trainable"`` (both: every trainable weight), glob patterns on ``variable.path`` (give
            your layers names), or ``f(path, variable) -> bool``.
        buffers: also floating-point weights that no layer ever trains (BatchNorm's moving statistics), after the
            trainable ones. Patterns and functions choose among them too. Frozen weights, seeds, metrics and the
            optimizer's variables always stay at home. Under MirroredStrategy each replica has statistics of its own: the
            first one's are read (as Keras saves them), all are written.

    Raises:
        ConfigurationError: ``model`` is no Keras 3 model; the selection is malformed.
    """

    def __init__(self, model: keras.Model, *, parameters: Selection = "all", buffers: bool = False) -> None:
        check_model(model)
        if not isinstance(buffers, bool):
            raise ConfigurationError(
                what="buffers", expected="True or False", found=repr(buffers), fix="Pass buffers=True or leave it out"
            )
        self._model = model
        self._selector = Selector(parameters)
        self._buffers = buffers

    def layout(self) -> Layout:
        """Describe the selected weights in order.

        Raises:
            LayoutError: the model is not built, or has nothing to train.
            ConfigurationError: nothing is selected.
        """
        return _layout(self._select())

    def read(self) -> list[np.ndarray]:
        """Copy the selected weights into C-ordered arrays that own their memory.

        bfloat16 and float8 come as float32, exactly; every other type as it is. Needs the size of the model in memory.

        Raises:
            LayoutError, ConfigurationError: as :meth:`layout`.
        """
        return [_copy(variable) for _, variable in self._select()]

    def view(self) -> list[LiveWeight]:
        """Give the selected weights as :meth:`read` does, but each when it is written, so that one is in memory at a time.

        They must not change until whoever got them is done.

        Raises:
            LayoutError, ConfigurationError: as :meth:`layout`.
        """
        return [LiveWeight(variable) for _, variable in self._select()]

    def write(self, arrays: Sequence[np.ndarray]) -> None:
        """Assign ``arrays`` to the weights: all of them, or none and an error.

        Everything is decoded, checked and converted before the first weight is touched; a failure after that, an
        interrupt included, is undone before it is raised. Needs the size of the model twice in memory. An archive that
        nobody else can change (the client's) is checked and then assigned in the memory of one layer; an interrupt waits
        until it is in.

        Args:
            arrays: one numpy array a layer, of the layer's shape; any real type and byte order. May be lazy (an archive).

        Raises:
            LayoutError: count, shape, dtype or range does not fit.
            MixedModelError: disk or memory failed while an archive was assigned layer by layer.
        """
        selected = self._select()
        layout = _layout(selected)
        if isinstance(arrays, Archive) and arrays.private:

            def fill(index: int) -> None:
                selected[index][1].assign(_converted(layout, index, arrays[index]))

            # In order and in this thread: a distribution strategy is a matter of the thread that entered it.
            load_in_place(layout, arrays, fill, alone=True)
            return
        layout.check_headers(headers_of(arrays))
        # Copied, for whoever gave them may go on to use them, and JAX may show the memory it was given.
        staged = [np.array(_converted(layout, index, arrays[index])) for index in range(len(selected))]
        variables = [variable for _, variable in selected]
        done: list[tuple[Any, np.ndarray]] = []
        try:
            for variable, values in zip(variables, staged):
                done.append((variable, _copy(variable)))
                variable.assign(values)
        except BaseException:
            # An interrupt (Ctrl-C) may fall between two layers as well as an error into one.
            for variable, previous in done:
                variable.assign(previous)
            raise

    def _select(self) -> list[tuple[str, Any]]:
        model = self._model
        trainable = list(model.trainable_weights)
        if not trainable:
            raise _nothing(model)
        found = [*enumerate(trainable)]
        if self._buffers:
            found += enumerate(_statistics(model), start=len(trainable))
        chosen = [
            (f"{index}/{_UNNAMED.sub('variable', variable.name)}", variable)
            for index, variable in found
            if self._selector(variable.path, variable, trainable=True)
        ]
        self._selector.require_some(len(chosen), [variable.path for _, variable in found])
        return chosen


class LiveWeight:
    """Give a live weight's values when they are asked for (a ``LayerStream``).

    Args:
        variable: must not change until the pieces are used up.
    """

    def __init__(self, variable: Any) -> None:
        self.shape = tuple(int(size) for size in variable.shape)
        self.dtype = _numpy_dtype(_dtype(variable))
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._variable = variable

    def pieces(self, items: int) -> Iterator[np.ndarray]:
        """Give the values in C order as flat arrays of at most ``items``."""
        # Most backends show their own memory here; those that copy, copy one weight.
        flat = np.asarray(keras.ops.convert_to_numpy(self._variable.value)).reshape(-1)
        for start in range(0, flat.size, items):
            yield flat[start : start + items].astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give all values as an array of their own."""
        del copy  # it is one in any case
        values = _copy(self._variable)
        return values if dtype is None else values.astype(dtype, copy=False)


def check_model(model: object) -> None:
    """Demand a Keras 3 model.

    Raises:
        ConfigurationError: it is of tf_keras or Keras 2, or no model at all.
    """
    if isinstance(model, keras.Model):
        return
    names = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    is_old = bool(names & {"tf_keras", "keras"})
    raise ConfigurationError(
        what="model",
        expected="a keras.Model of Keras 3 (3.0.5 or newer)",
        found=f"{type(model).__name__} of {type(model).__module__.split('.')[0]}",
        fix="tf_keras and Keras 2 cannot be served: build the model with keras 3"
        if is_old
        else "Pass the model itself",
    )


def _nothing(model: keras.Model) -> LayoutError:
    if model.trainable and not (model.built and model.weights):
        return LayoutError(
            what=f"model {model.name!r}",
            expected="a built model",
            found="0 weights: it is not built",
            fix="Give it an Input, call model.build(input_shape), or run one batch through it first",
        )
    return LayoutError(
        what=f"model {model.name!r}",
        expected="at least one trainable weight",
        found=f"{len(model.weights)} weights, all of them frozen",
        fix="Set trainable = True on the layers that the federation is to train",
    )


def _statistics(model: keras.Model) -> list[Any]:
    """Give the floating weights that were never meant to be trained; a frozen layer's kernel is none of them."""
    frozen: set[int] = set()
    for layer in model._flatten_layers():  # noqa: SLF001
        # Freezing leaves a layer's own list as it was, and so does LoRA. That list is private, but nothing public tells
        # what is frozen from what never was to be trained.
        own = layer._trainable_variables  # noqa: SLF001
        if getattr(layer, "quantization_mode", None):
            # Then the kernel has left that list, and its scale belongs to this site's kernel alone. Layers that can be
            # quantized have no statistics.
            own = [*own, *layer._non_trainable_variables]  # noqa: SLF001
        frozen.update(id(variable) for variable in own)
    return [
        variable
        for variable in model.non_trainable_weights
        if id(variable) not in frozen and "float" in _dtype(variable)
    ]


def _dtype(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))


def _layout(selected: Sequence[tuple[str, Any]]) -> Layout:
    return Layout(
        tuple(
            LayerSpec(name, tuple(int(size) for size in variable.shape), _dtype(variable))
            for name, variable in selected
        )
    )


def _copy(variable: Any) -> np.ndarray:
    """Copy a weight out; what Keras gives may be a view of the live weight on some backend or version."""
    dtype = _dtype(variable)
    value = keras.ops.convert_to_numpy(variable.value)
    return np.array(value, dtype=_numpy_dtype(dtype), order="C", copy=True)


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if dtype in _WIDENED else dtype)


def _converted(layout: Layout, index: int, array: np.ndarray) -> np.ndarray:
    """Convert one layer to the weight's type (float32 for those that numpy lacks), native byte order, C order."""
    spec = layout.layers[index]
    # A lazy sequence decodes here; what comes out is held to its header, because assigning is no place to find out.
    if array.shape != spec.shape or array.dtype.kind not in ("fiub" if spec.is_float else "iub"):
        raise LayoutError(
            what=f"layer_{index} ({spec.name})",
            expected=f"{spec.dtype}{list(spec.shape)}",
            found=f"{array.dtype}{list(array.shape)} when decoded",
            fix="The archive contradicts itself; nothing was loaded",
        )
    layout.check_range(index, array)
    with np.errstate(all="ignore"):  # losing digits is what a narrower type means, whatever np.seterr() was told
        return np.asarray(array, dtype=_numpy_dtype(spec.dtype), order="C")
