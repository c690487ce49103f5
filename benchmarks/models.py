"""The models that rounds are measured on: real shapes, values that compress as trained weights do. Needs numpy only.

The official client's environments import this file too, so nothing of this package is used here.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator

import numpy as np

Shape = tuple  # of int; a plain name, since old Pythons read this file too

#: How values are made: as they are; rounded to bfloat16 but kept as float32; as float16.
DTYPES = ("float32", "bfloat16", "float16")
_BLOCK = 1 << 20


def lenet() -> list[Shape]:
    """Give LeNet-5: 61,706 parameters in 10 arrays."""
    return [
        *((6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,)),
        *((120, 400), (120,), (84, 120), (84,), (10, 84), (10,)),
    ]


def resnet18() -> list[Shape]:
    """Give ResNet-18: 11,689,512 parameters in 62 arrays."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inner = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inner, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and width != 64:
                shapes += [(width, inner, 1, 1), (width,), (width,)]
            inner = width
    return [*shapes, (1000, 512), (1000,)]


def vit_b() -> list[Shape]:
    """Give ViT-B/16: 86,567,656 parameters in 152 arrays."""
    start: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return [*start, *_transformer(12, 768), (768,), (768,), (1000, 768), (1000,)]


def gpt_400m() -> list[Shape]:
    """Give a GPT of 406,286,336 parameters in 293 arrays, its two embeddings of 51 million each untied."""
    return [(50257, 1024), (1024, 1024), *_transformer(24, 1024), (1024,), (1024,), (50257, 1024)]


def _transformer(blocks: int, width: int) -> list[Shape]:
    block: list[Shape] = [
        *((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return block * blocks


MODELS = {"lenet": lenet, "resnet18": resnet18, "vit-b": vit_b, "gpt-400m": gpt_400m}


def shapes_of(model: str) -> list[Shape]:
    """Give the shapes of a model by its name, or of ``plain:<parameters>x<layers>``: equal layers for the scaling runs."""
    if model in MODELS:
        return MODELS[model]()
    kind, _, text = model.partition(":")
    size, _, layers = text.partition("x")
    if kind != "plain" or not (size.isdigit() and layers.isdigit()) or int(size) < int(layers) or not int(layers):
        raise ValueError(f"no such model: {model!r}")
    each, rest = divmod(int(size), int(layers))
    return [(each + (index < rest),) for index in range(int(layers))]


def parameters_in(model: str) -> int:
    """Count the parameters of a model."""
    return sum(math.prod(shape) for shape in shapes_of(model))


@functools.lru_cache(maxsize=1)
def _normal() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(_BLOCK, dtype=np.float32)


def layer(shape: Shape, seed: int, dtype: str) -> np.ndarray:
    """Make one layer.

    A million normal numbers are repeated and scaled: deflate looks back 32 KiB only, so it finds no repeats, and 400
    million values are there in two seconds.
    """
    size = math.prod(shape)
    start = seed * 7919 % _BLOCK
    block = _normal()
    # No more of the block is touched than the layer needs: there may be twenty thousand small ones.
    block = block[start : start + size] if start + size <= _BLOCK else np.roll(block, -start)[:size]
    block = block * np.float32(0.01 + 0.09 * (seed * 37 % 101) / 101)
    if dtype == "bfloat16":
        block = (block.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    elif dtype == "float16":
        block = block.astype(np.float16)
    return np.resize(block, size).reshape(shape) if size > _BLOCK else block.reshape(shape)


def local(model: str, dtype: str) -> Iterator[np.ndarray]:
    """Make the weights that a leaf uploads, layer by layer."""
    return (layer(shape, index + 1, dtype) for index, shape in enumerate(shapes_of(model)))


def aggregate_seed(shape: Shape) -> int:
    """Give the seed of an aggregate's layer: the same for equal shapes, so that each need be packed once only."""
    return 100_000 + sum((position + 1) * axis for position, axis in enumerate(shape)) % 997


def aggregate(model: str, dtype: str) -> Iterator[np.ndarray]:
    """Make the weights that come back, layer by layer."""
    return (layer(shape, aggregate_seed(shape), dtype) for shape in shapes_of(model))


def fingerprint(arrays: object) -> str:
    """Give a SHA-256 over the bytes of all layers, in order."""
    digest = hashlib.sha256()
    for array in arrays:  # type: ignore[attr-defined]
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
