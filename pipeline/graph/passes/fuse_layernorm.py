"""Recognise a layer normalization that an exporter wrote out, and make it one LayerNormalization node.

The decomposed form overflows FP16 (the square), so it would have to stay in FP32; the single node does not.

    mean = ReduceMean(x);  d = x - mean;  y = d / sqrt(ReduceMean(d * d) + epsilon) [* scale] [+ bias]

Both exporters' spellings are found: ``Pow(d, 2)`` or ``Mul(d, d)``, one or two ``Sub`` nodes, ``Div`` or a product
with the reciprocal, axes in any form. The walk starts at the Sqrt, of which a graph has few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.graph.passes.constants import ValueNames, add_constant, ints_of, scalar_of, tensor_of
from pipeline.graph.passes.graph_pass import GraphPass, int_attribute, is_op

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Norm:
    x: ir.Value
    axis: int
    epsilon: float
    inner: tuple[ir.Node, ...]
    """Every node between x and the normalized value, without the last."""
    last: ir.Node
    """The node whose output is (x - mean) / deviation."""


class FuseLayerNorm(GraphPass):
    """Fuse decomposed layer normalization, with or without scale and bias."""

    name = "fuse-layernorm"

    def change(self, model: ir.Model) -> int:
        """Return the number of normalizations fused. Shapes must have been inferred; opset >= 17."""
        names = ValueNames(model)
        count = 0
        for node in list(model.graph):
            found = _recognise(node) if is_op(node, "Sqrt") and node.graph is not None else None
            if found is not None and _fuse(model.graph, found, names):
                count += 1
        return count


def _recognise(root: ir.Node) -> _Norm | None:
    add = _producer(root.inputs[0], "Add")
    variance, epsilon = _with_scalar(add)
    second = _producer(variance, "ReduceMean")
    square = _producer(second.inputs[0], "Pow", "Mul") if second is not None else None
    d = _squared(square)
    sub = _producer(d, "Sub")
    mean = _producer(sub.inputs[1], "ReduceMean") if sub is not None else None
    if add is None or second is None or square is None or sub is None or mean is None or epsilon is None or d is None:
        return None
    x = sub.inputs[0]
    if x is None or mean.inputs[0] is not x or x.shape is None or x.dtype not in TYPES:
        return None
    axis = _last_axes(mean, len(x.shape))
    if axis is None or axis != _last_axes(second, len(x.shape)):
        return None
    ending = _ending(root, x, mean)
    if ending is None:
        return None
    last, extra = ending
    inner = (mean, sub, square, second, add, root, *extra)
    return _Norm(x=x, axis=axis, epsilon=epsilon, inner=inner, last=last)


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def _with_scalar(node: ir.Node | None) -> tuple[ir.Value | None, float | None]:
    """Split a commutative node into (value, constant scalar)."""
    if node is None:
        return None, None
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        scalar = scalar_of(other)
        if scalar is not None:
            return value, scalar
    return None, None


def _squared(node: ir.Node | None) -> ir.Value | None:
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if scalar_of(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _last_axes(node: ir.Node, rank: int) -> int | None:
    """Return the (negative) first axis if the node reduces the last axes and keeps them as 1."""
    attribute = node.attributes.get("axes")
    axes = (
        tuple(attribute.as_ints())
        if attribute is not None
        else ints_of(node.inputs[1] if len(node.inputs) > 1 else None)
    )
    if not axes or not int_attribute(node, "keepdims", 1):
        return None
    normal = sorted(axis % rank for axis in axes)
    return normal[0] - rank if normal == list(range(normal[0], rank)) else None


def _ending(root: ir.Node, x: ir.Value, mean: ir.Node) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """Find the division of x - mean by the root; return it and the other nodes on the way."""
    users = root.outputs[0].consumers()
    if len(users) != 1:
        return None
    user = users[0]
    extra: tuple[ir.Node, ...] = ()
    if is_op(user, "Reciprocal") or (is_op(user, "Div") and scalar_of(user.inputs[0]) == 1.0):
        extra, inverse = (user,), user.outputs[0]
        products = inverse.consumers()
        if len(products) != 1 or not is_op(products[0], "Mul"):
            return None
        user = products[0]
        numerator = user.inputs[1] if user.inputs[0] is inverse else user.inputs[0]
    elif is_op(user, "Div") and user.inputs[1] is root.outputs[0]:
        numerator = user.inputs[0]
    else:
        return None
    sub = _producer(numerator, "Sub")
    if sub is None or sub.inputs[0] is not x or sub.inputs[1] is not mean.outputs[0]:
        return None
    return user, (*extra, sub)


def _fuse(graph: ir.Graph, found: _Norm, names: ValueNames) -> bool:
    inside = {*found.inner, found.last}
    for node in found.inner:
        if any(user not in inside for user in node.outputs[0].consumers()) or node.outputs[0].is_graph_output():
            return False
    x, last = found.x, found.last
    assert x.shape is not None
    size = x.shape[found.axis :]
    scale, last = _affine(last, "Mul", size)
    bias, last = _affine(last, "Add", size) if scale is not None else (None, last)
    if scale is None:
        if not all(isinstance(d, int) for d in size) or x.dtype is None:
            return False
        ones = np.ones([int(d) for d in size if isinstance(d, int)], dtype=x.dtype.numpy())
        scale = add_constant(graph, names.fresh(f"{last.outputs[0].name}_ones"), ir.Tensor(ones))
    output = last.outputs[0]
    stash = ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    fused = ir.node(
        "LayerNormalization",
        [x, scale] if bias is None else [x, scale, bias],
        {"axis": found.axis, "epsilon": found.epsilon, "stash_type": int(stash)},
        name=last.name,
        outputs=[ir.Value(name=output.name, type=output.type, shape=output.shape)],
    )
    graph.insert_after(last, fused)
    output.replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
    output.name = None
    _remove(graph, last)
    return True


def _affine(node: ir.Node, op_type: str, size: tuple[int | ir.SymbolicDim, ...]) -> tuple[ir.Value | None, ir.Node]:
    """Return the constant that the next node applies (scale or bias) and that node, or (None, node)."""
    output = node.outputs[0]
    users = output.consumers()
    if len(users) != 1 or output.is_graph_output() or not is_op(users[0], op_type):
        return None, node
    other = users[0].inputs[1] if users[0].inputs[0] is output else users[0].inputs[0]
    tensor = tensor_of(other)
    if tensor is None or other is None or tuple(tensor.shape.numpy()) != size:
        return None, node
    return other, users[0]


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node and what only it needed."""
    pending = [node]
    while pending:
        current = pending.pop()
        outputs = current.outputs
        if current.graph is None or any(o.uses() or o.is_graph_output() for o in outputs):
            continue
        pending.extend(p for v in current.inputs if v is not None and (p := v.producer()) is not None)
        graph.remove(current, safe=True)
