"""Remove what no output depends on."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes

from pipeline.graph.passes.graph_pass import GraphPass


class RemoveUnused(GraphPass):
    """Remove unused nodes, initializers and opset imports."""

    name = "remove-unused"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes and initializers removed."""
        before = _size(model)
        onnx_passes.RemoveUnusedNodesPass()(model)
        onnx_passes.RemoveUnusedOpsetsPass()(model)
        return before - _size(model)


def _size(model: ir.Model) -> int:
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph)) + len(model.graph.initializers)
