"""Q and DQ nodes with their parameters, read the way TensorRT's ONNX importer reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.types import Array

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""The importer looks at the operator's name alone, so com.microsoft's pairs mean the same to it."""

QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1})
"""Types that TensorRT quantizes to."""
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
"""Types that it quantizes from (it reads DOUBLE as FLOAT)."""
MOST_VALUES = 1 << 20
"""Scales and zero points with more elements than this are not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameter:
    """A scale or a zero point.

    Attributes:
        value: The graph's value.
        dtype: Its type, where it is known.
        shape: Its shape, where it is known; an unknown dimension is ``None``.
        constant: Whether it is known before the engine runs.
        array: Its numbers as float64: initializers and constants, also behind Identity and Cast.
        checked: Whether the importer itself looks at the numbers: not if another node stands between.
    """

    value: ir.Value
    dtype: ir.DataType | None
    shape: tuple[int | None, ...] | None
    constant: bool
    array: Array | None
    checked: bool

    @property
    def size(self) -> int | None:
        """Return the number of elements, if the shape is known."""
        if self.shape is None or any(d is None for d in self.shape):
            return None
        return int(np.prod([d for d in self.shape if d is not None], dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear node.

    Attributes:
        node: The node.
        data: What it converts.
        scale: Its scale.
        zero_point: Its zero point, if it has one.
        axis: Channel or block axis as the importer takes it: 1 without the attribute, before opset 13 it is 0.
        block_size: The attribute; 0 without it. The importer never reads it.
        output_dtype: The attribute; ``None`` without it.
    """

    node: ir.Node
    data: ir.Value
    scale: Parameter
    zero_point: Parameter | None
    axis: int
    block_size: int
    output_dtype: ir.DataType | None

    @property
    def quantizes(self) -> bool:
        """Whether this is a Q, not a DQ."""
        return self.node.op_type == QUANTIZE

    @property
    def output(self) -> ir.Value:
        """Return what it makes."""
        return self.node.outputs[0]

    @property
    def made(self) -> ir.DataType | None:
        """Return the type that TensorRT gives the output.

        A Q without a type of its own, or with one that TensorRT does not quantize to, makes INT8. A DQ makes its
        scale's type.
        """
        if not self.quantizes:
            return self.output_dtype or self.scale.dtype
        if self.zero_point is not None:
            return self.zero_point.dtype if self.zero_point.dtype in QUANTIZED else ir.DataType.INT8
        return self.output_dtype or ir.DataType.INT8

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.scale.size == 1


def is_quantizer(node: ir.Node) -> bool:
    """Whether ``node`` is a Q or a DQ with the inputs that one has."""
    return (
        node.op_type in (QUANTIZE, DEQUANTIZE)
        and node.domain in DOMAINS
        and len(node.inputs) >= 2
        and node.inputs[0] is not None
        and node.inputs[1] is not None
    )


def quantizer(node: ir.Node, opset: int, parameter: Callable[[ir.Value], Parameter]) -> Quantizer:
    """Return what a Q or DQ node says."""
    data, scale = node.inputs[0], node.inputs[1]
    assert data is not None
    assert scale is not None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    made = node.attributes.get_int("output_dtype", 0)
    return Quantizer(
        node=node,
        data=data,
        scale=parameter(scale),
        zero_point=None if zero_point is None else parameter(zero_point),
        axis=node.attributes.get_int("axis", 0 if opset < 13 else 1),
        block_size=node.attributes.get_int("block_size", 0),
        output_dtype=ir.DataType(made) if made else None,
    )


def numbers(tensor: ir.TensorProtocol) -> Array | None:
    """Return a small constant's values as float64, else ``None``."""
    if tensor.size > MOST_VALUES or tensor.dtype == ir.DataType.STRING:
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray(tensor.numpy()).astype(np.float64)


def rounded(array: Array, dtype: ir.DataType) -> Array:
    """Return float64 values as a Cast to ``dtype`` leaves them."""
    with np.errstate(invalid="ignore", over="ignore"):
        return array.astype(dtype.numpy()).astype(np.float64)
