"""GPTQ: round a weight so that its GEMM's outputs, not its own values, stay close.

Rows are rounded one after the other, and what each one lost is made up for by those still to come, as far as the inputs'
second moments ``X^T X`` say they can (Frantar et al. 2022, algorithm 1; rows in falling order of their moment, "act-order").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import linalg

from pipeline.types import Array

F64 = npt.NDArray[np.float64]

DAMPING = 0.01
"""Share of the mean second moment that is added to each, as in the paper."""
BLOCK = 128
"""Rows between two updates of all later ones; the result does not depend on it but for float rounding."""


def gptq(weight: Array, gram: F64, scale: Array, nearest: Callable[[F64], F64], *, damping: float = DAMPING) -> F64:
    """Return the rounded weight.

    Args:
        weight: ``[channels in, channels out]``, float.
        gram: ``X^T X`` of the GEMM's inputs, ``[channels in, channels in]``, float64.
        scale: Step of every output channel, ``[channels out]``, above 0; it is kept as it is.
        nearest: Returns the nearest values that the stored type holds, of a weight over its scale.
        damping: What is added to the diagonal, as a share of its mean.

    Returns:
        What is stored, float64, the weight's shape: every value is one of ``nearest``'s.
    """
    moments = np.diagonal(gram)
    order = np.argsort(-moments, kind="stable")
    left = (weight.astype(np.float64) / scale)[order]
    factor = _inverse_factor(gram, order, damping)
    rounded = np.empty(left.shape, np.float64)
    for begin in range(0, len(left), BLOCK):
        end = min(begin + BLOCK, len(left))
        lost = np.empty((end - begin, left.shape[1]))
        for row in range(begin, end):
            rounded[row] = nearest(left[row])
            lost[row - begin] = (left[row] - rounded[row]) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], lost[row - begin])
        left[end:] -= factor[begin:end, end:].T @ lost
    result = np.empty(rounded.shape, np.float64)
    result[order] = rounded
    return result


def _inverse_factor(gram: F64, order: npt.NDArray[np.intp], damping: float) -> F64:
    """Return the upper Cholesky factor of the inverse of the damped, ordered moments."""
    damped = gram[np.ix_(order, order)]
    mean = float(np.diagonal(damped).mean())
    # An input that is always zero has no moment: whatever its row is rounded to, the output does not change.
    damped[np.diag_indices(len(damped))] += damping * mean if mean > 0 else 1.0
    lower = linalg.cholesky(damped, lower=True)
    inverse = linalg.cho_solve((lower, True), np.eye(len(damped)))
    factor: F64 = linalg.cholesky((inverse + inverse.T) / 2, lower=False)
    return factor
