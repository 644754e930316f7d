"""Residual adds: an Add whose one input is a skip path around the layers behind the other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.flow import Flow

if TYPE_CHECKING:
    import onnx_ir as ir

_SKIP_STEPS = 8
"""Reshapes, pools and norms that a skip path may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """``add`` joins ``branch`` with what left the main path at ``skip``; ``path`` lies between the two."""

    add: ir.Node
    skip: ir.Value
    branch: ir.Value
    path: list[ir.Node]


def find_residuals(flow: Flow, excluded: Collection[ir.Node]) -> dict[ir.Node, Residual]:
    """Return the residual add of each node that is one.

    Adds of a bias, mask, position or embedding, RoPE's sum and the sums within a GELU are none: their one input does
    not come from the other through a layer with weights. ``excluded`` are nodes known to be something else.
    """
    found: dict[ir.Node, Residual] = {}
    for node in flow.nodes:
        if node in excluded:
            continue
        operands = flow.data(node)
        if node.op_type in ops.SKIP_NORM:
            operands = operands[:2]
        elif node.op_type not in ("Add", "Sum"):
            continue
        if len(operands) != 2 or operands[0] is operands[1] or _shapes_differ(*operands):
            continue
        residual = _residual(flow, node, operands[0], operands[1])
        if residual is not None:
            found[node] = residual
    return found


def _residual(flow: Flow, node: ir.Node, left: ir.Value, right: ir.Value) -> Residual | None:
    orders = ((left, right), (right, left))
    plain = ((branch, skip) for branch, skip in orders)
    # A shortcut that is reshaped, pooled or projected: look where it left the main path.
    stripped = ((branch, value) for branch, skip in orders for value in _behind(flow, skip))
    for branch, skip in (*plain, *stripped):
        path = flow.between(skip, branch)
        if any(step in flow.weights for step in path):
            return Residual(add=node, skip=skip, branch=branch, path=path)
    return None


def _behind(flow: Flow, value: ir.Value) -> list[ir.Value]:
    found: list[ir.Value] = []
    projected = False
    for _ in range(_SKIP_STEPS):
        node = flow.producer(value)
        if node is None or len(flow.data(node)) != 1:
            break
        if node in flow.weights and node.op_type in ops.CONV and not projected:
            projected = True
        elif node.op_type not in ops.LAYOUT | ops.POOL | ops.ARITHMETIC | ops.NORM:
            break
        value = flow.data(node)[0]
        found.append(value)
    return found


def _shapes_differ(left: ir.Value, right: ir.Value) -> bool:
    if left.shape is None or right.shape is None:
        return False
    if len(left.shape) != len(right.shape):
        return True
    pairs = zip(left.shape, right.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
