"""Fold what scales and shifts every channel into the convolution or Gemm before it: BatchNormalization, Mul, Div, Add, Sub.

With ``s = scale / sqrt(var + epsilon)`` per channel, ``BN(W x + b) = (s W) x + (s (b - mean) + bias)``
(Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2); a constant factor or summand likewise.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graph.passes.constants import SMALL_BYTES, ValueNames, add_constant, array_of, lazy, read, tensor_of
from pipeline.graph.passes.graph_pass import GraphPass, float_attribute, int_attribute, is_op
from pipeline.types import Array

MOST_CHANNELS = 1 << 20
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


class FoldAffine(GraphPass):
    """Fold inference BatchNormalization into Conv, ConvTranspose and Gemm, elementwise constants into convolutions."""

    name = "fold-affine"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes folded."""
        names = ValueNames(model)
        return sum(_fold(model.graph, node, names) for node in list(model.graph))


def _fold(graph: ir.Graph, node: ir.Node, names: ValueNames) -> bool:
    """Fold one node into the one before it, if it can be."""
    if is_op(node, "BatchNormalization"):
        before = _before(graph, node.inputs[0], "Conv", "ConvTranspose", "Gemm")
        affine = _batch_norm(node) if before is not None else None
    elif is_op(node, "Mul", "Div", "Add", "Sub"):
        index = next((i for i in (0, 1) if array_of(node.inputs[1 - i], limit=MOST_CHANNELS) is not None), 0)
        before = _before(graph, node.inputs[index], "Conv", "ConvTranspose")
        affine = _elementwise(node, index, before) if before is not None else None
    else:
        return False
    weight = tensor_of(before.inputs[1]) if before is not None else None
    if before is None or affine is None or weight is None or weight.dtype not in FLOATS:
        return False
    factor, offset = affine
    bias = _bias(before)
    spread = _spread(before, weight, factor)
    if bias is None or spread is None or bias.size not in (1, factor.size):
        return False
    label = (before.inputs[1].name if before.inputs[1] else None) or "weight"
    if np.any(factor != 1):
        new_weight = add_constant(graph, names.fresh(f"{label}_folded"), _scaled(weight, spread, label))
        before.replace_input_with(1, new_weight)
    shifted = np.broadcast_to(bias.reshape(-1), factor.shape) * factor + offset
    new_bias = add_constant(graph, names.fresh(f"{label}_folded_bias"), ir.Tensor(shifted.astype(weight.dtype.numpy())))
    before.resize_inputs(3)
    before.replace_input_with(2, new_bias)
    before.attributes.pop("beta", None)
    source, output = before.outputs[0], node.outputs[0]
    name = output.name
    source.shape = source.shape if output.shape is None else output.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name, source.name = None, name
    return True


def _before(graph: ir.Graph, source: ir.Value | None, *kinds: str) -> ir.Node | None:
    """Return the node of one of these kinds that makes a tensor which nobody else reads."""
    node = source.producer() if source is not None else None
    if source is None or node is None or node.graph is not graph or not is_op(node, *kinds):
        return None
    return node if len(source.uses()) == 1 and not source.is_graph_output() else None


def _batch_norm(norm: ir.Node) -> tuple[Array, Array] | None:
    """Return factor and offset of each channel, float64, where the statistics are constants."""
    parts = [array_of(value, limit=MOST_CHANNELS) for value in norm.inputs[1:]]
    unused = all(not o.uses() and not o.is_graph_output() for o in norm.outputs[1:])
    if any(part is None for part in parts) or not unused or int_attribute(norm, "training_mode", 0):
        return None
    scale, offset, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
    factor = scale / np.sqrt(variance + float_attribute(norm, "epsilon", 1e-5))
    return factor, offset - mean * factor


def _elementwise(node: ir.Node, index: int, before: ir.Node) -> tuple[Array, Array] | None:
    """Return factor and offset of each channel where the other operand is one finite constant for all or for each channel."""
    found, weight = array_of(node.inputs[1 - index], limit=MOST_CHANNELS), tensor_of(before.inputs[1])
    if found is None or weight is None or (index == 1 and not is_op(node, "Mul", "Add")):
        return None
    rank, channels = len(weight.shape), _channels(before, weight)
    constant = found.astype(np.float64)
    if constant.ndim > rank or (
        constant.size != 1 and tuple(constant.shape)[-rank + 1 :] != (channels, *[1] * (rank - 2))
    ):
        return None
    if constant.size not in (1, channels) or not np.all(np.isfinite(constant)):
        return None
    values = np.broadcast_to(constant.reshape(-1), (channels,))
    ones, zeros = np.ones(channels), np.zeros(channels)
    if is_op(node, "Div"):
        return (1 / values, zeros) if np.all(values != 0) else None
    if is_op(node, "Mul"):
        return values, zeros
    return ones, values if is_op(node, "Add") else -values


def _channels(node: ir.Node, weight: ir.TensorProtocol) -> int:
    shape = [int(d) for d in weight.shape.numpy()]
    return shape[0] if is_op(node, "Conv") else shape[1] * int_attribute(node, "group", 1)


def _bias(node: ir.Node) -> Array | None:
    """Return the node's bias in float64 (0 without one), ``None`` if it is not constant."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(1)
    bias = array_of(node.inputs[2], limit=MOST_CHANNELS)
    beta = float_attribute(node, "beta", 1.0) if is_op(node, "Gemm") else 1.0
    if bias is None or (bias.ndim and bias.size != bias.shape[-1]):  # a Gemm may add a column or a matrix
        return None
    return np.asarray(bias.astype(np.float64) * beta)


def _spread(node: ir.Node, weight: ir.TensorProtocol, factor: Array) -> Array | None:
    """Return ``factor`` in a shape that broadcasts over the weight; ``None`` if the channels do not fit."""
    shape = [int(d) for d in weight.shape.numpy()]
    if is_op(node, "Gemm"):
        axis = 0 if int_attribute(node, "transB", 0) else 1
        return factor.reshape([-1, 1] if axis == 0 else [1, -1]) if shape[axis] == factor.size else None
    if is_op(node, "Conv"):
        return factor.reshape([-1] + [1] * (len(shape) - 1)) if shape[0] == factor.size else None
    # ConvTranspose: [C_in, C_out / group, …]; the rows of group g hold the channels of group g.
    group = int_attribute(node, "group", 1)
    if shape[1] * group != factor.size or shape[0] % group:
        return None
    rows = np.repeat(factor.reshape(group, shape[1]), shape[0] // group, axis=0)
    return rows.reshape([shape[0], shape[1]] + [1] * (len(shape) - 2))


def _scaled(weight: ir.TensorProtocol, spread: Array, name: str) -> ir.TensorProtocol:
    dtype = weight.dtype.numpy()

    def compute() -> Array:
        values = read(weight)
        result = np.empty(values.shape, dtype=dtype)
        np.multiply(values, spread, out=result, dtype=np.float64, casting="same_kind")
        return result

    if weight.nbytes <= SMALL_BYTES:
        return ir.Tensor(compute())
    return lazy(compute, weight.dtype, [int(d) for d in weight.shape.numpy()], name)
