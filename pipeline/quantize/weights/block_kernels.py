"""Compiled search for the scale of least squared error of every block of a weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrators.jit import dividing_kernel
from pipeline.quantize.weights.cores import on_all_cores
from pipeline.types import Array

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_COLUMNS = 256
"""Columns searched together: their block of 128 rows stays in a core's second-level cache for every candidate."""
_LANES = 8
"""Partial sums that numpy keeps where it adds up to 128 neighbours in memory (its pairwise summation)."""
_WHOLE = np.float32(1.5 * 2**23)
"""Added and taken away again it rounds a float32 below 2**22 to the nearest whole number, ties to even, as rint does."""
_HALF, _ONE, _TWO, _FOUR = np.float32(0.5), np.float32(1), np.float32(2), np.float32(4)


def least_error(weight: Array, block: int, cost: F64, scales: F32, levels: tuple[float, float, bool]) -> F32:
    """Return for every block the first of ``scales`` with the least weighted squared error, float32 ``[blocks, columns]``.

    An error is ``(level * scale - value)**2`` in float32, times its row's cost and summed in float64 in the order that
    numpy's ``sum(axis=1)`` takes, which depends on how the weight lies in memory. The number of cores changes nothing.

    Args:
        weight: Finite floats ``[blocks * block, columns]``; a block of rows at a time and core is widened to float32.
        block: Rows of a block, a multiple of 8 up to 128.
        cost: What an error of each row costs, ``[rows]``.
        scales: What to try, ``[candidates, blocks, columns]``, all above 0.
        levels: Lowest and highest level, and whether the levels are those of FP4 (E2M1) or whole numbers.
    """
    chosen = np.ones(scales.shape[1:], np.float32)
    # Where the values of a column are neighbours numpy adds them up in lanes, elsewhere one after the other.
    lanes = _LANES if weight.flags.f_contiguous else 1
    low, high, fp4 = levels
    limits = np.array([low, high], np.float32)

    def search(index: slice) -> None:
        rows = slice(index.start * block, index.stop * block)
        values = np.ascontiguousarray(weight[rows], dtype=np.float32)
        _search(
            values, cost[rows], np.ascontiguousarray(scales[:, index.start]), limits, fp4, lanes, chosen[index.start]
        )

    on_all_cores(search, [slice(i, i + 1) for i in range(len(chosen))])
    return chosen


@dividing_kernel
def _add_whole(values: F32, scales: F32, limits: F32, cost: float, error: F64) -> None:
    """Add what rounding one row to whole levels costs to ``error``, ``[columns]``."""
    low, high = limits[0], limits[1]
    for c in range(values.size):
        step = min(max(values[c] / scales[c], low), high)
        lost = ((step + _WHOLE) - _WHOLE) * scales[c] - values[c]
        error[c] += np.float64(lost * lost) * cost


@dividing_kernel
def _add_fp4(values: F32, scales: F32, limits: F32, cost: float, error: F64) -> None:
    """Add what rounding one row to E2M1 costs: levels are 0.5 apart below 2, 1 below 4, and 2 above."""
    low, high = limits[0], limits[1]
    for c in range(values.size):
        step = min(max(values[c] / scales[c], low), high)
        apart = _HALF if abs(step) < _TWO else (_ONE if abs(step) < _FOUR else _TWO)
        lost = ((step / apart + _WHOLE) - _WHOLE) * apart * scales[c] - values[c]
        error[c] += np.float64(lost * lost) * cost


@dividing_kernel
def _search(values: F32, cost: F64, scales: F32, limits: F32, fp4: bool, lanes: int, chosen: F32) -> None:
    """Search one block of rows; ``scales`` is ``[candidates, columns]``, ``chosen`` ``[columns]`` is written."""
    rows, columns = values.shape
    error = np.empty((lanes, _COLUMNS), np.float64)
    best = np.empty(_COLUMNS, np.float64)
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        best[:] = np.inf
        for candidate in range(scales.shape[0]):
            error[:] = 0.0
            tried = scales[candidate, start:end]
            for row in range(rows):
                if fp4:
                    _add_fp4(values[row, start:end], tried, limits, cost[row], error[row % lanes])
                else:
                    _add_whole(values[row, start:end], tried, limits, cost[row], error[row % lanes])
            for c in range(end - start):
                total = error[0, c]
                if lanes == _LANES:
                    total = ((error[0, c] + error[1, c]) + (error[2, c] + error[3, c])) + (
                        (error[4, c] + error[5, c]) + (error[6, c] + error[7, c])
                    )
                if total < best[c]:
                    best[c] = total
                    chosen[start + c] = tried[c]
