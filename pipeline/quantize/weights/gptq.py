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
SWEEPS = 4
"""Most times that :func:`refine` goes over all rows; on MiniLM the fourth changes less than 1 % of the weights."""
BLOCK = 128
"""Rows between two updates of all later ones; the result does not depend on it but for float rounding."""


def gptq(weight: Array, gram: F64, scale: Array, nearest: Callable[[F64], F64], *, damping: float = DAMPING) -> F64:
    """Return the rounded weight.

    Args:
        weight: ``[channels in, channels out]``, float.
        gram: ``X^T X`` of the GEMM's inputs, ``[channels in, channels in]``, float64.
        scale: Step of every output channel, ``[channels out]``, or of every weight of a block, the weight's shape; above 0
            and kept as it is (the paper's "static groups").
        nearest: Returns the nearest values that the stored type holds, of a weight over its scale.
        damping: What is added to the diagonal, as a share of its mean.

    Returns:
        What is stored, float64, the weight's shape: every value is one of ``nearest``'s.
    """
    moments = np.diagonal(gram)
    order = np.argsort(-moments, kind="stable")
    left = weight.astype(np.float64)[order]
    steps = np.broadcast_to(scale, weight.shape).astype(np.float64)[order]
    factor = _inverse_factor(gram, order, damping)
    rounded = np.empty(left.shape, np.float64)
    for begin in range(0, len(left), BLOCK):
        end = min(begin + BLOCK, len(left))
        lost = np.empty((end - begin, left.shape[1]))
        for row in range(begin, end):
            rounded[row] = nearest(left[row] / steps[row])
            lost[row - begin] = (left[row] - rounded[row] * steps[row]) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], lost[row - begin])
        left[end:] -= factor[begin:end, end:].T @ lost
    result = np.empty(rounded.shape, np.float64)
    result[order] = rounded
    return result


def refine(weight: Array, rounded: F64, gram: F64, scale: Array, nearest: Callable[[F64], F64]) -> F64:
    """Return a rounding whose outputs are closer still: each row is rounded again with all others as they are.

    GPTQ rounds a row before it knows how later rows will be rounded. Coordinate descent goes over them again; every step
    lowers the squared error of the outputs or leaves it, and a sweep in which nothing changes ends it.

    Args:
        weight: ``[channels in, channels out]``, float.
        rounded: What :func:`gptq` returned.
        gram: What :func:`gptq` was given.
        scale: What :func:`gptq` was given.
        nearest: What :func:`gptq` was given.
    """
    steps = np.broadcast_to(scale, weight.shape).astype(np.float64)
    damped = _damped(gram, DAMPING)
    found = rounded.copy()
    slope = damped @ (weight.astype(np.float64) - found * steps)
    for _ in range(SWEEPS):
        before = found.copy()
        for begin in range(0, len(found), BLOCK):
            block = slice(begin, min(begin + BLOCK, len(found)))
            change = _descend(found[block], slope[block].copy(), damped[block, block], steps[block], nearest)
            slope -= damped[:, block] @ change
        if np.array_equal(before, found):
            break
    return found


def _descend(found: F64, slope: F64, gram: F64, steps: F64, nearest: Callable[[F64], F64]) -> F64:
    """Round the rows of one block again, in place; return how much each weight changed."""
    change = np.zeros_like(found)
    for row in range(len(found)):
        new = nearest(found[row] + slope[row] / (gram[row, row] * steps[row]))
        change[row] = (new - found[row]) * steps[row]
        slope[row + 1 :] -= np.outer(gram[row + 1 :, row], change[row])
        found[row] = new
    return change


def _damped(gram: F64, damping: float) -> F64:
    damped = gram.copy()
    mean = float(np.diagonal(gram).mean())
    # An input that is always zero has no moment: whatever its row is rounded to, the output does not change.
    damped[np.diag_indices(len(damped))] += damping * mean if mean > 0 else 1.0
    return damped


def _inverse_factor(gram: F64, order: npt.NDArray[np.intp], damping: float) -> F64:
    """Return the upper Cholesky factor of the inverse of the damped, ordered moments."""
    damped = _damped(gram[np.ix_(order, order)], damping)
    lower = linalg.cholesky(damped, lower=True)
    inverse = linalg.cho_solve((lower, True), np.eye(len(damped)))
    factor: F64 = linalg.cholesky((inverse + inverse.T) / 2, lower=False)
    return factor
