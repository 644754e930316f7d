"""Put nodes in topological order."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes

from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass


class SortNodes(GraphPass):
    """Sort the graph and its subgraphs, stably."""

    name = "sort"

    def change(self, model: ir.Model) -> int:
        """Return 1 if the order changed; raise :class:`ModelError` if the graph has a cycle."""
        try:
            return int(onnx_passes.TopologicalSortPass()(model).modified)
        except ValueError as error:
            raise ModelError(
                "The graph has a cycle: a node depends on its own output.", fix="Export the model again."
            ) from error
