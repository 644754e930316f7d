"""Attention: from each softmax back to the scores matmul and its projections, and on to context and output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.flow import Flow
from pipeline.types import Role

if TYPE_CHECKING:
    import onnx_ir as ir

_PROJECTIONS_INSIDE = ("PackedAttention",)
"""Operators whose inputs are the hidden states and the fused QKV weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention and the role of each of its nodes; ``cross`` when keys come from elsewhere than queries."""

    roles: dict[ir.Node, Role]
    anchor: ir.Node
    outputs: list[ir.Node]
    cross: bool


def find_attentions(flow: Flow, residuals: Collection[ir.Node]) -> list[Attention]:
    """Return every attention in topological order.

    A softmax belongs to an attention if it reads a product of two activations and feeds another. Both operands of the
    first lead back to the query and key projections, the other operand of the second to the value projection.
    """
    found: list[Attention] = []
    taken: dict[ir.Node, Role] = {}
    for node in flow.nodes:
        if node.op_type == "Softmax":
            attention = _from_softmax(flow, node, residuals)
        elif node.op_type in ops.FUSED_ATTENTION:
            attention = _from_fused(flow, node, residuals)
        else:
            continue
        if attention is not None:
            roles = {n: role for n, role in attention.roles.items() if n not in taken}
            taken |= roles
            found.append(
                Attention(roles=roles, anchor=attention.anchor, outputs=attention.outputs, cross=attention.cross)
            )
    return found


def score_sums(flow: Flow) -> set[ir.Node]:
    """Return the nodes between each scores matmul and its softmax: scale, mask and position bias.

    They are no residual adds, though a mask that all layers share is an ancestor of every later layer's scores.
    """
    found: set[ir.Node] = set()
    for softmax in flow.nodes:
        if softmax.op_type != "Softmax" or not flow.data(softmax):
            continue
        walk = flow.back(flow.data(softmax)[0], lambda node: node.op_type in ops.SCORES_PATH)
        reached = {node for node in walk.ends if flow.is_contraction(node)}
        for node in sorted(walk.passed, key=flow.position.__getitem__):
            if any(value.producer() in reached for value in flow.data(node)):
                reached.add(node)
                found.add(node)
    return found


def _from_softmax(flow: Flow, softmax: ir.Node, residuals: Collection[ir.Node]) -> Attention | None:
    if not flow.data(softmax):
        return None

    def through(node: ir.Node) -> bool:
        return node.op_type in ops.SCORES_PATH and node not in residuals

    scores = [node for node in flow.back(flow.data(softmax)[0], through).ends if flow.is_contraction(node)]
    after = flow.forward(softmax, through)
    contexts = [node for node in after.ends if flow.is_contraction(node)]
    if not scores or not contexts:
        return None
    probabilities = {softmax, *after.passed}
    values = [v for node in contexts for v in flow.data(node) if flow.producer(v) not in probabilities]
    sides = [_query_key(flow, node, softmax) for node in scores]
    roles = {softmax: Role.ATTENTION_SOFTMAX}
    roles |= dict.fromkeys(scores, Role.ATTENTION_SCORES) | dict.fromkeys(contexts, Role.ATTENTION_CONTEXT)
    operands = ([query for query, _ in sides], [key for _, key in sides], values)
    return _attention(flow, operands, contexts[0], roles, residuals)


def _from_fused(flow: Flow, node: ir.Node, residuals: Collection[ir.Node]) -> Attention:
    inside = node.op_type in _PROJECTIONS_INSIDE or (node.op_type == "Attention" and node.domain == "com.microsoft")
    operands: list[list[ir.Value]] = [[], [], []]
    for index, value in enumerate(() if inside else node.inputs[:3]):
        if value is not None and not flow.is_constant(value):
            operands[index].append(value)
    if not operands[1] and not operands[2]:  # packed: the first input holds query, key and value
        operands[1] = operands[2] = operands[0]
    roles = {node: Role.ATTENTION_CONTEXT}
    return _attention(flow, (operands[0], operands[1], operands[2]), node, roles, residuals)


def _attention(
    flow: Flow,
    operands: tuple[list[ir.Value], list[ir.Value], list[ir.Value]],
    context: ir.Node,
    roles: dict[ir.Node, Role],
    residuals: Collection[ir.Node],
) -> Attention:
    query, key, value = (_projections(flow, values, residuals) for values in operands)
    for role, layers in (
        (Role.ATTENTION_QUERY, query),
        (Role.ATTENTION_KEY, key),
        (Role.ATTENTION_VALUE, value),
    ):
        for layer in layers:
            roles[layer] = Role.ATTENTION_QKV if layer in roles else role

    def through(node: ir.Node) -> bool:
        return node.op_type in ops.LINEAR_PATH and node not in residuals

    outputs = [node for node in flow.forward(context, through).ends if node in flow.weights and node not in roles]
    roles |= dict.fromkeys(outputs, Role.ATTENTION_OUTPUT)
    return Attention(roles=roles, anchor=context, outputs=outputs, cross=_is_cross(flow, query, key))


def _projections(flow: Flow, values: list[ir.Value], residuals: Collection[ir.Node]) -> list[ir.Node]:
    def through(node: ir.Node) -> bool:
        return (node.op_type in ops.LINEAR_PATH or flow.is_depthwise(node)) and node not in residuals

    ends = (node for value in values for node in flow.back(value, through).ends)
    return [node for node in dict.fromkeys(ends) if node in flow.weights]


def _query_key(flow: Flow, scores: ir.Node, softmax: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the query and key operand: softmax sums over keys, so the key makes the axis it works on."""
    left, right = flow.data(scores)[:2]
    if scores.op_type == "Einsum":
        terms, _, result = scores.attributes.get_string("equation", "").replace(" ", "").partition("->")
        key_first = bool(result) and result[-1] in terms.partition(",")[0]
    else:
        key_first = softmax.attributes.get_int("axis", -1) == -2
    return (right, left) if key_first else (left, right)


def _is_cross(flow: Flow, query: list[ir.Node], key: list[ir.Node]) -> bool:
    def sources(layers: list[ir.Node]) -> set[ir.Value]:
        return {flow.root(value) for layer in layers for value in flow.data(layer)}

    return bool(query and key) and sources(query).isdisjoint(sources(key))
