"""Rules about Q and DQ nodes that do not belong together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import KEEPS_NARROW
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import QUANTIZED, Quantizer
from pipeline.lint.repair import drop_unread
from pipeline.lint.rule import Hit, rule
from pipeline.types import Array


@rule(
    "QDQ201",
    "dangling-quantize",
    severity=Severity.WARNING,
    fix="Dequantize what is quantized, or remove the Q.",
    repair=drop_unread,
)
def dangling_quantize(graph: QdqGraph) -> Iterator[Hit]:
    """A Q should reach a DQ through operators that only move values.

    INT8 that something else computes on compiles to a cast of its own; FP8, INT4 and FP4 that something else reads,
    Gather, Slice and Split included, are refused by the builder.

    Source: measured: "Tensor has datatype FP8 but is not consumed by IDequantizeLayer, IConcatenationLayer,
    IShuffleLayer, IShapeLayer, or IdentityLayer".
    """
    for q in graph.of_kind(quantizes=True):
        if not q.output.uses() and not q.output.is_graph_output():
            yield Hit(node=q.node, tensor=q.output, message="nothing reads what it quantizes")
            continue
        if q.made is not ir.DataType.INT8 and (refused := _refused_reader(q.output)) is not None:
            what = f"{refused.op_type} reads {'' if q.made is None else q.made.name} that is not dequantized"
            yield Hit(node=q.node, tensor=q.output, message=what, severity=Severity.ERROR)
            continue
        others = [n for n in graph.readers(q.output) if n not in graph.quantizers]
        if others:
            what = f"{others[0].op_type} computes on quantized values that were not dequantized"
            yield Hit(node=q.node, tensor=q.output, message=what)
        elif graph.leaves(q.output):
            yield Hit(node=q.node, tensor=q.output, message="an output of the graph is quantized")


def _refused_reader(value: ir.Value) -> ir.Node | None:
    pending = [value]
    while pending:
        for user, index in pending.pop().uses():
            if user.op_type in KEEPS_NARROW:
                pending.extend(user.outputs)
            elif user.op_type != "DequantizeLinear" or index != 0:
                return user
    return None


@rule(
    "QDQ202",
    "dangling-dequantize",
    severity=Severity.WARNING,
    fix="Quantize in the graph, and let something read what is dequantized.",
    repair=drop_unread,
)
def dangling_dequantize(graph: QdqGraph) -> Iterator[Hit]:
    """A DQ should read a constant or what a Q made.

    A quantized input of the graph compiles, but its caller must know the scale; a DQ of values that a cast made, or
    one that nothing reads, does nothing for speed.

    Source: TensorRT documentation, "Q/DQ Layer-Placement Recommendations"; measured: all are accepted.
    """
    for q in graph.of_kind(quantizes=False):
        if not q.output.uses() and not q.output.is_graph_output():
            yield Hit(node=q.node, tensor=q.output, message="nothing reads what it dequantizes")
        elif not graph.is_constant(q.data) and not graph.origins(q.data) and graph.dtype(q.data) in QUANTIZED:
            producer = q.data.producer()
            source = "an input of the graph" if producer is None else f"the output of {producer.op_type}"
            yield Hit(node=q.node, tensor=q.data, message=f"it dequantizes {source}, which no Q made")


@rule("QDQ203", "mismatched-pair", severity=Severity.WARNING, fix="Give the DQ the scale of its Q.")
def mismatched_pair(graph: QdqGraph) -> Iterator[Hit]:
    """A DQ should have the scale that its Q divided by.

    Otherwise the values come back multiplied by the ratio; TensorRT computes just that.

    Source: ONNX DequantizeLinear; measured: accepted without a word.
    """
    for q in graph.of_kind(quantizes=False):
        for before in graph.origins(q.data):
            ours, theirs = q.scale.array, before.scale.array
            if ours is None or theirs is None or _same(ours, theirs):
                continue
            what = f"its scale {_show(q)} is not that of the Q, {_show(before)}"
            yield Hit(node=q.node, tensor=q.scale.value, message=what)
            break


def _same(left: Array, right: Array) -> bool:
    # FP16 and FP32 copies of one scale differ by rounding, at most 2**-11.
    return left.size == right.size and bool(np.allclose(left.reshape(-1), right.reshape(-1), rtol=1e-3, atol=0))


def _show(q: Quantizer) -> str:
    array = q.scale.array
    assert array is not None
    return f"{array.reshape(-1)[0]:.6g}" if array.size == 1 else f"[{array.size} scales]"


@rule("QDQ204", "per-channel-activation", severity=Severity.WARNING, fix="Use one scale for the whole activation.")
def per_channel_activation(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT documents per-channel scales for weights only.

    TensorRT for RTX takes them on activations, but where the axis is the one that a product sums over, the scales
    cannot be moved out of the sum and the product runs in floating point.

    Source: TensorRT documentation, "Quantization Schemes"; measured.
    """
    for q in graph.of_kind(quantizes=True):
        if q.scale.size not in (None, 1) and not graph.is_constant(q.data):
            what = f"{q.scale.size} scales on axis {q.axis} of an activation"
            yield Hit(node=q.node, tensor=q.data, message=what)
