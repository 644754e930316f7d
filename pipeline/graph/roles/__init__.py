"""What each node is for: attention, feed-forward, norm, embedding, head, convolution; by dataflow, never by names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.graph.roles.attention import find_attentions, score_sums
from pipeline.graph.roles.blocks import number_blocks
from pipeline.graph.roles.cache import find_caches
from pipeline.graph.roles.ffn import find_feed_forwards
from pipeline.graph.roles.flow import Flow, node_key
from pipeline.graph.roles.norm import find_norms
from pipeline.graph.roles.residual import find_residuals
from pipeline.graph.roles.single import find_convolutions, find_embeddings, find_heads
from pipeline.types import NodeRole, Role

if TYPE_CHECKING:
    import onnx_ir as ir


def find_roles(model: ir.Model) -> dict[str, NodeRole]:
    """Return the role and block of every node of the main graph, by node name.

    Works on canonical graphs and, as far as their structure still shows, on raw exports: a node without a name goes by
    its first output's. Time grows linearly with the graph.
    """
    flow = Flow(model.graph)
    residuals = find_residuals(flow, score_sums(flow))
    attentions = find_attentions(flow, residuals)
    layers = {node: role for attention in attentions for node, role in attention.roles.items()}
    feed_forwards = find_feed_forwards(flow, residuals, layers)
    layers |= {node: role for ffn in feed_forwards for node, role in ffn.roles.items()}
    norms = find_norms(flow)
    blocks = number_blocks(flow, attentions, feed_forwards, residuals, norms)
    found = dict.fromkeys(flow.nodes, Role.OTHER)
    found |= {node: Role.LINEAR for node in flow.weights if flow.is_gemm(node)}
    found |= dict.fromkeys(residuals, Role.RESIDUAL_ADD)
    found |= dict.fromkeys((node for norm in norms for node in norm), Role.NORM)
    found |= dict.fromkeys(find_embeddings(flow), Role.EMBEDDING)
    found |= find_convolutions(flow)
    found |= dict.fromkeys(find_caches(flow), Role.KV_CACHE)
    found |= dict.fromkeys(find_heads(flow, blocks, layers), Role.HEAD)
    found |= layers
    return {node_key(node): NodeRole(role=role, block=blocks.get(node)) for node, role in found.items()}
