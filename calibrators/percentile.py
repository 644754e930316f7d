"""The range that keeps a given share of the values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calibrators.calibrator import effective, mirrored
from calibrators.distribution import Distribution
from calibrators.sketch import Sketch
from pipeline.types import QuantSpec, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """Keeps ``percentile`` % of the values.

    Symmetric: the percentile of ``|x|``. Asymmetric: what is left out is shared evenly by both tails.

    Attributes:
        percentile: Above 50, at most 100 (which is min/max).
    """

    percentile: float = 99.99

    @property
    def name(self) -> str:
        """Return the method's name."""
        return f"percentile-{self.percentile:g}"

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the range that keeps that share.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        if effective(spec).symmetric:
            return mirrored(quantile(sketch.distribution(magnitudes=True), self.percentile / 100))
        tail = (1 - self.percentile / 100) / 2
        values = sketch.distribution()
        return Range(min=quantile(values, tail), max=quantile(values, 1 - tail))


def quantile(values: Distribution, share: float) -> float:
    """Return the value that ``share`` (0 to 1) of the values do not exceed.

    Between two neighbouring values it interpolates linearly, as ``numpy.quantile`` does by default.
    """
    ends = np.cumsum(values.count)
    position = share * (ends[-1] - 1)
    below = math.floor(position)
    lower, upper = (_ordered(values, ends, index) for index in (below, math.ceil(position)))
    return float(lower + (upper - lower) * (position - below))


def _ordered(values: Distribution, ends: np.ndarray[tuple[int], np.dtype[np.float64]], index: int) -> float:
    """Return the value at ``index`` in rising order: exact at both ends, spread evenly within an interval."""
    if index <= 0:
        return values.min
    if index >= ends[-1] - 1:
        return values.max
    at = int(np.searchsorted(ends, index, side="right"))
    within = (index - (ends[at] - values.count[at]) + 0.5) / values.count[at]
    return float(values.low[at] + within * (values.high[at] - values.low[at]))
