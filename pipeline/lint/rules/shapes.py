"""Rules about how many scales there are, and which values each serves."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import Quantizer
from pipeline.lint.rule import Hit, rule

_FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})
_DOCUMENTED = {
    ir.DataType.INT4: (64, 128),
    ir.DataType.FLOAT4E2M1: (16,),
    ir.DataType.FLOAT8E4M3FN: (32,),
    ir.DataType.INT8: (),
}
"""Block sizes that TensorRT's documentation names for each type."""


@rule("QDQ103", "parameter-shape", fix="One scale per tensor, per element of the channel axis, or per whole block.")
def parameter_shape(graph: QdqGraph) -> Iterator[Hit]:
    """A tensor has one scale, one for each channel, or one for each whole block along one axis.

    Zero points are as many as scales. The parser refuses the rest.

    Source: onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper; measured.
    """
    for q in graph.quantizers.values():
        message = _shape_fault(q, graph.shape(q.data))
        if message:
            yield Hit(node=q.node, tensor=q.scale.value, message=message)


def _shape_fault(q: Quantizer, data: tuple[int | None, ...] | None) -> str:
    scale, size = q.scale.shape, q.scale.size
    if scale is None or size is None:
        return ""
    if size == 0:
        return "there is no scale at all"
    zeros = None if q.zero_point is None else q.zero_point.size
    if zeros is not None and zeros != size and (q.zero_point is None or q.zero_point.dtype != ir.DataType.FLOAT8E4M3FN):
        return f"{zeros} zero points for {size} scales"
    if size == 1:
        # Measured: a single scale as [1, 1] is refused ("ScaleMode is illegal"); as [] or [1] it is taken.
        return "" if len(scale) < 2 else f"a single scale of rank {len(scale)}"
    if data is None:
        return ""
    axis = q.axis + len(data) if q.axis < 0 else q.axis
    if not 0 <= axis < len(data):
        return f"axis {q.axis} is outside a tensor of rank {len(data)}"
    if len(scale) == 1:
        wrong = data[axis] is not None and data[axis] != size
        return f"{size} scales for {data[axis]} channels on axis {axis}" if wrong else ""
    return _block_fault(scale, data, axis)


def _block_fault(scale: tuple[int | None, ...], data: tuple[int | None, ...], axis: int) -> str:
    if len(scale) != len(data):
        return f"scales of rank {len(scale)} for a tensor of rank {len(data)}"
    for index, (many, whole) in enumerate(zip(scale, data, strict=True)):
        if many is None or whole is None:
            continue
        if index != axis and many != whole:
            return f"{many} scales for {whole} elements on axis {index}; only axis {axis} may have blocks"
        if index == axis and (many == 0 or whole % many):
            return f"{whole} elements on axis {axis} are not {many} whole blocks"
    return ""


@rule("QDQ109", "odd-four-bit", fix="Pad the tensor to an even number of elements, or keep it in 8 bits.")
def odd_four_bit(graph: QdqGraph) -> Iterator[Hit]:
    """Two 4-bit values share a byte, so a tensor of them must have an even number of elements.

    Source: onnx-tensorrt: "4-bit quantization requires an even number of elements"; the builder says the same of
    constants; measured.
    """
    for q in graph.quantizers.values():
        held = q.made if q.quantizes else graph.dtype(q.data)
        shape = graph.shape(q.data)
        if held in _FOUR_BITS and shape is not None and all(d is not None and d % 2 for d in shape):
            yield Hit(node=q.node, tensor=q.data, message=f"an odd number of 4-bit values, shape {list(shape)}")


@rule(
    "QDQ115", "block-size", severity=Severity.WARNING, fix="INT4 in blocks of 64 or 128 along K, FP4 in blocks of 16."
)
def block_size(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT's documentation names INT4 in blocks of 64 or 128, FP4 of 16 and MXFP8 of 32, and no blocks for INT8.

    TensorRT for RTX takes any block that divides the axis; INT4 blocks smaller than the axis stay fused with their
    GEMM, while the rest is dequantized by a kernel of its own. It reads no ``block_size``: with a last block that
    is not full it spreads the scales evenly, which is an error.

    Source: TensorRT documentation, "Quantization Schemes"; measured.
    """
    for q in graph.quantizers.values():
        if q.quantizes:
            continue
        held, data, scale = graph.dtype(q.data), graph.shape(q.data), q.scale.shape
        if data is None or scale is None or held not in _DOCUMENTED:
            continue
        blocked = len(scale) == len(data) > 1 and q.scale.size != 1
        axis = q.axis % len(data) if data else 0
        whole, many = data[axis] if data else None, scale[axis] if blocked else None
        if blocked and whole and many and whole % many == 0:
            yield from _judge(q, held, whole // many, _DOCUMENTED[held])
        elif held is ir.DataType.INT4 and not blocked:
            what = "INT4 without blocks is dequantized by a kernel of its own, and not documented"
            yield Hit(node=q.node, tensor=q.scale.value, message=what)


def _judge(q: Quantizer, held: ir.DataType, block: int, documented: tuple[int, ...]) -> Iterator[Hit]:
    if q.block_size and q.block_size != block:
        what = f"block_size {q.block_size} does not divide the axis; TensorRT reads blocks of {block}"
        yield Hit(node=q.node, tensor=q.scale.value, message=what, severity=Severity.ERROR)
    elif block not in documented:
        known = " or ".join(map(str, documented)) or "none"
        what = f"{held.name} in blocks of {block}; documented: {known}"
        yield Hit(node=q.node, tensor=q.scale.value, message=what)
