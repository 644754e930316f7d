"""What the first half of a build hands to the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.graph.prepare import Prepared
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.sources.export import Exported
from pipeline.stages.smoothing import FloatGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """The canonical model and, for every family of targets, its plan, the float graph it is quantized from, ranges and Q/DQ ONNX."""

    exported: Exported
    canonical: Prepared
    plans: Mapping[str, PrecisionPlan]
    floats: Mapping[str, FloatGraph]
    ranges: Mapping[str, tuple[SiteRange, ...]]
    variants: Mapping[str, Path]
