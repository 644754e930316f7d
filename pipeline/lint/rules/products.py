"""Rules about products that are too small to gain from quantization."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.operators import GEMMS
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.rule import Hit, rule

LEAST = 16
"""Below this many elements of K or N the literature advises against quantizing a matrix product."""


@rule("QDQ207", "matrix-vector", severity=Severity.NOTE, fix="Compare with FP16 before you keep it quantized.")
def matrix_vector(graph: QdqGraph) -> Iterator[Hit]:
    """A product with a single row or column is bound by memory, and the literature advises to leave it in FP16.

    In TensorRT for RTX a single row costs one kernel more and moves half the bytes (weight of 512 x 512); a single
    column costs no kernel more and moves two thirds. So it is worth measuring.

    Source: Model-Optimizer's rules for placing Q/DQ; measured to be false of bytes.
    """
    for node, (rows, _, columns) in _quantized_products(graph):
        if rows == 1 or columns == 1:
            yield Hit(node=node, message="a product of a matrix and a single " + ("row" if rows == 1 else "column"))


@rule("QDQ208", "tiny-gemm", severity=Severity.WARNING, fix="Keep products with fewer than 16 values to sum in FP16.")
def tiny_gemm(graph: QdqGraph) -> Iterator[Hit]:
    """A quantized product that sums few values costs more than it saves.

    It writes its result once more than one in FP16, which computes what follows in its own kernel: K = 8 moved 2.9
    times the bytes. With few columns (N = 8) it moved fewer bytes than FP16.

    Source: Model-Optimizer's rules for placing Q/DQ (K or N < 16); measured: true of K, false of N.
    """
    for node, (_, summed, columns) in _quantized_products(graph):
        if summed is not None and summed < LEAST:
            yield Hit(node=node, message=f"it sums only {summed} values (K)")
        elif columns is not None and 1 < columns < LEAST:
            yield Hit(node=node, message=f"it has only {columns} columns (N)", severity=Severity.NOTE)


def _quantized_products(graph: QdqGraph) -> Iterator[tuple[ir.Node, tuple[int | None, int | None, int | None]]]:
    """Yield matrix products whose operands are both dequantized, with their (M, K, N) as far as they are known."""
    for node in graph.nodes:
        if node.op_type not in GEMMS or node.domain != "" or len(node.inputs) < 2:
            continue
        left, right = node.inputs[0], node.inputs[1]
        if left is None or right is None or not graph.dequantizer(left) or not graph.dequantizer(right):
            continue
        yield node, _extents(graph, node, left, right)


def _extents(
    graph: QdqGraph, node: ir.Node, left: ir.Value, right: ir.Value
) -> tuple[int | None, int | None, int | None]:
    rows, weight = graph.shape(left), graph.shape(right)
    if weight is None or len(weight) < 2:
        return None, None, None
    flipped = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    summed, columns = (weight[-1], weight[-2]) if flipped else (weight[-2], weight[-1])
    if rows is None or len(rows) < 2 or node.attributes.get_int("transA", 0) == 1:
        return None, summed, columns
    # A weight of two dimensions serves the rows of all leading dimensions at once.
    ahead = rows[:-1] if len(weight) == 2 else rows[-2:-1]
    known = [d for d in ahead if d is not None]
    return (prod(known) if len(known) == len(ahead) else None), summed, columns
