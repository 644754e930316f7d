"""Make small deterministic inputs from what a model says of its inputs, for comparing two graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline import kv_cache
from pipeline.types import Array, Feeds, TensorInfo

SIZES = ((2, 16), (1, 16), (2, 32), (1, 64), (1, 224))
"""Tried in turn: the size of a dynamic batch dimension, and of every other dynamic dimension."""

LARGEST_ID = 3
"""Ids are 0 to this: a table has at least that many rows, as a rule."""


def samples(inputs: Sequence[TensorInfo], *, seed: int = 0) -> Iterator[Feeds]:
    """Yield inputs of growing size until the caller finds one that the model accepts.

    The same symbol gets the same number; an unnamed dimension counts as batch on axis 0. Masks are ones, positions
    count up, token types are zeros, other integers are ids in [0, 3], floats are standard normal. A key-value cache is empty.
    """
    dynamic = any(not isinstance(dim, int) for info in inputs for dim in info.shape)
    for batch, length in SIZES if dynamic else SIZES[:1]:
        rng = np.random.default_rng(seed)
        numbers = {
            dim: batch for info in inputs for dim in info.shape[:1] if isinstance(dim, str) and dim
        }  # a symbol on any first axis is the batch
        yield {info.name: _array(info, _shape(info, numbers, batch, length), rng) for info in inputs}


def _shape(info: TensorInfo, numbers: dict[str, int], batch: int, length: int) -> list[int]:
    shape = [_size(dim, axis, numbers, batch, length) for axis, dim in enumerate(info.shape)]
    if kv_cache.is_past(info.name) and len(shape) == 4 and not isinstance(info.shape[2], int):
        shape[2] = 0
    return shape


def _size(dim: int | str | None, axis: int, numbers: dict[str, int], batch: int, length: int) -> int:
    if isinstance(dim, int):
        return dim
    if not dim:
        return batch if axis == 0 else length
    return numbers.setdefault(dim, length)


def _array(info: TensorInfo, shape: list[int], rng: np.random.Generator) -> Array:
    name = info.name.lower()
    if info.dtype.kind == "b" or "mask" in name:
        return np.ones(shape, dtype=info.dtype)
    if info.dtype.kind in "iu":
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(info.dtype)
        if "type" in name or "segment" in name:
            return np.zeros(shape, dtype=info.dtype)
        return rng.integers(0, LARGEST_ID + 1, size=shape).astype(info.dtype)
    if info.dtype.kind == "O":
        return np.full(shape, "a", dtype=object)
    return np.asarray(rng.standard_normal(shape)).astype(info.dtype)
