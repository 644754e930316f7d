"""The key-value cache: where past keys or values and new ones are joined into what the next step reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.graph.roles.flow import Flow

if TYPE_CHECKING:
    import onnx_ir as ir


def find_caches(flow: Flow) -> list[ir.Node]:
    """Return each Concat of a model input and new values whose result is a model output.

    Nothing else may read the input but for its size: what is stored can then have a type of its own.
    """
    return [node for node in flow.nodes if _joins_past(node)]


def _joins_past(node: ir.Node) -> bool:
    if node.op_type != "Concat" or len(node.inputs) != 2 or not node.outputs[0].is_graph_output():
        return False
    past, new = node.inputs
    return (
        past is not None
        and past.is_graph_input()
        and new is not None
        and new.producer() is not None
        and all(reader is node or reader.op_type == "Shape" for reader, _ in past.uses())
    )
