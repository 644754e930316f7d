"""Plans and ranges by hand, so that a test of insertion does not depend on policy or calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from calibrators.sketch import Sketch
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.policy.formats import CPU_INT8, GPU_INT8
from pipeline.policy.plan import NodePlan, PrecisionPlan
from pipeline.quantize.insertion.sites import Site, sites
from pipeline.quantize.quantize import Quantized, quantize
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.types import Precision, Range, Role


def plan_for(
    path: Path, family: str, quantized: set[str], *, high: set[str] = frozenset(), roles=None, **options
) -> PrecisionPlan:
    smooth, threshold = options.pop("smooth", "auto"), options.pop("llm_int8_threshold", None)
    elsewhere = options.pop("elsewhere", Precision.FP16 if family.startswith("gpu") else Precision.FP32)
    nodes = tuple(
        NodePlan(
            node=n.name,
            op_type=n.op_type,
            role=(roles or {}).get(n.name, Role.OTHER),
            block=None,
            precision=Precision.INT8 if n.name in quantized else Precision.FP32 if n.name in high else elsewhere,
            rule="test",
            smooth=smooth if n.name in quantized else None,
            llm_int8_threshold=threshold if n.name in quantized else None,
        )
        for n in models.load(path).graph
    )
    formats = {Precision.INT8: CPU_INT8 if family == "cpu" else GPU_INT8}
    return PrecisionPlan(family=family, elsewhere=elsewhere, formats=formats, nodes=nodes, **options)


def sites_of(path: Path, plan: PrecisionPlan) -> tuple[Site, ...]:
    return sites(models.load(path), plan)


def write(path: Path, plan: PrecisionPlan, known: dict[str, tuple[float, float]], out: Path) -> Quantized:
    """Quantize with these ranges; a tensor that is not in ``known`` gets -4 … 4."""
    ranges = [
        SiteRange(
            site=s, method="test", range=Range(min=known.get(s.tensor, (-4, 4))[0], max=known.get(s.tensor, (-4, 4))[1])
        )
        for s in (() if plan.dynamic else sites_of(path, plan))
    ]
    made = quantize(path, plan, ranges, out)
    check(made.path)
    return made


def check(path: Path) -> onnx.ModelProto:
    """The full checker with strict shape and type inference."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True, data_prop=True)
    return model


def run(path: Path, feeds: dict[str, np.ndarray], *, optimize: bool = False) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner(path, threads=1, optimize=optimize) as runner:
        return runner.infer(feeds)


def sketch(values: np.ndarray) -> Sketch:
    made = Sketch()
    made.update(np.asarray(values, np.float32))
    return made
