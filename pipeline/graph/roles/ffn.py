"""Feed-forward networks: a residual branch that ends GEMM, activation (times gate), GEMM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.flow import Flow
from pipeline.graph.roles.residual import Residual
from pipeline.types import Role

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """One feed-forward network: the role of each GEMM, and the add that ends its branch."""

    roles: dict[ir.Node, Role]
    down: ir.Node
    residual: Residual


def find_feed_forwards(
    flow: Flow, residuals: Mapping[ir.Node, Residual], taken: Collection[ir.Node]
) -> list[FeedForward]:
    """Return every feed-forward network in topological order.

    Only a branch that a residual add ends counts, which tells a block's FFN from the layers of a classifier.
    ``taken`` are layers that belong to an attention.
    """
    found: list[FeedForward] = []
    used = set(taken)

    def through(node: ir.Node) -> bool:
        return node.op_type in ops.LINEAR_PATH and node not in residuals

    for residual in residuals.values():
        for down in flow.back(residual.branch, through).ends:
            if not flow.is_gemm(down) or down in used:
                continue
            roles = _expansion(flow, down, residuals, used)
            if roles:
                used.update(roles, {down})
                found.append(FeedForward(roles=roles | {down: Role.FFN_DOWN}, down=down, residual=residual))
    return found


def _expansion(
    flow: Flow, down: ir.Node, residuals: Collection[ir.Node], used: Collection[ir.Node]
) -> dict[ir.Node, Role]:
    """Return the up and gate layers that feed ``down`` through an activation; empty if there are none."""
    bent: set[ir.Node] = set()  # reached through an activation on some path
    straight: set[ir.Node] = set()
    stack = [(value, False) for value in flow.data(down)]
    seen = set(stack)
    while stack:
        value, nonlinear = stack.pop()
        node = flow.producer(value)
        if node is None or node in residuals:
            continue
        if flow.is_gemm(node):
            (bent if nonlinear else straight).add(node)
            continue
        if node.op_type not in ops.FFN_PATH and not flow.is_depthwise(node):
            continue
        for state in ((v, nonlinear or node.op_type in ops.ACTIVATION) for v in flow.data(node)):
            if state not in seen:
                seen.add(state)
                stack.append(state)
    layers = sorted((bent | straight).difference(used), key=flow.position.__getitem__)
    if not bent.difference(used):
        return {}
    # SwiGLU and its kin multiply an activated layer (the gate) with a plain one (up); with one kind only, it is up.
    gated = any(layer not in bent for layer in layers)
    return {layer: Role.FFN_GATE if gated and layer in bent else Role.FFN_UP for layer in layers}
