"""Quantize and dequantize in numpy, as the graph's Q/DQ pairs do."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pipeline.quantize.weights.nf4 import CODE, nearest_codes
from pipeline.types import Array, QuantDType, QuantSpec, Range

F32 = npt.NDArray[np.float32]
_FLOATS: dict[QuantDType, np.dtype[Any]] = {
    QuantDType.FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    QuantDType.FP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    QuantDType.FP4_E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
}


def fake_quantize(values: F32, limits: Range, spec: QuantSpec) -> F32:
    """Return float values after Q and DQ with one scale."""
    scale, zero_point = limits.scale_zero_point(spec)
    steps = nearest(values / np.float32(scale) + np.float32(zero_point), spec.dtype)
    found: F32 = (steps - np.float32(zero_point)) * np.float32(scale)
    return found


def fake_quantize_weight(weight: F32, spec: QuantSpec) -> F32:
    """Return a weight ``[..., in, out]`` after Q and DQ with a symmetric scale for each output channel, or each of its blocks."""
    blocks = weight.reshape(*weight.shape[:-2], -1, spec.block or weight.shape[-2], weight.shape[-1])
    scale = np.maximum(np.abs(blocks).max(axis=-2, keepdims=True) / np.float32(spec.dtype.qmax), np.float32(1e-30))
    found: F32 = (nearest(blocks / scale, spec.dtype) * scale).reshape(weight.shape)
    return found


def nearest(steps: Array, dtype: QuantDType) -> Array:
    """Return the nearest values that a type holds, ties to even, in the array's own float type; beyond it saturates."""
    clipped = np.clip(steps, dtype.qmin, dtype.qmax)
    narrow = _FLOATS.get(dtype)
    if narrow is not None:
        found: Array = clipped.astype(narrow).astype(steps.dtype)
        return found
    if dtype is QuantDType.NF4:
        quantiles: Array = CODE[nearest_codes(clipped)].astype(steps.dtype)
        return quantiles
    rounded: Array = np.rint(clipped)
    return rounded
