"""Rules about where pairs stand around Concat and Add."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import CONVS, PRODUCTS
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import Quantizer
from pipeline.lint.repair import any_of, bypass, rescale
from pipeline.lint.rule import Hit, rule


def share_concat_scales(graph: QdqGraph, hit: Hit) -> bool:
    """Give every pair in front of a Concat the largest of their scales: nothing saturates that did not before."""
    pairs = concatenated(graph, hit.node)
    before = [graph.origins(q.data) for q in pairs]
    scales = [float(q.scale.array.reshape(-1)[0]) for q in pairs if q.scale.array is not None]
    if len(scales) != len(pairs) or any(len(b) != 1 or not b[0].per_tensor for b in before):
        return False
    return any_of(rescale(graph, q, max(scales)) for q in dict.fromkeys(b[0] for b in before))


def free_one_branch(graph: QdqGraph, hit: Hit) -> bool:
    """Take the pair out of the branch that a product made, so that the residual branch alone is quantized."""
    made = [i for i, v in enumerate(hit.node.inputs) if _is_product(graph, graph.dequantizer(v))]
    return bypass(graph, hit.node, made[0] if made else 0)


def _is_product(graph: QdqGraph, q: Quantizer | None) -> bool:
    before = () if q is None else graph.origins(q.data)
    producer = before[0].data.producer() if before else None
    while producer is not None and producer.op_type == "Add":  # a bias
        producer = next((p for v in producer.inputs if v is not None and (p := v.producer()) is not None), None)
    return producer is not None and producer.op_type in PRODUCTS


@rule(
    "QDQ205",
    "unshared-concat-scales",
    severity=Severity.WARNING,
    fix="Give all inputs of the Concat the largest of their scales, or quantize its output again.",
    repair=share_concat_scales,
)
def unshared_concat_scales(graph: QdqGraph) -> Iterator[Hit]:
    """A product that reads a Concat multiplies INT8 only if all parts share one scale.

    With different scales it runs in floating point (a convolution moved half as many bytes again); where the Concat's
    output is quantized again, different scales cost nothing.

    Source: TensorRT documentation, "Q/DQ Layer-Placement Recommendations"; measured.
    """
    for node in graph.nodes:
        if node.op_type != "Concat" or node.domain != "":
            continue
        scales = {float(q.scale.array.reshape(-1)[0]) for q in concatenated(graph, node) if q.scale.array is not None}
        if len(scales) < 2:
            continue
        readers = [n for n in graph.readers(node.outputs[0]) if n.op_type in PRODUCTS]
        if readers:
            what = f"{len(scales)} different scales, {min(scales):.4g} to {max(scales):.4g}, in front of {readers[0].op_type}"
            yield Hit(node=node, tensor=node.outputs[0], message=what)


def concatenated(graph: QdqGraph, node: ir.Node) -> list[Quantizer]:
    """Return the DQ of every input that is dequantized with one scale."""
    found = [graph.dequantizer(value) for value in node.inputs]
    return [q for q in found if q is not None and q.per_tensor]


@rule(
    "QDQ206",
    "both-add-branches",
    severity=Severity.NOTE,
    fix="Where full TensorRT shows a slower engine, leave the branch that a product made in floating point.",
    repair=free_one_branch,
)
def both_add_branches(graph: QdqGraph) -> Iterator[Hit]:
    """Quantize the residual branch of an Add only, says the literature.

    So the Add fuses with the product before it. TensorRT for RTX fuses neither way, and moved fewer bytes with both
    branches quantized; only full TensorRT on a GPU can tell.

    Source: TensorRT documentation, "Q/DQ Layer-Placement Recommendations"; measured to be false for TensorRT for
    RTX.
    """
    if graph.target is not None and graph.target.runtime == "tensorrt-rtx":
        return
    for node in graph.nodes:
        if node.op_type != "Add" or len(node.inputs) != 2:
            continue
        both = [graph.dequantizer(v) for v in node.inputs]
        if all(q is not None and not graph.is_constant(q.data) for q in both):
            yield Hit(node=node, message="both branches are quantized")


@rule("QDQ210", "one-sided", severity=Severity.WARNING, fix="Quantize both operands, or neither.")
def one_sided(graph: QdqGraph) -> Iterator[Hit]:
    """A convolution multiplies INT8 or FP8 only if its input and its weight are both quantized.

    With one of them, it is a float convolution with more kernels. The same holds of a matrix product whose
    activation alone is quantized. One whose weight alone is quantized stays fused: weight-only quantization.

    Source: measured.
    """
    for node in graph.nodes:
        if node.op_type not in PRODUCTS or node.domain != "" or len(node.inputs) < 2:
            continue
        left, right = (graph.dequantizer(v) for v in node.inputs[:2])
        constant = node.inputs[1] is not None and graph.is_constant(node.inputs[1])
        if left is not None and right is None and constant:
            yield Hit(node=node, tensor=node.inputs[1], message="its input is quantized and its weight is not")
        elif right is not None and left is None and node.op_type in CONVS:
            yield Hit(node=node, tensor=node.inputs[0], message="its weight is quantized and its input is not")
