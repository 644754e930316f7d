"""Refuse weights that are not finite: one NaN would silently become a scale of NaN."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline import model as files
from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass, is_op

MOVES = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear")
COMPUTES = [
    "MatMul",
    "Gemm",
    "Conv",
    "ConvTranspose",
    "LSTM",
    "GRU",
    "RNN",
    "LayerNormalization",
    "BatchNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "PRelu",
]


class CheckWeights(GraphPass):
    """Read every float initializer once, piece by piece, and refuse NaN; infinities where arithmetic would meet them.

    An infinity elsewhere is legitimate: attention masks are filled with it.
    """

    name = "check-weights"

    def change(self, model: ir.Model) -> int:
        """Return 0; raises :class:`ModelError` that names the initializer."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                _check(value)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            attribute = node.attributes.get("value")
            if is_op(node, "Constant") and attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                _check(node.outputs[0], attribute.as_tensor())
        return 0


def _check(value: ir.Value, tensor: ir.TensorProtocol | None = None) -> None:
    tensor = tensor or value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return
    infinite = False
    for piece in files.chunks(tensor):
        if np.isfinite(piece).all():
            continue
        if np.isnan(piece).any():
            raise _error("NaN", value)
        infinite = True
    if infinite and _computes(value):
        raise _error("infinite values", value)


def _computes(value: ir.Value) -> bool:
    return any(
        is_op(user, *COMPUTES) or (is_op(user, *MOVES) and any(map(_computes, user.outputs)))
        for user in value.consumers()
    )


def _error(what: str, value: ir.Value) -> ModelError:
    return ModelError(
        f"A weight holds {what}.",
        where=f"initializer {value.name!r}",
        fix="Training diverged or the export overflowed: export the model again from a good checkpoint, in FP32.",
    )
