"""What a calibrator is, and the error that a range makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from calibrators.sketch import Sketch
from pipeline.types import QuantDType, QuantSpec, Range


class Calibrator(Protocol):
    """Chooses the range of a tensor from its sketch: a pure function."""

    @property
    def name(self) -> str:
        """Return the method's name."""
        ...

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the range to quantize with; ``(-amax, amax)`` where ``spec`` is symmetric.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        ...


def quantization_error(sketch: Sketch, range: Range, spec: QuantSpec) -> float:  # noqa: A002 (the field's own word)
    """Return the sum of squared differences that quantizing the sketched values with ``range`` makes (float64).

    Values are taken as spread evenly within their bin. Quantization is per tensor, whatever ``spec.axis`` says.

    Raises:
        DataError: The sketch is empty, or holds NaN or infinity.
    """
    from calibrators.error_kernels import e4m3_error, uniform_error  # numba: only where errors are computed

    values = sketch.distribution()
    spec = effective(spec)
    scale, zero_point = range.scale_zero_point(spec)
    if spec.dtype is QuantDType.FP8_E4M3:
        return float(e4m3_error(values.low, values.high, values.mean, values.count, scale))
    lowest, highest = spec.dtype.qmin - zero_point, spec.dtype.qmax - zero_point
    return float(uniform_error(values.low, values.high, values.mean, values.count, scale, lowest, highest))


def effective(spec: QuantSpec) -> QuantSpec:
    """Return ``spec`` as it is carried out: FP8 has no zero point, so it is always symmetric."""
    return replace(spec, symmetric=True) if spec.dtype is QuantDType.FP8_E4M3 else spec


def mirrored(amax: float) -> Range:
    """Return the symmetric range up to ``amax``, which float32 can hold."""
    amax = float(np.float32(amax))
    return Range(min=-amax, max=amax)
