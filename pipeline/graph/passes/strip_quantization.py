"""Take Q/DQ pairs out of a graph, so that it is a float model again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.errors import ModelError
from pipeline.graph.passes.constants import SMALL_BYTES, become_constant, lazy, read, tensor_of
from pipeline.graph.passes.graph_pass import GraphPass, all_nodes, int_attribute, is_op
from pipeline.graph.passes.refuse_quantization import is_quantization
from pipeline.types import Array

BETWEEN = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool", "Identity", "Split")
"""Operators that may stand between a Q and its DQ: they only move values, or take their maximum."""


class StripQuantization(GraphPass):
    """Remove activation Q -> DQ pairs and turn dequantized constants into float initializers (computed lazily).

    What is left of quantization after that (integer arithmetic, dynamic quantization) raises :class:`ModelError`.
    """

    name = "strip-quantization"

    def change(self, model: ir.Model) -> int:
        """Return the number of Q and DQ nodes removed."""
        count = 0
        nodes = [node for node in all_nodes(model) if is_quantization(node)]
        for node in nodes:
            if is_op(node, "DequantizeLinear") and tensor_of(node.inputs[0]) is not None:
                count += _dequantize(model, node)
        for node in nodes:
            if is_op(node, "QuantizeLinear") and node.graph is not None:
                count += _remove_pair(node)
        left = [node for node in all_nodes(model) if is_quantization(node)]
        if left:
            raise _cannot_strip(left[0], len(left))
        return count


def _cannot_strip(node: ir.Node, count: int) -> ModelError:
    return ModelError(
        f"{count} nodes compute on quantized values and cannot be stripped.",
        where=f"node {node.name or node.outputs[0].name!r} ({node.op_type})",
        fix="Start from the float model.",
    )


def _dequantize(model: ir.Model, node: ir.Node) -> int:
    inputs = [tensor_of(value) for value in node.inputs]
    quantized, scale = inputs[0], inputs[1]
    zero_point = inputs[2] if len(inputs) > 2 and node.inputs[2] is not None else None
    if quantized is None or scale is None or (zero_point is None) != (len(inputs) < 3 or node.inputs[2] is None):
        return 0
    axis, block = int_attribute(node, "axis", 1), int_attribute(node, "block_size", 0)

    def compute() -> Array:
        zero = None if zero_point is None else zero_point.numpy()
        return dequantize(read(quantized), scale.numpy(), zero, axis=axis, block_size=block)

    shape = [int(d) for d in quantized.shape.numpy()]
    tensor: ir.TensorProtocol = lazy(compute, scale.dtype, shape, node.outputs[0].name or "")
    if tensor.nbytes <= SMALL_BYTES:
        tensor = ir.Tensor(compute(), name=node.outputs[0].name)
    become_constant(model, node, tensor)
    return 1


def dequantize(quantized: Array, scale: Array, zero_point: Array | None, *, axis: int, block_size: int) -> Array:
    """Return ``(quantized - zero_point) * scale`` as ONNX DequantizeLinear defines it.

    Args:
        quantized: Any shape; integers or 8-bit floats.
        scale: A scalar, one per element of ``axis``, or one per block of ``block_size`` elements along ``axis``.
        zero_point: As ``scale``; ``None`` is 0.
        axis: Channel or block axis.
        block_size: 0 without blocks.
    """

    def spread(parameter: Array) -> Array:
        if parameter.size == 1:
            return parameter.reshape(())
        if block_size:
            return np.repeat(parameter, block_size, axis=axis).take(range(quantized.shape[axis]), axis=axis)
        shape = [1] * quantized.ndim
        shape[axis] = -1
        return parameter.reshape(shape)

    wide = quantized.astype(np.float32)
    if zero_point is not None:
        wide = wide - spread(zero_point).astype(np.float32)
    return (wide * spread(scale).astype(np.float32)).astype(scale.dtype)


def _remove_pair(node: ir.Node) -> int:
    """Bypass a Q and every DQ that its output reaches through operators that only move values."""
    ends: list[ir.Node] = []
    between: list[ir.Node] = []
    pending = [node.outputs[0]]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise _cannot_strip(node, 1)
        for user in value.consumers():
            if is_op(user, "DequantizeLinear") and user.inputs[0] is value:
                ends.append(user)
            elif is_op(user, *BETWEEN) and user.inputs[0] is value:
                between.append(user)
                pending.extend(user.outputs)
            else:
                raise _cannot_strip(user, 1)
    source = node.inputs[0]
    assert source is not None
    for moved in (output for between_node in between for output in between_node.outputs):
        moved.type = source.type
    for end in ends:
        if end.graph is not None:
            _bypass(end, end.inputs[0])
    _bypass(node, source)
    return 1 + len(ends)


def _bypass(node: ir.Node, replacement: ir.Value | None) -> None:
    assert replacement is not None
    assert node.graph is not None
    node.outputs[0].replace_all_uses_with(replacement)
    node.graph.remove(node, safe=True)
