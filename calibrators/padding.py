"""Which part of an activation belongs to padding, told from the shapes of the activation and the attention mask."""

from __future__ import annotations

import math

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Array, Feeds


def kept_positions(feeds: Feeds, mask: str) -> Array | None:
    """Return which positions of this batch are no padding, ``[batch, positions]`` bool; ``None`` if all are.

    Raises:
        DataError: The batch has no input ``mask``, or it is not ``[batch, positions]``.
    """
    if mask not in feeds:
        raise DataError(
            "The data has no such input, so padding cannot be left out.",
            where=f"input {mask}",
            fix=f"Name the mask input ({', '.join(feeds) or 'the data is empty'}), or keep padding in.",
        )
    values = np.asarray(feeds[mask])
    if values.ndim != 2:
        raise DataError(
            f"A padding mask must have the shape [batch, positions]; this one has {list(values.shape)}.",
            where=f"input {mask}",
            fix="Name another input, or keep padding in.",
        )
    keep: Array = np.ascontiguousarray(values != 0)
    return None if keep.all() else keep


def heads_between(shape: tuple[int, ...], keep: Array) -> int | None:
    """Return the size of the axis between batch and positions, 1 if they are neighbours.

    Known layouts: ``[batch, positions, …]``, ``[batch * positions, x]`` and ``[batch, heads, positions, x]``.
    ``None`` means that the array has none of them, or that it cannot be told which (as many heads as positions);
    then nothing may be left out.
    """
    batch, positions = keep.shape
    if math.prod(shape) == 0:
        return None
    second = len(shape) == 4 and shape[0] == batch and shape[2] == positions
    if len(shape) >= 2 and shape[:2] == (batch, positions):
        return None if second else 1
    if second:
        return shape[1]
    return 1 if len(shape) == 2 and shape[0] == batch * positions else None


def without_padding(values: Array, keep: Array | None) -> Array:
    """Return the values of kept positions, ``[kept, …, last axis]``; the array itself where nothing can be left out."""
    heads = None if keep is None else heads_between(values.shape, keep)
    if keep is None or heads is None:
        return values
    if values.ndim == 2 and values.shape != keep.shape:
        kept: Array = values[keep.ravel()]
    elif heads == 1 and values.shape[:2] == keep.shape:
        kept = values[keep]
    else:
        kept = np.moveaxis(values, 2, 1)[keep]
    return kept
