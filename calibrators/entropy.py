"""The range whose quantized histogram loses the least information (KL divergence).

Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017, and NVIDIA's implementation of it in pytorch-quantization
(``calib/histogram.py``). With as many histogram bins as quantization levels there is one candidate only, which is
min/max under another name: hence at least 2048 bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

from calibrators.calibrator import effective, mirrored
from calibrators.distribution import Distribution
from calibrators.sketch import Sketch
from pipeline.types import QuantDType, QuantSpec, Range

F64 = npt.NDArray[np.float64]

BINS = 2048
LEAST_KEPT = 0.9
"""Limits that clip more than a tenth of the values are left out: with all of them in one end bin, P and Q agree."""

_EMPTY_LEVEL = 1e-6
"""Share of all values that stands for Q in an empty level, so that clipping into a gap is dear but not infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropy:
    """Searches the limit on ``|x|`` with the least divergence between a linear histogram and its quantized form.

    Symmetric: the histogram is that of ``|x|``, with 128 levels for INT8 and UINT8 and the FP8 grid for FP8.
    Asymmetric: the signed histogram with 256 levels; the limit cuts both tails where they reach it, so one-sided
    values (ReLU, softmax) get all levels on their side.

    Attributes:
        bins: Histogram bins up to the largest magnitude.
    """

    bins: int = BINS
    name: str = "entropy"

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the range with the least divergence.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        from calibrators.entropy_kernels import divergences, linear_histogram  # numba: only where searched

        spec = effective(spec)
        values = sketch.distribution(magnitudes=spec.symmetric)
        width = values.amax / self.bins
        if not width > 0:
            return mirrored(0.0)
        below, above = _reach(values, width, self.bins)
        histogram = linear_histogram(values.low, values.high, values.count, -below * width, width, below + above)
        edges, shift = _levels(spec)
        limits = np.arange(min(len(edges) - 1, 128), self.bins + 1)
        starts, stops = below - np.minimum(limits, below), below + np.minimum(limits, above)
        found = divergences(histogram, starts, stops, edges, shift, _EMPTY_LEVEL)
        sums = np.concatenate([[0.0], np.cumsum(histogram)])
        found[sums[stops] - sums[starts] < LEAST_KEPT * sums[-1]] = np.inf
        limit = float(limits[int(np.argmin(found))] * width)
        if spec.symmetric:
            return mirrored(min(limit, values.amax))
        return Range(min=max(values.min, -limit), max=min(values.max, limit))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyTensorRT:
    """TensorRT's variant, as NVIDIA publishes it in pytorch-quantization.

    It is always about ``|x|`` in 2048 bins; the first bin gets the second's count (so that exact zeros do not weigh);
    a limit whose last bin is empty is out of the question if anything is clipped; of equal ones the widest wins.
    128 levels, or 256 where the quantized type is unsigned and nothing is negative.
    """

    name: str = "entropy-trt"

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the range with the least divergence; asymmetric ranges are the symmetric one cut to the values.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        from calibrators.entropy_kernels import divergences, linear_histogram  # numba: only where searched

        values = sketch.distribution(magnitudes=True)
        width = values.amax / BINS
        if not width > 0:
            return mirrored(0.0)
        histogram = linear_histogram(values.low, values.high, values.count, 0.0, width, BINS)
        histogram[0] = histogram[1]
        unsigned = spec.dtype is QuantDType.UINT8 and sketch.min >= 0
        levels = 256 if unsigned else 128
        stops = np.arange(128, BINS + 1)
        found = divergences(histogram, np.zeros_like(stops), stops, np.linspace(0, 1, levels + 1), 0.0, 0.0)
        best = len(found) - 1 - int(np.argmin(found[::-1]))
        limit = min(float(stops[best] * width), values.amax)
        if effective(spec).symmetric:
            return mirrored(limit)
        return Range(min=max(sketch.min, -limit), max=min(sketch.max, limit))


def _reach(values: Distribution, width: float, bins: int) -> tuple[int, int]:
    """Return how many bins there are below and above zero."""
    below = min(int(np.ceil(max(-values.min, 0.0) / width)), bins)
    return below, min(int(np.ceil(max(values.max, 0.0) / width)), bins)


def _levels(spec: QuantSpec) -> tuple[F64, float]:
    """Return where the quantization levels begin, as shares of the range, and the rounding shift for them."""
    if spec.dtype is QuantDType.FP8_E4M3:
        return _e4m3_edges(), 0.5
    return np.linspace(0, 1, (128 if spec.symmetric else 256) + 1), 0.0


@lru_cache(maxsize=1)
def _e4m3_edges() -> F64:
    """Return the midpoints between neighbouring FP8 magnitudes, as shares of the largest."""
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    edges: F64 = np.concatenate([[0.0], (codes[1:] + codes[:-1]) / 2, [codes[-1]]]) / codes[-1]
    return edges
