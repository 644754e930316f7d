"""Compute equal expressions once."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from pipeline.graph.passes.graph_pass import GraphPass, has_subgraph, is_random

SIMPLE = {ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING}
LISTS = {ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS}


class MergeDuplicates(GraphPass):
    """Merge nodes of one graph that have the same operator, inputs and attributes.

    (onnx_ir's own pass also merges custom operators and Bernoulli, which may differ from call to call.)
    """

    name = "merge-duplicates"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes merged away. The graph must be sorted."""
        count = 0
        for graph in list(model.graphs()):
            first: dict[Hashable, ir.Node] = {}
            for node in list(graph):
                key = _key(node)
                if key is None or first.setdefault(key, node) is node:
                    continue
                for output, kept in zip(node.outputs, first[key].outputs, strict=True):
                    output.replace_all_uses_with(kept)
                    if output.name and not kept.name:
                        kept.name = output.name
                graph.remove(node, safe=True)
                count += 1
        return count


def _key(node: ir.Node) -> Hashable | None:
    if is_random(node) or has_subgraph(node) or not node.inputs or any(o.is_graph_output() for o in node.outputs):
        return None
    attributes: list[tuple[str, Hashable]] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref() or attribute.type not in SIMPLE | LISTS:
            return None
        attributes.append((name, attribute.value if attribute.type in SIMPLE else tuple(attribute.value)))
    return (node.domain, node.op_type, len(node.outputs), tuple(id(v) for v in node.inputs), tuple(attributes))
