"""Rules about what a file may hold: operators, and the opset that its types need."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import NOT_IMPORTABLE
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import Quantizer
from pipeline.lint.rule import Hit, rule

_SINCE = {
    ir.DataType.FLOAT8E4M3FN: 19, ir.DataType.FLOAT8E5M2: 19, ir.DataType.INT4: 21, ir.DataType.UINT4: 21,
    ir.DataType.INT16: 21, ir.DataType.UINT16: 21, ir.DataType.FLOAT4E2M1: 23,
}  # fmt: skip
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@rule("QDQ110", "not-importable", fix="Write Q/DQ pairs (quant_format=QDQ) with static ranges instead.")
def not_importable(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT reads quantization as Q/DQ pairs around float operators.

    Operators that compute on integers (QLinear*, *Integer) or quantize while running (DynamicQuantizeLinear) are
    refused by its parser.

    Source: onnx-tensorrt, operators.md; measured with ``OnnxParser.supports_operator``.
    """
    for node in graph.nodes:
        if node.op_type in NOT_IMPORTABLE:
            yield Hit(node=node, message=f"TensorRT has no {node.op_type}")


@rule(
    "QDQ114",
    "opset-too-low",
    severity=Severity.WARNING,
    fix="Export or convert the model to the opset that the type needs.",
)
def opset_too_low(graph: QdqGraph) -> Iterator[Hit]:
    """Every quantized type needs the opset that brought it.

    ONNX has per-channel scales from opset 13 on, FP8 and 16-bit float scales from 19, INT4 and blocks from 21, FP4
    from 23. TensorRT's parser does not look at the opset and takes them all, but the file is no valid ONNX:
    onnx.checker and ONNX Runtime refuse it, so nothing can validate it.

    Source: ONNX operator changelog, QuantizeLinear and DequantizeLinear; measured.
    """
    for q in graph.quantizers.values():
        if q.node.domain == "com.microsoft":
            continue
        needed, why = _needed(graph, q)
        if graph.opset < needed:
            yield Hit(node=q.node, tensor=q.data, message=f"{why} needs opset {needed}; this is {graph.opset}")


def _needed(graph: QdqGraph, q: Quantizer) -> tuple[int, str]:
    held = q.made if q.quantizes else graph.dtype(q.data)
    found = [(10, "a Q/DQ pair")]
    if held is not None and held in _SINCE:
        found.append((_SINCE[held], held.name))
    if q.scale.dtype in _HALVES:
        found.append((19, f"a scale of {q.scale.dtype.name}"))
    if "axis" in q.node.attributes or q.scale.size not in (None, 1):
        found.append((13, "one scale per channel"))
    if q.block_size or (q.scale.shape is not None and len(q.scale.shape) > 1):
        found.append((21, "one scale per block"))
    if q.output_dtype is not None:
        found.append((21 if q.quantizes else 23, "output_dtype"))
    return max(found)
