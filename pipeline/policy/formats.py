"""How each precision is stored for a family of targets."""

from __future__ import annotations

from pipeline.policy.plan import Format
from pipeline.recipe import PolicyConfig
from pipeline.types import Precision, QuantDType, QuantSpec

CPU_INT8 = Format(
    # uint8 x int8 is the pair of types that ONNX Runtime's CPU kernels are fast at: 1.8-2.5x of FP32, where
    # int8 x int8 is 0.8-1.05x and uint8 x uint8 1.0x.
    activations=QuantSpec(dtype=QuantDType.UINT8, symmetric=False),
    weights=QuantSpec(dtype=QuantDType.INT8),
    second=QuantSpec(dtype=QuantDType.INT8),
)
GPU_INT8 = Format(
    # TensorRT takes symmetric INT8 only.
    activations=QuantSpec(dtype=QuantDType.INT8),
    weights=QuantSpec(dtype=QuantDType.INT8),
    second=QuantSpec(dtype=QuantDType.INT8),
)
GPU_FP8 = Format(
    activations=QuantSpec(dtype=QuantDType.FP8_E4M3),
    weights=QuantSpec(dtype=QuantDType.FP8_E4M3),
    second=QuantSpec(dtype=QuantDType.FP8_E4M3),
)

FP4_BLOCK = 16
"""Elements of an FP4 block (NVFP4's; TensorRT takes no other)."""
INT4_BLOCK, NF4_BLOCK = 128, 64
"""Elements of a block where the recipe does not say; NF4's are the paper's."""


def block_size(policy: PolicyConfig) -> int:
    """Return how many INT4 weights share a scale where no rule says."""
    return policy.block_size or INT4_BLOCK


def weight_only(precision: Precision, policy: PolicyConfig, family: str) -> Format:
    """Return the format of weights alone: only what is stored, and read from memory, is narrow.

    Its block is for nodes that no rule gives one.
    """
    specs = {
        Precision.FP4: QuantSpec(dtype=QuantDType.FP4_E2M1, block=FP4_BLOCK),
        Precision.INT4: QuantSpec(dtype=QuantDType.INT4, block=block_size(policy)),
        # TensorRT multiplies INT8 weights with one scale a channel as they are stored, and widens blocks before; ONNX Runtime
        # the other way round.
        Precision.W8A16: QuantSpec(dtype=QuantDType.INT8, block=block_size(policy) if family == "cpu" else None),
        Precision.NF4: QuantSpec(
            dtype=QuantDType.NF4, block=policy.block_size or NF4_BLOCK, double=policy.double_quantization
        ),
    }
    return Format(activations=None, weights=specs[precision], second=None)
