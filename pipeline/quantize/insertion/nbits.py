"""Weights in blocks for ONNX Runtime on a CPU: ``com.microsoft.MatMulNBits``, which multiplies them as they are stored.

A DequantizeLinear in front of a MatMul is widened at every run, unless ONNX Runtime fuses the two, which it does not behind
MatMul + Add, beside a Gemm or for eight bits. With ``accuracy_level`` 4 the kernel rounds each row of the activation to INT8 in the weight's
blocks on the fly and multiplies integers; level 0 multiplies floats, many times slower.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graph.operands import Operands
from pipeline.quantize.weights.weight import QuantizedWeight
from pipeline.types import Array, QuantDType, QuantSpec

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
ACCURACY_LEVEL = 4
BITS = {QuantDType.INT4: 4, QuantDType.INT8: 8}


def has_kernel(node: ir.Node, what: Operands, spec: QuantSpec) -> bool:
    """Whether the product of this node with a weight stored like this can be one MatMulNBits (and an Add)."""
    value = node.inputs[0]
    bias = node.inputs[what.bias] if what.bias is not None else None
    return (
        node.op_type in ("MatMul", "Gemm")
        and spec.block is not None
        and spec.dtype in BITS
        and value is not None
        and value.dtype is ir.DataType.FLOAT
        and (bias is None or bias.const_value is not None)
    )


def packed(weight: QuantizedWeight, spec: QuantSpec, name: str) -> tuple[ir.LazyTensor, Array]:
    """Return the weight as the kernel wants it, computed while the model is saved, and its scales.

    Returns:
        uint8 ``[outputs, blocks, block * bits / 8]`` with the zero point 8 (INT4, two in a byte, the first in the low half) or
        128 (INT8), and float32 scales ``[outputs, blocks]``.
    """
    assert spec.block is not None
    bits, summed_axis = BITS[spec.dtype], weight.axis or 0
    by_output = weight.scale.T if summed_axis == 0 else weight.scale
    outputs, blocks = by_output.shape
    source = weight.tensor

    def compute() -> ir.TensorProtocol:
        values = source.numpy().astype(np.int16)
        rows = values.T if summed_axis == 0 else values
        unsigned = (rows.reshape(outputs, blocks, -1) + (1 << (bits - 1))).astype(np.uint8)
        return ir.tensor(unsigned if bits == 8 else unsigned[..., 0::2] | unsigned[..., 1::2] << 4)

    shape = ir.Shape((outputs, blocks, spec.block * bits // 8))
    return ir.LazyTensor(compute, dtype=ir.DataType.UINT8, shape=shape, name=name), np.ascontiguousarray(by_output)


def attributes(weight: QuantizedWeight, spec: QuantSpec) -> dict[str, int]:
    """Return the operator's attributes."""
    assert spec.block is not None
    blocks, outputs = weight.scale.shape if weight.axis == 0 else weight.scale.shape[::-1]
    return {
        "K": blocks * spec.block,
        "N": outputs,
        "bits": BITS[spec.dtype],
        "block_size": spec.block,
        "accuracy_level": ACCURACY_LEVEL,
    }


def bias_of(node: ir.Node, what: Operands, outputs: int) -> tuple[ir.Value | None, Array | None]:
    """Return what a Gemm adds: as the kernel's own bias (one value an output), or as an array for an Add behind it."""
    bias = node.inputs[what.bias] if what.bias is not None else None
    if bias is None or bias.const_value is None:
        return None, None
    beta = node.attributes.get("beta")
    factor = 1.0 if beta is None else beta.as_float()
    if factor == 1.0 and tuple(bias.const_value.shape.numpy()) == (outputs,):
        return bias, None
    values = bias.const_value.numpy()
    return None, (values * np.float32(factor)).astype(values.dtype)
