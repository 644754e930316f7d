"""A copy of a variant that ONNX Runtime's CPU provider can run, where it has no kernels for BF16 or FP4.

Weights in FP4 are dequantized. BF16 tensors become FP32 tensors that are rounded to BF16 wherever a node makes one, so that
what is measured is BF16's rounding with FP32 sums, as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.types import Array

_BF16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_FP4 = ir.DataType.FLOAT4E2M1


def emulate(variant: Path, out: Path, *, like: Path) -> Path:
    """Write a copy of ``variant`` without BF16 and FP4 tensors to ``out`` and return that path.

    Args:
        variant: A Q/DQ graph in which FP4 stands in front of a DequantizeLinear only.
        out: The copy; its weights are computed while it is saved.
        like: The float model that the variant was made from; the copy needs no newer opset than that.
    """
    model = models.load(variant)
    model.opset_imports[""] = models.load(like).opset_imports[""]
    graph = model.graph
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].dtype is _FP4:
            _dequantized(graph, node)
    for value in graph.inputs:  # a cache in BF16
        if value.dtype is _BF16:
            value.dtype = _FLOAT
    for node in list(graph):
        _widened(graph, node)
    for value in graph.initializers.values():
        if value.dtype is _BF16 and value.const_value is not None:
            value.const_value = _as_float(value.const_value)
            value.dtype = _FLOAT
    used = {v.name for n in graph.all_nodes() for v in n.inputs if v is not None} | {v.name for v in graph.outputs}
    for name in [n for n in graph.initializers if n not in used]:
        del graph.initializers[name]
    models.save(model, out)
    return out


def _dequantized(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the DequantizeLinear of an FP4 constant by the constant's values."""
    stored, scale = node.inputs[0], node.inputs[1]
    assert stored is not None
    assert scale is not None
    weight, steps = stored.const_value, scale.const_value
    assert weight is not None
    assert steps is not None
    axis, block = node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()
    dtype = steps.dtype

    def values() -> ir.TensorProtocol:
        scales = np.repeat(_float(steps), block, axis=axis)
        return ir.tensor((_float(weight) * scales).astype(dtype.numpy()))

    output = node.outputs[0]
    name = output.name or ""
    output.name = f"{name}_replaced"
    lazy = ir.LazyTensor(values, dtype=dtype, shape=ir.Shape(weight.shape.numpy()), name=name)
    constant = ir.Value(name=name, shape=output.shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(output, constant)
    graph.remove(node, safe=True)


def _widened(graph: ir.Graph, node: ir.Node) -> None:
    """Let a node that makes BF16 make FP32 instead, rounded to BF16 by a pair of casts behind it."""
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and value is not None and value.as_tensor().dtype is _BF16:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_float(value.as_tensor())))
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _BF16.value:
        node.attributes["to"] = ir.AttrInt64("to", _FLOAT.value)
    for output in node.outputs:
        if output.dtype is not _BF16:
            continue
        narrow = ir.node("Cast", [output], attributes={"to": _BF16.value}, name=f"{output.name}/to BF16")
        wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": _FLOAT.value}, name=f"{output.name}/from BF16")
        rounded = wide.outputs[0]
        ir.convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
        narrow.replace_input_with(0, output)
        rounded.name, output.name = output.name, f"{output.name}_wide"
        narrow.outputs[0].name = f"{rounded.name}_bf16"
        narrow.outputs[0].type, narrow.outputs[0].shape = ir.TensorType(_BF16), output.shape
        output.dtype = _FLOAT
        rounded.type, rounded.shape = ir.TensorType(_FLOAT), output.shape
        graph.insert_after(node, [narrow, wide])


def _as_float(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: ir.tensor(_float(tensor)), dtype=_FLOAT, shape=shape, name=tensor.name)


def _float(tensor: ir.TensorProtocol) -> Array:
    return models.read(tensor).astype(np.float32)
