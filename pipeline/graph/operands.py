"""What a quantizable node reads: which input is its weight, and which axis of the weight is the output channel."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""Operators that multiply an activation by a constant weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The inputs of a quantizable node.

    Attributes:
        activations: Indices of the inputs that are activations.
        weight: Index of the constant weight, or ``None`` where both operands are activations.
        channel_axis: The weight's output-channel axis; ``None`` where only one scale for the whole weight is exact.
        bias: Index of the bias, if the node has one.
    """

    activations: tuple[int, ...]
    weight: int | None
    channel_axis: int | None
    bias: int | None

    @property
    def weight_only(self) -> bool:
        """Whether the node only looks its weight up (an embedding): stored in INT8, nothing to calibrate."""
        return not self.activations

    def weight_shape(self, node: ir.Node) -> tuple[int, ...]:
        """Return the constant weight's shape, ``()`` where there is none or it is unknown."""
        value = node.inputs[self.weight] if self.weight is not None else None
        return tuple(value.shape.numpy()) if value is not None and value.shape is not None else ()


def operands(node: ir.Node) -> Operands | None:
    """Return the operands of a node that can be quantized, else ``None``.

    A MatMul or Gemm whose *first* operand is the constant is not quantizable here, nor is a node whose weight is
    no 2-D (MatMul, Gemm, Gather) or N-D (Conv) float initializer of the main graph.
    """
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gather":
        return _table(node)
    if node.op_type == "Add":
        both = all(v is not None and _float(v) and v.const_value is None for v in node.inputs)
        return Operands(activations=(0, 1), weight=None, channel_axis=None, bias=None) if both else None
    if node.op_type not in WEIGHTED or len(node.inputs) < 2:
        return None
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None or not _float(left) or left.const_value is not None:
        return None
    if right.const_value is None:
        return (
            Operands(activations=(0, 1), weight=None, channel_axis=None, bias=None)
            if node.op_type == "MatMul"
            else None
        )
    axis = _channel_axis(node, right)
    if axis is None or not _float(right) or not right.is_initializer():
        return None
    bias = 2 if len(node.inputs) > 2 and node.inputs[2] is not None else None
    # One scale per tensor for grouped transposed convolutions: their channels share the weight's second axis.
    per_channel = not (node.op_type == "ConvTranspose" and _int(node, "group", 1) > 1)
    return Operands(activations=(0,), weight=1, channel_axis=axis if per_channel else None, bias=bias)


def has_dynamic_form(node: ir.Node, found: Operands) -> bool:
    """Whether the node can be computed in INT8 with activation ranges found at run time.

    A matrix product with a constant weight can (a Gemm only if it adds its bias unscaled), and a table that is looked
    up has no activation at all. ONNX Runtime's dynamic convolution is slower than the float one.
    """
    plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and _float_attribute(node, "beta", 1.0) == 1.0)
    return found.weight_only or (plain and found.weight is not None)


def _table(node: ir.Node) -> Operands | None:
    table = node.inputs[0]
    whole = table is not None and table.is_initializer() and table.shape is not None and len(table.shape) == 2
    if table is None or not whole or not _float(table) or _int(node, "axis", 0) != 0:
        return None
    return Operands(activations=(), weight=0, channel_axis=1, bias=None)


def _channel_axis(node: ir.Node, weight: ir.Value) -> int | None:
    rank = len(weight.shape) if weight.shape is not None else 0
    if node.op_type == "MatMul":
        return 1 if rank == 2 else None
    if node.op_type == "Gemm":
        if _int(node, "transA", 0) or _float_attribute(node, "alpha", 1.0) != 1.0 or rank != 2:
            return None
        return 0 if _int(node, "transB", 0) else 1
    if rank < 3:
        return None
    return 0 if node.op_type == "Conv" else 1


def _float(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float_attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def output_bias(node: ir.Node, channels: int) -> tuple[ir.Node, int] | None:
    """Return the input that adds a constant to each output channel of a GEMM already: its own bias, or the Add behind it.

    Args:
        node: A MatMul or Gemm.
        channels: Its output channels.

    Returns:
        The node and the input's index; ``None`` where a constant needs an Add of its own.
    """
    what, output = operands(node), node.outputs[0]
    readers = list(output.uses())
    place: tuple[ir.Node, int] | None = None
    if what is not None and what.bias is not None:
        beta = node.attributes.get("beta")
        place = (node, what.bias) if beta is None or beta.as_float() == 1.0 else None
    elif len(readers) == 1 and readers[0][0].op_type == "Add" and not output.is_graph_output():
        place = readers[0][0], 1 - readers[0][1]
    value = place[0].inputs[place[1]] if place is not None else None
    if value is None or value.const_value is None or tuple(value.const_value.shape)[-1:] != (channels,):
        return None
    return place
