"""Which quantized nodes ONNX Runtime really runs in INT8: read from its optimized graph, not hoped for."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from pipeline.policy.plan import PrecisionPlan
from pipeline.running.memory import fit, open_session
from pipeline.running.segmented import SegmentedSession
from pipeline.running.session import session

INTEGER_KERNELS = (
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QLinearMatMul",
    "QLinearConv",
    "QLinearAdd",
    "QGemm",
    "MatMulNBits",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """What became of the quantized nodes on this machine's ONNX Runtime.

    Attributes:
        integer_kernels: Fused integer operators by type.
        unfused: Nodes that still compute in float behind a DequantizeLinear.
        left_over: DequantizeLinear and QuantizeLinear operators that remain, by type.
    """

    integer_kernels: dict[str, int]
    unfused: tuple[str, ...]
    left_over: dict[str, int]


def fusion(variant: Path, plan: PrecisionPlan) -> Fusion:
    """Return how ONNX Runtime fused the Q/DQ graph at ``variant``; one too large for memory is looked at in segments."""
    counts: Counter[str] = Counter()
    floating: set[str] = set()
    with tempfile.TemporaryDirectory(dir=variant.parent) as folder:
        for graph in _optimized(variant, Path(folder)):
            counts.update(n.op_type for n in graph.node)
            dequantized = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
            floating |= {
                n.name for n in graph.node if n.op_type not in INTEGER_KERNELS and dequantized & set(n.input[:2])
            }
    return Fusion(
        integer_kernels={k: counts[k] for k in INTEGER_KERNELS if counts[k]},
        unfused=tuple(n.node for n in plan.quantized() if n.node in floating),
        left_over={k: counts[k] for k in ("DequantizeLinear", "QuantizeLinear") if counts[k]},
    )


def _optimized(variant: Path, folder: Path) -> Iterator[onnx.GraphProto]:
    """Yield what ONNX Runtime makes of the graph: of all of it, or of one segment after the other."""
    live = None if fit(variant) else open_session(variant, threads=1, whole=False)
    if isinstance(live, SegmentedSession):
        yield from live.optimized(folder)
        return
    path = folder / "optimized.onnx"
    session(variant, threads=1, save_optimized=path)
    yield onnx.load(path, load_external_data=False).graph
