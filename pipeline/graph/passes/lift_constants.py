"""Make every constant an initializer of the main graph: one place to look for weights."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes

from pipeline.graph.passes.constants import become_constant
from pipeline.graph.passes.graph_pass import GraphPass, is_op


class LiftConstants(GraphPass):
    """Turn Constant nodes and subgraph initializers into initializers of the main graph.

    String and sparse constants stay nodes, and so does a constant that a subgraph returns.
    """

    name = "lift-constants"

    def change(self, model: ir.Model) -> int:
        """Return the number of Constant nodes lifted. Value names must be unique in the whole model."""
        onnx_passes.LiftSubgraphInitializersToMainGraphPass()(model)
        count = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = _tensor(node)
            if tensor is not None:
                become_constant(model, node, tensor)
                count += 1
        return count


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
