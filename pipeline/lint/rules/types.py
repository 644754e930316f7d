"""Rules about data types."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import NOT_IMPORTABLE, PRODUCTS, READS_NARROW, SAME_OPERANDS
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import FLOATS, QUANTIZED, Quantizer
from pipeline.lint.rule import Hit, rule
from pipeline.lint.rules.bias import is_bias

NEEDS = {
    ir.DataType.FLOAT8E4M3FN: (8, 9),
    ir.DataType.INT4: (8, 0),
    ir.DataType.FLOAT4E2M1: (10, 0),
}
"""Smallest compute capability of a type: measured for SM75, 80, 86, 89 and 120; 10.0 from TensorRT's support matrix."""


@rule("QDQ105", "unsupported-type", fix="Quantize floating-point tensors to INT8, FP8 (E4M3FN), INT4 or FP4 (E2M1).")
def unsupported_type(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT quantizes FP32, FP16 and BF16 to INT8, FP8 E4M3FN, INT4 and FP4 E2M1, with scales of those float types.

    The parser refuses other types: UINT8 that is dequantized without a Q before it, 16-bit, UINT4, E5M2, the FNUZ
    types, and E8M0 scales outside its own TRT_MXFP8 operators.

    Source: onnx-tensorrt, onnxOpImporters.cpp ("TensorRT only allows FP8, INT8, INT4, and FP4 quantization"), and
    its importer of initializers; measured.
    """
    for q in graph.quantizers.values():
        message = _type_fault(graph, q)
        if message:
            yield Hit(node=q.node, tensor=q.data, message=message)


def _type_fault(graph: QdqGraph, q: Quantizer) -> str:
    data, scale, zero = graph.dtype(q.data), q.scale.dtype, q.zero_point
    if scale is not None and scale not in FLOATS and graph.dequantizer(q.scale.value) is None:
        return f"the scale is {scale.name}"
    if q.quantizes:
        if data is not None and data not in FLOATS:
            return f"it quantizes {data.name}, which is no floating-point type"
        if zero is None and q.output_dtype is not None and q.output_dtype not in QUANTIZED:
            return f"it quantizes to {q.output_dtype.name}"
    elif data is not None and data not in QUANTIZED and not (data is ir.DataType.INT32 and is_bias(graph, q)):
        return f"it dequantizes {data.name}"
    imported = QUANTIZED | {ir.DataType.UINT8, ir.DataType.INT32}
    if zero is not None and zero.constant and zero.dtype is not None and zero.dtype not in imported:
        return f"the zero point is {zero.dtype.name}"
    return ""


@rule("QDQ108", "type-not-on-target", fix="Quantize to a type that the GPU has, or choose another target.")
def type_not_on_target(graph: QdqGraph) -> Iterator[Hit]:
    """FP8 needs SM89 or newer, INT4 needs SM80, FP4 needs a Blackwell GPU.

    The builder refuses them elsewhere, also where the values are only stored in that type.

    Source: measured: "Cannot compile for target(s) sm80, because the model contains HW-specific datatypes:
    fp8_e4m3".
    """
    target = graph.target
    if target is None or target.compute_capability is None:
        return
    for q in graph.quantizers.values():
        held = q.made if q.quantizes else graph.dtype(q.data)
        needed = NEEDS.get(held) if held is not None else None
        if held is not None and needed is not None and target.compute_capability < needed:
            what = f"{target.title} is {target.sm} and has no {held.name} (needs SM{needed[0]}{needed[1]})"
            yield Hit(node=q.node, tensor=q.data, message=what)


@rule("QDQ111", "mixed-float-types", fix="Store scales in the type of the tensor that they belong to.")
def mixed_float_types(graph: QdqGraph) -> Iterator[Hit]:
    """A DQ makes the type of its scale, and a strongly typed network does not convert by itself.

    Where that meets another float type, the parser refuses the graph. With a Cast between it compiles, but of a
    product whose operands have scales of two types the builder refuses some (a Gemm with transB and a scale for each
    channel). A Q whose scale has another type than its input compiles, but ONNX allows it only from opset 23 on.

    Source: measured: "IMatrixMultiplyLayer must have same input types", "type mismatch between matmul operand
    scales"; ONNX QuantizeLinear.
    """
    for node in graph.nodes:
        if node in graph.quantizers:
            q = graph.quantizers[node]
            data, scale = graph.dtype(q.data), q.scale.dtype
            if q.quantizes and data in FLOATS and scale in FLOATS and data is not scale and graph.opset < 23:
                what = f"a scale of {scale.name} for a tensor of {data.name}"
                yield Hit(node=node, tensor=q.scale.value, message=what, severity=Severity.WARNING)
            continue
        if node.op_type in SAME_OPERANDS and node.domain == "":
            read = [v for v in node.inputs[SAME_OPERANDS[node.op_type]] if v is not None]
            types = FLOATS & {graph.dtype(v) for v in read}
            scales = FLOATS & {_scale_type(graph, v) for v in read[:2]} if node.op_type in PRODUCTS else set()
            if len(types) > 1:
                yield Hit(node=node, message=f"{node.op_type} reads {_names(types)}")
            elif len(scales) > 1:
                what = f"its operands have scales of {_names(scales)} behind a Cast"
                yield Hit(node=node, message=what, severity=Severity.WARNING)


def _scale_type(graph: QdqGraph, value: ir.Value) -> ir.DataType | None:
    """Return the type of the scale behind an operand, also if what it made was cast."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0] or value
    q = graph.dequantizer(value)
    return None if q is None else q.scale.dtype


def _names(types: Collection[ir.DataType]) -> str:
    return " and ".join(sorted(t.name for t in types))


@rule(
    "QDQ112",
    "bare-quantized-constant",
    fix="Dequantize the constant first: DequantizeLinear, then Gather or Transpose.",
)
def bare_quantized_constant(graph: QdqGraph) -> Iterator[Hit]:
    """Only a DequantizeLinear may read a constant of INT8, FP8, INT4 or FP4 directly.

    Not even a Transpose, Reshape or Gather may stand between. The builder refuses the rest.

    Source: measured: "Quantized constant is only allowed before DQ or PLUGIN".
    """
    for node in graph.nodes:
        if node.op_type in READS_NARROW or node.op_type in NOT_IMPORTABLE:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or graph.stored(value) is None or _may_read(graph, node, index):
                continue
            dtype = graph.dtype(value)
            if dtype in QUANTIZED and dtype is not None:
                yield Hit(node=node, tensor=value, message=f"{node.op_type} reads a constant of {dtype.name}")


def _may_read(graph: QdqGraph, node: ir.Node, index: int) -> bool:
    """Whether a constant may be quantized: the data of a DQ, or a zero point, also behind an Identity."""
    q = graph.quantizers.get(node)
    if q is not None:
        return index == 2 or (index == 0 and not q.quantizes)
    uses = node.outputs[0].uses() if node.op_type == "Identity" else ()
    return bool(uses) and all(user in graph.quantizers and place == 2 for user, place in uses)
