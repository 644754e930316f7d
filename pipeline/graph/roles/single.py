"""Roles that one node's own place decides: embeddings, convolutions, heads."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.flow import Flow, initializer, is_floating, static_shape
from pipeline.types import Role

if TYPE_CHECKING:
    import onnx_ir as ir


def find_embeddings(flow: Flow) -> list[ir.Node]:
    """Return lookups in a constant table of vectors, floating-point ``[rows, width]``."""
    return [node for node in flow.nodes if node.op_type == "EmbedLayerNormalization" or _is_lookup(flow, node)]


def find_convolutions(flow: Flow) -> dict[ir.Node, Role]:
    """Return the role of each convolution with constant weights; a stem reads an input through no other layer."""
    roles: dict[ir.Node, Role] = {}
    learned: set[ir.Node] = set()
    for node in flow.nodes:
        after_layer = any(value.producer() in learned for value in flow.data(node))
        if node in flow.weights and node.op_type in ops.CONV:
            if flow.is_depthwise(node):
                roles[node] = Role.DEPTHWISE_CONV
            else:
                roles[node] = Role.CONV if after_layer else Role.CONV_STEM
        if after_layer or node in flow.weights or _is_lookup(flow, node):
            learned.add(node)
    return roles


def find_heads(flow: Flow, blocks: Collection[ir.Node], taken: Collection[ir.Node]) -> list[ir.Node]:
    """Return the matrix products that turn features into outputs.

    In a model of blocks these are all that come after the last block (pooler, classifier, language-model head);
    in others the last before an output. A model's only layer is no head. ``taken`` have a role already.
    """
    before_layer = _upstream(flow, flow.weights)
    before_block = _upstream(flow, blocks)
    learned = {*flow.weights, *(node for node in flow.nodes if _is_lookup(flow, node))}
    after_layer, after_block = _downstream(flow, learned), _downstream(flow, blocks)
    heads: list[ir.Node] = []
    for node in flow.nodes:
        if not flow.is_gemm(node) or node in taken or node in blocks:
            continue
        last = node not in before_layer and node in after_layer
        if last or (node in after_block and node not in before_block):
            heads.append(node)
    return heads


def _is_lookup(flow: Flow, node: ir.Node) -> bool:
    if node.op_type != "Gather" or not flow.is_constant(node.inputs[0]) or not flow.data(node):
        return False
    table = node.inputs[0]
    if table is None:
        return False
    shape = static_shape(table) or static_shape(initializer(table))
    return shape is not None and len(shape) == 2 and is_floating(table)


def _upstream(flow: Flow, nodes: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes whose signal reaches one of ``nodes``."""
    found: set[ir.Node] = set()
    for node in reversed(flow.nodes):
        if any(other in nodes or other in found for other in flow.consumers(node)):
            found.add(node)
    return found


def _downstream(flow: Flow, nodes: Collection[ir.Node]) -> set[ir.Node]:
    """Return the nodes that the signal of one of ``nodes`` reaches."""
    found: set[ir.Node] = set()
    for node in flow.nodes:
        if any(value.producer() in nodes or value.producer() in found for value in flow.data(node)):
            found.add(node)
    return found
