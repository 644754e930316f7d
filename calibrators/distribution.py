"""The values of a sketch as weighted intervals on the real line, which is what ranges are chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distribution:
    """Weighted intervals in rising order; values are taken as spread evenly over their interval.

    Attributes:
        low: Lower ends, ``[n]``.
        high: Upper ends, ``[n]``; equal to ``low`` where all values are equal.
        mean: Exact means of the values, the middle of each interval, ``[n]``.
        count: How many values, ``[n]``.
        min: Smallest value.
        max: Largest value.
    """

    low: F64
    high: F64
    mean: F64
    count: F64
    min: float
    max: float

    @property
    def amax(self) -> float:
        """Return the largest magnitude."""
        return max(-self.min, self.max)


def distribution(
    bins: npt.NDArray[np.uint16], counts: npt.NDArray[np.int64], lows: npt.NDArray[np.int64], low: float, high: float
) -> Distribution:
    """Return the distribution of a sketch whose smallest value is ``low`` and largest ``high``.

    A bin's interval is the widest within the bin whose middle is the bin's mean. So values that are all alike at an
    end of their bin (a constant, the saturated end of a clip, powers of two) become a point, as they are.
    """
    negative = bins >= 0x8000
    magnitude = (bins & 0x7FFF).astype(np.int64)
    exponent = np.maximum(magnitude >> 7, 1)
    ulp = np.exp2(exponent - 150.0)
    near = _edge(magnitude)
    mean = near + lows / counts * ulp
    far = near + 65536.0 * ulp
    mean, left, right = _signed(mean, negative), _signed(near, negative), _signed(far, negative)
    left, right = np.minimum(left, right), np.maximum(left, right)
    half = np.minimum(mean - np.maximum(left, low), np.minimum(right, high) - mean)
    # Zero's bin has both signs; what it holds beside zero is below 2**-133.
    half = np.where(magnitude == 0, 0.0, np.maximum(half, 0.0))
    order = np.argsort(mean, kind="stable")
    mean, half = mean[order], half[order]
    return Distribution(
        low=mean - half, high=mean + half, mean=mean, count=counts[order].astype(np.float64), min=low, max=high
    )


def _edge(magnitude: npt.NDArray[np.int64]) -> F64:
    """Return the smallest magnitude of each bin."""
    edge: F64 = (magnitude << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    return edge


def _signed(values: F64, negative: npt.NDArray[Any]) -> F64:
    return np.where(negative, -values, values)
