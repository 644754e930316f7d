"""Keep the model's signature while other passes work: every output becomes an Identity of what computed it.

Between :class:`SealOutputs` and :class:`UnsealOutputs` no pass can rename, merge or lose an output by accident,
because no other node produces one.
"""

from __future__ import annotations

import onnx_ir as ir

from pipeline.graph.passes.constants import ValueNames
from pipeline.graph.passes.graph_pass import GraphPass, is_op


class SealOutputs(GraphPass):
    """Put an Identity before every model output that a node computes."""

    name = "seal-outputs"

    def change(self, model: ir.Model) -> int:
        """Return 0: the model is the same."""
        names = ValueNames(model)
        for index, output in enumerate(list(model.graph.outputs)):
            if output.producer() is None:
                continue
            name = output.name
            sealed = ir.Value(
                name=name, type=output.type, shape=output.shape.copy() if output.shape is not None else None
            )
            output.name = names.fresh(f"{name}_computed")
            node = ir.Node("", "Identity", [output], outputs=[sealed])
            model.graph.append(node)
            model.graph.outputs[index] = sealed
        return 0


class UnsealOutputs(GraphPass):
    """Let the nodes that compute the outputs produce them again; an Identity stays where that is impossible."""

    name = "unseal-outputs"

    def change(self, model: ir.Model) -> int:
        """Return 0: the model is the same."""
        graph = model.graph
        for node in list(graph):
            value = node.inputs[0] if is_op(node, "Identity") and node.outputs[0].is_graph_output() else None
            producer = value.producer() if value is not None else None
            if value is None:
                continue
            if producer is None or producer.graph is not graph or value.is_graph_output():
                continue
            _unseal(graph, node, value)
        return 0


def _unseal(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    output = node.outputs[0]
    index = next(i for i, v in enumerate(graph.outputs) if v is output)
    name = output.name
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    assert graph.outputs[index] is value
    graph.remove(node, safe=True)
    output.name = None
    value.name = name
    if output.type is not None:
        value.type = output.type
    if output.shape is not None:
        value.shape = output.shape
