"""Microscaling formats (OCP MX 1.0): blocks of 32 elements share a scale that is a power of two (E8M0).

The scale's exponent is that of the block's largest magnitude less that of the largest power of two which the elements' type
holds (section 6.3); elements beyond the type's largest saturate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.quantize.weights.fake import nearest
from pipeline.types import QuantDType

BLOCK = 32
LARGEST_EXPONENT = {QuantDType.FP8_E4M3: 8, QuantDType.FP8_E5M2: 15, QuantDType.FP4_E2M1: 2}
"""Exponent of the largest power of two that a type holds."""


def fake_quantize_mx(values: npt.NDArray[np.float32], dtype: QuantDType, *, axis: int) -> npt.NDArray[np.float32]:
    """Return a matrix after rounding to an MX format, in blocks along ``axis``, whose length :data:`BLOCK` divides."""
    rows = np.moveaxis(values, axis, -1)
    blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
    _, exponent = np.frexp(np.abs(blocks).max(axis=-1, keepdims=True))  # of a magnitude in [0.5, 1)
    scale = np.ldexp(np.float32(1), exponent - 1 - LARGEST_EXPONENT[dtype])
    rounded = (nearest(blocks / scale, dtype) * scale).reshape(rows.shape)
    found: npt.NDArray[np.float32] = np.ascontiguousarray(np.moveaxis(rounded, -1, axis), np.float32)
    return found
