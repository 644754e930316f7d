"""Rules about biases."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import BIAS, GEMMS
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import Quantizer
from pipeline.lint.repair import dequantize_constant
from pipeline.lint.rule import Hit, rule


@rule("QDQ107", "quantized-bias", fix="Keep biases in floating point.", repair=dequantize_constant)
def quantized_bias(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT adds biases in floating point.

    Its parser refuses a DequantizeLinear of INT32, which is how ONNX Runtime stores biases; a bias in INT8
    compiles, with a kernel more for a convolution, and loses accuracy for nothing.

    Source: onnx-tensorrt: "input has type Int32 but must have type FP8, FP4, Int4, Int8"; measured.
    """
    for q in graph.of_kind(quantizes=False):
        if is_bias(graph, q):
            held = graph.dtype(q.data)
            assert held is not None
            refused = held is ir.DataType.INT32
            severity = Severity.ERROR if refused else Severity.WARNING
            yield Hit(node=q.node, tensor=q.data, message=f"a bias stored in {held.name}", severity=severity)


def is_bias(graph: QdqGraph, q: Quantizer) -> bool:
    """Whether every reader of a DQ's constant adds it as a bias: a Conv or Gemm, or an Add to a matrix product."""
    source = q.data
    for before in graph.origins(q.data)[:1]:
        source = before.data
    if not graph.is_constant(source) or graph.dtype(q.data) is None:
        return False
    uses = [(reader, index) for reader, index in q.output.uses()]
    return bool(uses) and all(_adds(graph, q, reader, index) for reader, index in uses)


def _adds(graph: QdqGraph, q: Quantizer, reader: ir.Node, index: int) -> bool:
    if BIAS.get(reader.op_type) == index:
        return True
    shape = graph.shape(q.data)
    if reader.op_type != "Add" or shape is None or len(shape) != 1:
        return False
    other = reader.inputs[1 - index]
    producer = None if other is None else other.producer()
    return producer is not None and producer.op_type in GEMMS
