"""How an array is cut into channels for the per-channel statistics."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from calibrators.padding import without_padding
from pipeline.errors import DataError
from pipeline.types import Array


def channel_bits(values: Array, axis: int, keep: Array | None) -> npt.NDArray[np.int32]:
    """Return the float32 bits of ``values`` as ``[outer, channels, inner]``.

    Padding is left out where the channels are the last axis (and no axis of batch or positions).

    Raises:
        DataError: The array holds no floats or has no such axis.
    """
    if values.dtype.kind != "f":
        raise DataError(f"Per-channel statistics are made of floats; this array holds {values.dtype}.")
    if not -values.ndim <= axis < values.ndim:
        raise DataError(f"An array of shape {list(values.shape)} has no axis {axis}.", fix="Request another axis.")
    axis %= values.ndim
    if keep is not None and axis == values.ndim - 1 and values.shape != keep.shape:
        values = without_padding(values, keep)
        axis = values.ndim - 1
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, dtype=np.float32)
    shape = (math.prod(values.shape[:axis]), values.shape[axis], math.prod(values.shape[axis + 1 :]))
    return values.view(np.int32).reshape(shape)


def require_same(mine: tuple[int, int], other: tuple[int, int]) -> None:
    """Refuse to merge statistics of another axis or another number of channels.

    Args:
        mine: Axis and number of channels (0: nothing seen yet).
        other: The same of the other statistic.

    Raises:
        DataError: They differ.
    """
    if mine[0] != other[0] or (mine[1] and other[1] and mine[1] != other[1]):
        raise DataError(
            f"Per-channel statistics do not fit: axis {mine[0]} with {mine[1]} channels, "
            f"axis {other[0]} with {other[1]}.",
            fix="Merge statistics of the same tensor; a channel axis must not change its size.",
        )
