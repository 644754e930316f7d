"""Make every constant an initializer of the main graph: one place to look for weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from pipeline.graph.passes.constants import become_constant
from pipeline.graph.passes.graph_pass import CONTROL_FLOW, GraphPass, is_op, visible_nodes


class LiftConstants(GraphPass):
    """Turn Constant nodes and subgraph initializers into initializers of the main graph.

    String and sparse constants stay nodes, and so does a constant that a subgraph returns. Subgraphs that may not see
    outer values (those of custom operators) keep theirs.
    """

    name = "lift-constants"

    def change(self, model: ir.Model) -> int:
        """Return the number of Constant nodes lifted. Value names must be unique in the whole model."""
        count = 0
        for node in list(visible_nodes(model)):
            for graph in _subgraphs(node):
                _lift_initializers(model, graph)
            if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = _tensor(node)
            if tensor is not None:
                become_constant(model, node, tensor)
                count += 1
        return count


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    if node.domain or node.op_type not in CONTROL_FLOW:
        return
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _lift_initializers(model: ir.Model, graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]
            model.graph.register_initializer(value)


def _tensor(node: ir.Node) -> ir.TensorProtocol | None:
    if len(node.attributes) != 1:
        return None
    name, attribute = next(iter(node.attributes.items()))
    if name == "value":
        tensor = attribute.as_tensor()
        return None if tensor.dtype == ir.DataType.STRING else tensor
    if name in ("value_int", "value_ints"):
        return ir.tensor(attribute.value, dtype=ir.DataType.INT64)
    if name in ("value_float", "value_floats"):
        return ir.tensor(attribute.value, dtype=ir.DataType.FLOAT)
    return None
