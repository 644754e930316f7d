"""How large each tensor gets, for what FP16 cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibrators.sketch import Sketch
from pipeline.policy.half_range import SENTINEL


def extents(statistics: Mapping[str, Sketch]) -> dict[str, float]:
    """Return tensor name to the largest |x| seen, leaving out mask sentinels (|x| >= 1e8, and infinity)."""
    found = {}
    for name, sketch in statistics.items():
        if sketch.amax < SENTINEL:
            found[name] = sketch.amax
            continue
        bins = sketch.arrays()["bins"].astype(np.uint32)
        magnitudes = np.abs((bins << 16).view(np.float32))
        ordinary = magnitudes[magnitudes < SENTINEL]
        # A bin's lower edge is at most 0.8 % below its largest value.
        found[name] = float(ordinary.max()) * 1.0078125 if ordinary.size else 0.0
    return found
