"""Replace calls of local functions by their bodies, so that every later pass sees plain operators."""

from __future__ import annotations

import onnx
import onnx.inliner
import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes

from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass
from pipeline.graph.passes.infer_shapes import InferShapes
from pipeline.graph.passes.without_weights import through_onnx


class InlineFunctions(GraphPass):
    """Inline all local functions.

    Functions of another opset than the model are inlined by onnx itself, which converts them on the way.
    """

    name = "inline-functions"

    def change(self, model: ir.Model) -> int:
        """Return the number of functions inlined."""
        count = len(model.functions)
        if not count:
            return 0
        try:
            if _same_opsets(model):
                onnx_passes.InlinePass()(model)
            else:
                InferShapes().change(model)  # onnx converts a body by the types of the call's inputs
                through_onnx(model, lambda proto: onnx.inliner.inline_local_functions(proto, convert_version=True))
            model.functions.clear()
        except (ValueError, RuntimeError, ir.passes.PreconditionError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"A local function cannot be inlined: {' '.join(str(error).split())[:300]}",
                where=", ".join(f"{function.domain}::{function.name}" for function in model.functions.values())[:200],
                fix="Inline the functions when exporting (torch: `optimize=True`).",
            ) from error
        return count


def _same_opsets(model: ir.Model) -> bool:
    return all(
        model.opset_imports.get(domain, version) == version
        for function in model.functions.values()
        for domain, version in function.opset_imports.items()
    )
