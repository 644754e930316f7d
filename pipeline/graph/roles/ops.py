"""Tables of operators by what they do to a signal, as far as recognising roles needs it."""

from __future__ import annotations

BLOCKS = frozenset({"MatMulNBits", "MatMulBnb4"})
"""Products with weights in blocks."""
GEMM = BLOCKS | {"MatMul", "Gemm", "Einsum", "FusedMatMul", "FusedGemm"}
"""Matrix products: with one constant operand a layer, with two activations a contraction."""

CONV = frozenset({"Conv", "ConvTranspose", "FusedConv"})

FUSED_ATTENTION = frozenset(
    {
        "Attention",
        "DecoderMaskedMultiHeadAttention",
        "GroupQueryAttention",
        "MultiHeadAttention",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "SparseAttention",
    }
)
"""Whole attention cores in one node: ONNX opset 23 ``Attention`` and ONNX Runtime's operators."""

LAYOUT = frozenset(
    {
        "Cast",
        "CastLike",
        "Concat",
        "DequantizeLinear",
        "DepthToSpace",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
    }
)
"""Moves, copies, selects or converts values without computing."""

ARITHMETIC = frozenset({"Add", "Div", "Mul", "Neg", "Sub", "Sum", "Where"})

NORM = frozenset(
    {
        "BatchNormalization",
        "GroupNorm",
        "GroupNormalization",
        "InstanceNormalization",
        "LRN",
        "LayerNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)

NORM_PARTS = frozenset({"Abs", "Max", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "Sqrt"})
"""What norms are made of where an exporter wrote them out."""

ACTIVATION = frozenset(
    {
        "BiasGelu",
        "Celu",
        "Clip",
        "Elu",
        "Erf",
        "FastGelu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "PRelu",
        "QuickGelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Silu",
        "Softplus",
        "Softsign",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    }
)

POOL = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Resize", "Upsample"})

SKIP_NORM = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
"""ONNX Runtime's residual add and norm in one node."""

LINEAR_PATH = LAYOUT | ARITHMETIC | NORM | NORM_PARTS | {"RotaryEmbedding"}
"""What may lie between a projection and the attention matmuls: head splits, RoPE, cache, grouped-query repeats, norms."""

SCORES_PATH = LAYOUT | ARITHMETIC | {"Abs", "Clip", "Max", "Min", "Tanh"}
"""What may lie between the scores matmul and the softmax: scale, mask, position bias, soft cap."""

FFN_PATH = LINEAR_PATH | ACTIVATION

NO_DATA = frozenset({"ConstantOfShape", "EyeLike", "Range", "Shape", "Size"})
"""Outputs carry sizes and not the signal."""

FIRST_INPUT_DATA = LAYOUT.difference({"Concat"}) | {
    "Clip",
    "CumSum",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSum",
    "Resize",
    "RotaryEmbedding",
    "TopK",
    "Upsample",
}
"""Only the first input carries the signal; the others are shapes, axes, indices, bounds, tables or scales."""
