"""The range that clips nothing."""

from __future__ import annotations

from dataclasses import dataclass

from calibrators.calibrator import effective, mirrored
from calibrators.sketch import Sketch
from pipeline.types import QuantSpec, Range


@dataclass(frozen=True, slots=True, kw_only=True)
class MinMax:
    """From the smallest to the largest value, both exact."""

    name: str = "minmax"

    def range(self, sketch: Sketch, spec: QuantSpec) -> Range:
        """Return the smallest range that holds every value.

        Raises:
            DataError: The sketch is empty, or holds NaN or infinity.
        """
        values = sketch.distribution()
        if effective(spec).symmetric:
            return mirrored(values.amax)
        return Range(min=values.min, max=values.max)
