"""Rules about the quantized types that a product multiplies."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from pipeline.lint.operators import CONVS, PRODUCTS
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import QUANTIZED, Quantizer
from pipeline.lint.rule import Hit, rule

FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})
Operands = list[tuple[int, Quantizer]]
"""The dequantized operands of a product, with their input's index."""


@rule("QDQ113", "mixed-quantized-types", fix="Quantize both operands to one type, or only one of them.")
def mixed_quantized_types(graph: QdqGraph) -> Iterator[Hit]:
    """A matrix product or convolution multiplies operands of one quantized type.

    INT8 times FP8, INT4 or FP4 is refused by the builder, on every GPU.

    Source: measured: "MyelinCheckException: Input and filter have to be the same type".
    """
    for node, both in _products(graph):
        types = QUANTIZED & {graph.dtype(q.data) for _, q in both}
        if len(types) > 1 and _multiplies_codes(graph, node, both, types):
            names = " x ".join(sorted(t.name for t in types))
            yield Hit(node=node, message=f"{node.op_type} multiplies {names}")


def _multiplies_codes(graph: QdqGraph, node: ir.Node, both: Operands, types: Collection[ir.DataType]) -> bool:
    """Whether a product of two types is computed on the quantized values, so that the builder refuses it.

    Measured: with scales along the axis that is summed over it is computed in floating point; so is INT8 times INT4,
    unless both have one scale for all.
    """
    if types == {ir.DataType.INT8, ir.DataType.INT4}:
        return all(q.per_tensor for _, q in both)
    return not _along_sum(graph, node, both)


def _along_sum(graph: QdqGraph, node: ir.Node, both: Operands) -> bool:
    """Whether an operand has one scale for each element of the axis that the product sums over."""
    return any(_one_along_sum(graph, node, index, q) for index, q in both)


def _one_along_sum(graph: QdqGraph, node: ir.Node, index: int, q: Quantizer) -> bool:
    shape = graph.shape(q.data)
    if q.scale.size in (None, 1) or shape is None or q.scale.shape is None or len(q.scale.shape) != 1:
        return False
    axis = q.axis % len(shape)
    if node.op_type == "ConvTranspose":
        return axis == (1, 0)[index]
    if node.op_type == "Conv":
        return axis == 1
    flipped = node.attributes.get_int(("transA", "transB")[index], 0) == 1
    return axis == len(shape) - (1 if (index == 0) is not flipped else 2)


@rule(
    "QDQ118", "four-bit-product", fix="Quantize weights to 4 bits and keep the activations in 16 bits, or use blocks."
)
def four_bit_product(graph: QdqGraph) -> Iterator[Hit]:
    """A product of two 4-bit operands needs FP4 in blocks on both sides.

    A convolution of two 4-bit operands is refused by the builder. A matrix product of FP4 and FP4 crashes it, unless
    both have a scale for every block, or one has scales along the axis that is summed over.

    Source: measured for SM120.
    """
    for node, both in _products(graph):
        types = {graph.dtype(q.data) for _, q in both}
        if len(both) < 2 or not types <= FOUR_BITS:
            continue
        if node.op_type in CONVS:
            yield Hit(node=node, message=f"{node.op_type} of two 4-bit operands: the builder refuses it")
        elif types == {ir.DataType.FLOAT4E2M1} and not _in_blocks(both) and not _along_sum(graph, node, both):
            yield Hit(node=node, message=f"{node.op_type} of FP4 and FP4 without blocks: the builder crashes")


def _in_blocks(both: Operands) -> bool:
    return all(q.scale.shape is not None and len(q.scale.shape) > 1 for _, q in both)


def _products(graph: QdqGraph) -> Iterator[tuple[ir.Node, Operands]]:
    """Yield every product with its dequantized operands."""
    for node in graph.nodes:
        if node.op_type in PRODUCTS and node.domain == "":
            found = [(index, graph.dequantizer(value)) for index, value in enumerate(node.inputs[:2])]
            yield node, [(index, q) for index, q in found if q is not None]
