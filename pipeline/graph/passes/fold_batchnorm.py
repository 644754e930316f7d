"""Fold BatchNormalization into the convolution or Gemm before it.

With ``s = scale / sqrt(var + epsilon)`` per channel, ``BN(W x + b) = (s W) x + (s (b - mean) + bias)``
(Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graph.passes.constants import SMALL_BYTES, ValueNames, add_constant, array_of, lazy, read, tensor_of
from pipeline.graph.passes.graph_pass import GraphPass, float_attribute, int_attribute, is_op
from pipeline.types import Array

MOST_CHANNELS = 1 << 20
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


class FoldBatchNorm(GraphPass):
    """Fold inference BatchNormalization with constant statistics into Conv, ConvTranspose and Gemm."""

    name = "fold-batchnorm"

    def change(self, model: ir.Model) -> int:
        """Return the number of BatchNormalization nodes folded."""
        names = ValueNames(model)
        count = 0
        for node in list(model.graph):
            if is_op(node, "BatchNormalization") and _fold(model.graph, node, names):
                count += 1
        return count


def _fold(graph: ir.Graph, norm: ir.Node, names: ValueNames) -> bool:
    source = norm.inputs[0]
    before = source.producer() if source is not None else None
    if (
        before is None
        or source is None
        or before.graph is not graph
        or not is_op(before, "Conv", "ConvTranspose", "Gemm")
    ):
        return False
    unused = all(not o.uses() and not o.is_graph_output() for o in norm.outputs[1:])
    if len(source.uses()) != 1 or source.is_graph_output() or not unused or int_attribute(norm, "training_mode", 0):
        return False
    parts = [array_of(value, limit=MOST_CHANNELS) for value in norm.inputs[1:]]
    weight, bias = tensor_of(before.inputs[1]), _bias(before)
    if weight is None or weight.dtype not in FLOATS or bias is None or any(part is None for part in parts):
        return False
    scale, offset, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
    factor = scale / np.sqrt(variance + float_attribute(norm, "epsilon", 1e-5))
    spread = _spread(before, weight, factor)
    if spread is None or bias.size not in (1, factor.size):
        return False
    label = (before.inputs[1].name if before.inputs[1] else None) or "weight"
    new_weight = add_constant(graph, names.fresh(f"{label}_folded"), _scaled(weight, spread, label))
    shifted = (np.broadcast_to(bias.reshape(-1), factor.shape) - mean) * factor + offset
    new_bias = add_constant(graph, names.fresh(f"{label}_folded_bias"), ir.Tensor(shifted.astype(weight.dtype.numpy())))
    before.resize_inputs(3)
    before.replace_input_with(1, new_weight)
    before.replace_input_with(2, new_bias)
    before.attributes.pop("beta", None)
    output, name = norm.outputs[0], norm.outputs[0].name
    source.shape = source.shape if output.shape is None else output.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    output.name, source.name = None, name
    return True


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
