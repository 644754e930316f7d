"""Tell constants from inputs: an initializer that is listed as an input, too, could be overridden by a caller."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes

from pipeline.graph.passes.graph_pass import GraphPass


class OwnInitializers(GraphPass):
    """Make initializers that are also listed as inputs (required before IR 4) plain constants."""

    name = "own-initializers"

    def change(self, model: ir.Model) -> int:
        """Return the number of inputs taken off the list."""
        before = len(model.graph.inputs)
        onnx_passes.RemoveInitializersFromInputsPass()(model)
        return before - len(model.graph.inputs)
