"""What a precision plan will weigh, before anything is built."""

from __future__ import annotations

import math

import onnx_ir as ir

from pipeline.graph.operands import operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.types import HALVES, QuantDType, QuantSpec

IR_BITS = {QuantDType.INT8: 8, QuantDType.INT4: 4, QuantDType.FP4_E2M1: 4, QuantDType.NF4: 4}
"""Bits of a weight in a block."""
SECOND_BLOCK = 256
"""Absolute maxima of NF4 blocks that share one of the second level."""


def expected_bytes(model: ir.Model, plan: PrecisionPlan) -> int:
    """Return the bytes of all weights as ``plan`` stores them; graph structure (some 100 kB) is not counted."""
    quantized = {n.node: n for n in plan.quantized()}
    narrow: dict[str, tuple[QuantSpec, int]] = {}
    for node in model.graph:
        found = operands(node)
        if node.name in quantized and found is not None and found.weight is not None:
            value = node.inputs[found.weight]
            shape = value.shape.numpy() if value is not None and value.shape is not None else ()
            channels = shape[found.channel_axis] if shape and found.channel_axis is not None else 1
            spec = plan.weight_spec(quantized[node.name])
            narrow[(value.name if value is not None else None) or ""] = spec, channels
    elsewhere = 2 if plan.elsewhere in HALVES else 4
    total = 0
    for name, value in model.graph.initializers.items():
        count = math.prod(value.shape.numpy()) if value.shape is not None else 0
        if name in narrow:
            (spec, channels), zero_point = narrow[name], 1 if plan.family == "cpu" else 0
            total += (
                count + channels * (elsewhere + zero_point)
                if spec.block is None
                else count * IR_BITS[spec.dtype] // 8 + _scale_bytes(count // spec.block, spec, elsewhere)
            )
        elif value.dtype is ir.DataType.FLOAT:
            total += count * elsewhere
        elif value.dtype is not None:
            total += math.ceil(count * value.dtype.itemsize)
    return total


def _scale_bytes(blocks: int, spec: QuantSpec, each: int) -> int:
    """Return what the scales of blocks take: doubly quantized a byte, and 4 for every 256 of them and for their mean."""
    second = math.ceil(blocks / SECOND_BLOCK)
    return second * (SECOND_BLOCK + 4) + 4 if spec.double else blocks * each
