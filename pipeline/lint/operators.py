"""Operators by what they do to a quantized value."""

from __future__ import annotations

import onnx_ir as ir

MOVES = frozenset(
    {
        "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Expand",
        "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "Concat",
    }
)  # fmt: skip
"""Operators that commute with Q and DQ: they only move values, or take their maximum."""

KEEPS_NARROW = frozenset(
    {"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Shape", "DepthToSpace",
     "SpaceToDepth"}
)  # fmt: skip
"""Operators that the builder lets read FP8, INT4 and FP4: its shuffle, concatenation, shape and identity layers."""

SAME_TYPE = frozenset(
    {
        *MOVES, "Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Sigmoid", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Abs", "Neg",
        "Reciprocal", "Softplus", "Softmax", "LogSoftmax", "Clip", "HardSigmoid", "HardSwish", "Pow", "Add", "Sub",
        "Mul", "Div", "Max", "Min", "Sum", "MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization",
        "BatchNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin",
        "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Pad", "Resize", "Dropout", "Where", "PRelu",
    }
)  # fmt: skip
"""Operators whose (first) output has the type of their first input (Where: of its last)."""

NOT_IMPORTABLE = frozenset(
    {
        "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QLinearAdd",
        "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere",
        "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QGemm", "QAttention",
        "QEmbedLayerNormalization", "QOrderedMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM", "MatMulBnb4", "GatherBlockQuantized", "QuantizeBFP", "DequantizeBFP",
    }
)  # fmt: skip
"""Quantized operators of ONNX and ONNX Runtime for which the parser's ``supports_operator`` is false."""

READS_NARROW = frozenset({"TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear", "TRT_MXFP8DequantizeLinear"})
"""TensorRT's own operators that read a quantized constant, as Model-Optimizer writes them."""

GEMMS = frozenset({"MatMul", "Gemm"})
CONVS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = GEMMS | CONVS

BIAS = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2}
"""The input that is a bias."""

SAME_OPERANDS: dict[str, slice] = {
    **dict.fromkeys(("MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization"), slice(0, 3)),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Equal", "Greater", "Less"), slice(0, 2)),
    **dict.fromkeys(("Concat", "Max", "Min", "Sum"), slice(0, None)),
    "Where": slice(1, 3),
}
"""Inputs that TensorRT wants of one type (it casts the operands of Pow and Clip itself)."""


def moved(node: ir.Node) -> tuple[ir.Value, ...]:
    """Return the inputs that a node of :data:`MOVES` moves; none for another node."""
    if node.op_type not in MOVES:
        return ()
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return tuple(value for value in inputs if value is not None)
