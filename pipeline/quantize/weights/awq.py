"""AWQ: scale a weight's rows by how large their inputs are before it is rounded, and clip its blocks.

A few input channels carry most of a product. Multiplying row ``j`` of the weight by ``s_j`` and dividing channel ``j`` of the
input by it changes nothing in float, and rounds the rows that matter in finer steps: ``s_j = mean|x_j|^alpha``, over
``sqrt(max s * min s)`` (Lin et al. 2023, section 3.2, and the authors' code). Alpha is searched, and then for every block how much of its range is
cut off; both by the error of the outputs. With ``H = X^T X`` that is ``trace(dW^T H dW)``, so no sample has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.quantize.weights.fake import fake_quantize_weight, nearest
from pipeline.quantize.weights.weight import SHARES, block_candidates, lowest
from pipeline.types import Array, QuantSpec

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

ALPHAS = tuple(step / 20 for step in range(21))
"""What is tried, in the paper's steps; 0 leaves the weight as it is."""
COLUMNS = 256
"""Output channels, evenly spread, whose error decides alpha: on MiniLM's 24 inputs at most 1.2 % more error than by all of them."""
QUIETEST = 1e-4
"""Channels quieter than this share of the loudest count as that loud: other data may wake one that calibration hardly saw."""
_RIDGE = 1e-6
"""Share of the mean moment that a block's rows get beside their own, so that one with silent inputs has a range too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The scale of one input.

    Attributes:
        alpha: The exponent.
        scale: ``s``, float32 ``[channels in]``: rows of the weight are multiplied by it.
        error: Squared error of the rounded weights' outputs over the outputs' energy.
        plain_error: The same without a scale.
    """

    alpha: float
    scale: F32
    error: float
    plain_error: float


def input_scale(magnitude: F64, alpha: float) -> F32:
    """Return ``s`` of channels whose mean ``|x|`` is ``magnitude``, float32 ``[channels]``; ones where nothing is known."""
    loudest = float(magnitude.max(initial=0.0))
    if loudest <= 0:
        return np.ones(len(magnitude), np.float32)
    powers = np.maximum(magnitude / loudest, QUIETEST) ** alpha
    scale: F32 = (powers / np.sqrt(powers.max() * powers.min())).astype(np.float32)
    return scale


def search_scale(weights: Sequence[tuple[F32, QuantSpec]], gram: F64, magnitude: F64) -> Choice:
    """Return the scale of least output error, of weights that are rounded to nearest.

    Args:
        weights: Some output channels of all products that read the input, ``[channels in, columns]``, by how they are stored.
        gram: The input's second moments, ``[channels in, channels in]``.
        magnitude: The input's mean ``|x|``, ``[channels in]``.
    """
    moments = (gram / max(float(np.diagonal(gram).mean()), 1e-30)).astype(np.float32)

    def energy(rows: F32) -> float:
        return float(np.einsum("ij,ij->", moments @ rows, rows, dtype=np.float64))

    def error(scale: F32) -> float:
        factor = scale[:, None]
        return sum(energy(fake_quantize_weight(weight * factor, spec) / factor - weight) for weight, spec in weights)

    whole = max(sum(energy(weight) for weight, _ in weights), 1e-30)
    tried = [(error(input_scale(magnitude, alpha)) / whole, alpha) for alpha in ALPHAS]
    least, alpha = min(tried)
    return Choice(alpha=alpha, scale=input_scale(magnitude, alpha), error=least, plain_error=tried[0][0])


def clipped_scales(
    weight: Array, spec: QuantSpec, gram: F64, scale_dtype: npt.DTypeLike, *, signed: bool = False
) -> Array:
    """Return the scales of blocks with the least error of what each block adds to the outputs, float32 ``[blocks, channels out]``.

    Args:
        weight: ``[channels in, channels out]``.
        spec: Its format, with a block.
        gram: Second moments of the inputs, ``[channels in, channels in]``; those within a block count.
        scale_dtype: What scales are stored in.
        signed: Try negative scales too, with which INT4's -8 stands for the largest value whatever its sign.
    """
    assert spec.block is not None
    block, levels = spec.block, (lowest(spec.dtype), spec.dtype.qmax)
    ridge = max(float(np.diagonal(gram).mean()), 1e-30)
    candidates = block_candidates(weight, spec, SHARES, scale_dtype, signed=signed)
    chosen = np.empty(candidates.shape[1:], np.float32)

    for index, tried in enumerate(candidates.swapaxes(0, 1)):  # one after the other: each product takes all cores
        rows = slice(index * block, (index + 1) * block)
        values = np.ascontiguousarray(weight[rows], dtype=np.float32)
        moments = (gram[rows, rows] / ridge + _RIDGE * np.eye(block)).astype(np.float32)
        best = np.full(values.shape[1], np.inf, np.float32)
        for scale in tried:
            lost = nearest(np.clip(values / scale, *levels), spec.dtype) * scale - values
            error = np.einsum("ij,ij->j", moments @ lost, lost)
            better = error < best
            best[better] = error[better]
            chosen[index][better] = scale[better]
    return chosen
