"""NF4: four bits that stand for quantiles of a normal distribution, in blocks with one absolute maximum each.

Dettmers et al. 2023 (QLoRA), section 3 and appendix E. The absolute maxima may be quantized too, in blocks of their own ("double
quantization"): less their mean, as one of the 256 values of the dynamic code of Dettmers et al. 2021 (8-bit optimizers, section 2.2).
Codes, order and the second level are those of bitsandbytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.policy.sizes import SECOND_BLOCK
from pipeline.types import Array

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

CODE: F32 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The sixteen values (QLoRA, appendix E), as shares of a block's absolute maximum."""


def nearest_codes(shares: Array) -> U8:
    """Return which of :data:`CODE` is nearest to each value, the lower one of two as near; beyond -1 and 1 it saturates."""
    return _nearest(shares, CODE)


def dynamic_code() -> F32:
    """Return the 256 values of the signed dynamic code, ascending: 0, 1, and of each decade down to 1e-6 evenly spaced shares.

    A decade has twice as many values as the one below it: ``2**i`` middles of equal parts of 0.1 … 1, times ``10**(i - 6)``.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        ends = np.linspace(0.1, 1.0, 2**exponent + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*middles, *-middles]
    return np.sort(np.array(values, np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLevel:
    """Quantized absolute maxima: ``dynamic_code()[codes] * scale + offset``, of which the first ``count`` count.

    Attributes:
        codes: uint8 ``[second blocks, 256]``, filled up with the code of 0.
        scale: float32 ``[second blocks, 1]``.
        offset: The mean of the absolute maxima, float32 ``[]``.
        count: How many there are.
    """

    codes: U8
    scale: F32
    offset: F32
    count: int

    def expanded(self) -> F32:
        """Return the absolute maxima that are stood for, float32 ``[count]``."""
        found: F32 = (dynamic_code()[self.codes] * self.scale + self.offset).reshape(-1)[: self.count]
        return found


def second_level(maxima: F32) -> SecondLevel:
    """Return absolute maxima, ``[blocks]`` in the order of the stored weight, as quantized ones."""
    offset = np.asarray(maxima.mean(dtype=np.float64), np.float32)
    padded = np.zeros(-(-maxima.size // SECOND_BLOCK) * SECOND_BLOCK, np.float32)
    padded[: maxima.size] = maxima - offset
    blocks = padded.reshape(-1, SECOND_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    codes = _nearest(blocks / np.where(scale > 0, scale, np.float32(1)), dynamic_code())
    return SecondLevel(codes=codes, scale=scale, offset=offset, count=maxima.size)


def _nearest(values: Array, code: F32) -> U8:
    middles = (code[:-1] + code[1:]) / np.float32(2)
    found: U8 = np.searchsorted(middles, values.astype(np.float32), side="left").astype(np.uint8)
    return found
