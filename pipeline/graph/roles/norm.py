"""Norms: single operators, and LayerNorm or RMSNorm written out by an exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.flow import Flow

if TYPE_CHECKING:
    import onnx_ir as ir


def find_norms(flow: Flow) -> list[list[ir.Node]]:
    """Return the nodes of each norm, in topological order of their cores.

    A norm that is written out divides by ``sqrt(mean(x ** 2) + eps)``: it is found by the square root that reads a mean
    of squares. Its scale and shift are part of it.
    """
    found: list[list[ir.Node]] = []
    for node in flow.nodes:
        if node.op_type in ops.NORM:
            tail = _affine(flow, node, "Reshape") if node.op_type == "InstanceNormalization" else []
            found.append([node, *tail])
        elif node.op_type == "Sqrt":
            parts = _written_out(flow, node)
            if parts:
                found.append(parts)
    return found


def _written_out(flow: Flow, root: ir.Node) -> list[ir.Node]:
    before = _mean_of_squares(flow, root)
    if not before:
        return []
    after: list[ir.Node] = []
    node = root
    while True:
        consumers = flow.consumers(node)
        if len(consumers) != 1:
            return []
        node = consumers[0]
        after.append(node)
        if node.op_type in ("Mul", "Div") and len(flow.data(node)) == 2:
            return [*before, root, *after, *_affine(flow, node, "Cast")]
        if node.op_type not in ("Reciprocal", "Div", "Cast"):
            return []


def _mean_of_squares(flow: Flow, root: ir.Node) -> list[ir.Node]:
    """Return the nodes from the input to ``root``: [mean, subtract,] square, mean, add epsilon."""
    parts: list[ir.Node] = []
    node = _only_producer(flow, root)
    if node is not None and node.op_type in ("Add", "Max", "Clip"):
        parts.append(node)
        node = _only_producer(flow, node)
    if node is None or node.op_type != "ReduceMean":
        return []
    parts.append(node)
    square = _only_producer(flow, node)
    if square is None or not (square.op_type == "Pow" or (square.op_type == "Mul" and _squares(flow, square))):
        return []
    parts.append(square)
    centred = flow.producer(flow.data(square)[0])
    if centred is None:
        return parts[::-1]
    if centred.op_type == "Cast":
        # With more readers than square and product it converts the residual stream, not the norm's input.
        return [centred, *parts[::-1]] if len(flow.consumers(centred)) <= 2 else parts[::-1]
    means = [flow.producer(value) for value in flow.data(centred)]
    mean = next((n for n in means if n is not None and n.op_type == "ReduceMean"), None)
    if centred.op_type == "Sub" and mean is not None:
        # Some exporters subtract twice: once for the variance, once for the result.
        twins = [n for n in flow.consumers(mean) if n.op_type == "Sub"]
        return [mean, *twins, *parts[::-1]]
    return parts[::-1]


def _affine(flow: Flow, node: ir.Node, allowed: str) -> list[ir.Node]:
    """Return the multiplication and addition of constants that follow ``node``."""
    found: list[ir.Node] = []
    wanted = ["Mul", "Add"]
    while wanted:
        consumers = flow.consumers(node)
        if len(consumers) != 1:
            break
        node = consumers[0]
        if node.op_type in wanted and len(flow.data(node)) == 1:
            found.append(node)
            wanted = wanted[wanted.index(node.op_type) + 1 :]
        elif node.op_type == allowed and len(wanted) == 2:
            continue
        else:
            break
    return found


def _only_producer(flow: Flow, node: ir.Node) -> ir.Node | None:
    data = flow.data(node)
    return flow.producer(data[0]) if data else None


def _squares(flow: Flow, node: ir.Node) -> bool:
    data = flow.data(node)
    return len(data) == 2 and data[0] is data[1]
