"""Refuse a model that is quantized already: quantizing twice would silently lose accuracy."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass, all_nodes

QDQ = ("QuantizeLinear", "DequantizeLinear")
OTHERS = [
    "DynamicQuantizeLinear",
    "MatMulNBits",
    "MatMulBnb4",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeLSTM",
    "QAttention",
    "QGemm",
    "QEmbedLayerNormalization",
    "QMoE",
    "QOrderedMatMul",
    "GatherBlockQuantized",
    "MatMulFpQ4",
]


def is_quantization(node: ir.Node) -> bool:
    """Whether a node quantizes, dequantizes, or computes in integers."""
    return (
        node.op_type in QDQ
        or node.op_type in OTHERS
        or node.op_type.startswith(("QLinear", "QOrdered"))
        or node.op_type.endswith("Integer")
    )


class RefuseQuantization(GraphPass):
    """Raise where the model carries quantization; the message says how much, where, and what to do."""

    name = "refuse-quantization"

    def change(self, model: ir.Model) -> int:
        """Return 0, or raise :class:`ModelError`."""
        found = [node for node in all_nodes(model) if is_quantization(node)]
        if not found:
            return 0
        example = found[0]
        pairs = all(node.op_type in QDQ for node in found)
        raise ModelError(
            f"The model is quantized already: {len(found)} {'Q/DQ' if pairs else 'quantized'} nodes.",
            where=f"node {example.name or example.outputs[0].name!r} ({example.op_type})",
            fix=(
                "Start from the float model, or take the Q/DQ pairs out first with `strip_quantization: true`."
                if pairs
                else "Start from the float model; only Q/DQ pairs can be taken out."
            ),
        )
