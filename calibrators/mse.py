"""The range with the least squared quantization error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrators.calibrator import effective, mirrored
from calibrators.sketch import Sketch
from pipeline.types import QuantDType, QuantSpec, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquares:
    """Searches the range for the least sum of squared differences; asymmetric ranges at both ends."""

    name: str = "mse"

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the range with the least :func:`calibrators.calibrator.quantization_error`.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        from calibrators.error_kernels import search_affine, search_symmetric  # numba: only where searched

        spec = effective(spec)
        values = sketch.distribution()
        intervals = (values.low, values.high, values.mean, values.count)
        if not spec.symmetric:
            ends = np.array([min(values.min, 0.0), max(values.max, 0.0)])
            low, high = search_affine(*intervals, ends, np.array([spec.dtype.qmin, spec.dtype.qmax]))
            return Range(min=float(low), max=float(high))
        scale, zero_point = mirrored(values.amax).scale_zero_point(spec)
        steps = round(values.amax / scale)
        if not steps:  # all zeros, or too small for a float32 scale
            return mirrored(values.amax)
        lowest, highest = spec.dtype.qmin - zero_point, spec.dtype.qmax - zero_point
        levels = np.array([lowest, highest, steps, spec.dtype is QuantDType.FP8_E4M3], np.float64)
        return mirrored(search_symmetric(*intervals, values.amax, levels))
