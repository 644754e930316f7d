"""From the canonical graph, a precision plan and ranges to one variant: the Q/DQ ONNX of a family of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from pipeline import model as models
from pipeline.errors import EngineError
from pipeline.graph.operands import operands
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.half import cast_to_half
from pipeline.quantize.insertion.dynamic import insert_dynamic
from pipeline.quantize.insertion.fused import Fusion, fusion
from pipeline.quantize.insertion.insert import Inserter
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.quantize.weights.rounding import read_index, rounded
from pipeline.quantize.weights.weight import QuantizedWeight
from pipeline.types import HALVES, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A variant on disk.

    Attributes:
        path: Its ONNX file; external data beside it.
        bytes: Size of both.
        fusion: What ONNX Runtime fuses of it; ``None`` for variants that it does not serve.
    """

    path: Path
    bytes: int
    fusion: Fusion | None


def quantize(
    canonical: Path,
    plan: PrecisionPlan,
    ranges: Sequence[SiteRange],
    out: Path,
    *,
    rounding: Path | None = None,
    progress: Progress = silent,
) -> Quantized:
    """Write the variant that ``plan`` describes to ``out``.

    Args:
        canonical: The canonical FP32 model; its weights are read one at a time.
        plan: Precisions and formats.
        ranges: One for every activation site (none for a dynamic plan).
        out: The variant's ``.onnx``.
        rounding: Folder of weights that are rounded already (:mod:`pipeline.quantize.weights.rounding`).
        progress: Told of every node whose weight is read (``scales``), then of every tensor written (``quantize``).

    Raises:
        QuantizeError: A weight is not finite.
        EngineError: ONNX Runtime cannot run the model, quantized or not.
        StoreError: The variant cannot be written.
    """
    model = models.load(canonical)
    if plan.dynamic:
        insert_dynamic(model, plan, progress)
    else:
        weights = _rounded(model, plan, rounding) if rounding is not None else None
        Inserter(model, plan, {(r.site.tensor, r.site.spec): r.range for r in ranges}, weights).run(progress)
    if plan.emulated:  # FP4 and BF16 convolutions came with opset 23, which changed no operator's meaning
        model.opset_imports[""] = max(23, model.opset_imports.get("", 0))
        model.ir_version = max(11, model.ir_version)
    if plan.elsewhere in HALVES:
        cast_to_half(model, plan)
    if plan.family in ("cpu", "fp32"):
        # ONNX Runtime fuses Add + LayerNormalization into a kernel that is slower on CPUs (6-12 % of MiniLM's time),
        # and only where the graph states its intermediate shapes.
        for node in model.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
                    value.type = None
    models.save(model, out, progress=lambda done, total: progress("quantize", done, total))
    found = _fusion(out, plan, canonical) if plan.family == "cpu" else None
    if found is not None and found.unfused:
        notice(
            "not-fused",
            f"ONNX Runtime runs {len(found.unfused)} of {len(plan.quantized())} quantized nodes in float, "
            "so they cost time and gain nothing",
            where=", ".join(found.unfused[:3]),
        )
    return Quantized(path=out, bytes=models.size_bytes(out), fusion=found)


def _rounded(model: ir.Model, plan: PrecisionPlan, folder: Path) -> dict[str, QuantizedWeight]:
    index, found = read_index(folder), {}
    nodes = {n.name: n for n in model.graph}
    for entry in plan.quantized():
        what = operands(nodes[entry.node]) if entry.node in index else None
        if what is not None and (shape := what.weight_shape(nodes[entry.node])):
            spec = plan.weight_spec(entry)
            found[entry.node] = rounded(folder, entry.node, index, spec, shape)
    return found


def _fusion(variant: Path, plan: PrecisionPlan, canonical: Path) -> Fusion:
    try:
        return fusion(variant, plan)
    except EngineError as error:  # the variant is still in a folder that goes when this fails
        raise EngineError(error.what, where=str(canonical), fix=error.fix) from error
