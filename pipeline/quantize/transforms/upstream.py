"""Where a tensor's smoothing can go for nothing: into the projection upstream that makes its channels.

``(x - z) / s`` passes backwards through whatever is linear in each channel: the reshapes and the weighted mean of an
attention (its weights sum to 1, so a shift passes too), and one factor of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from pipeline.graph.operands import operands, output_bias

_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A projection whose output channels are those of a tensor further down.

    Attributes:
        gemm: The MatMul or Gemm.
        changed: Tensors between that other nodes quantize, and whose values change too.
        shifts: Whether a shift of its outputs arrives as the same shift.
    """

    gemm: ir.Node
    changed: tuple[ir.Value, ...]
    shifts: bool


def upstream(value: ir.Value, channels: int) -> Upstream | None:
    """Return the projection that can absorb a scale of each channel of ``value``; ``None`` without one.

    Nobody else may read what lies between; that nobody else reads ``value`` itself is the caller's to know.
    """
    return _through_attention(value, channels) or _through_gate(value, channels)


def _through_attention(value: ir.Value, channels: int) -> Upstream | None:
    """``value = Reshape(Transpose(softmax(..) @ V))`` with ``V = Transpose(Reshape(projection))``."""
    joined = _made_by(value, "Reshape", alone=False)
    turned = _made_by(joined.inputs[0], "Transpose") if joined is not None else None
    context = _made_by(turned.inputs[0], "MatMul") if turned is not None and _perm(turned) == _HEADS else None
    if context is None or turned is None:
        return None
    weights, own = context.inputs
    back = _made_by(own, "Transpose")
    split = _made_by(back.inputs[0], "Reshape") if back is not None and _perm(back) == _HEADS else None
    if own is None or split is None or weights is None:
        return None
    gemm = _projection(split.inputs[0], channels)
    size = _head_size(split, channels)
    if gemm is None or size is None or _size(turned.outputs[0], 3) != size:
        return None
    return Upstream(gemm=gemm, changed=(own,), shifts=_sums_to_one(weights))


def _through_gate(value: ir.Value, channels: int) -> Upstream | None:
    """``value = activation(gate) * projection``: the factor that is a projection alone."""
    product = value.producer()
    if product is None or product.op_type != "Mul" or product.domain not in ("", "ai.onnx"):
        return None
    for factor in reversed(product.inputs):
        gemm = _projection(factor, channels)
        if gemm is not None:
            return Upstream(gemm=gemm, changed=(), shifts=False)
    return None


def _projection(value: ir.Value | None, channels: int) -> ir.Node | None:
    """Return the GEMM that makes a tensor, with or without an Add of a bias behind it."""
    node = _made_by(value, "Add")
    if node is not None:
        makers = [_gemm(v) for v in node.inputs]
        node = next((m for m in makers if m is not None), None)
        place = output_bias(node, channels) if node is not None else None
        if place is None or (value is not None and place[0] is not value.producer()):
            return None
    else:
        node = _gemm(value)
    what = operands(node) if node is not None else None
    weight = node.inputs[what.weight] if node is not None and what is not None and what.weight is not None else None
    if node is None or what is None or weight is None or what.channel_axis is None:
        return None
    if _size(weight, what.channel_axis) != channels:
        return None
    return node if what.bias is None or output_bias(node, channels) is not None else None


def _gemm(value: ir.Value | None) -> ir.Node | None:
    return _made_by(value, "MatMul") or _made_by(value, "Gemm")


def _made_by(value: ir.Value | None, op_type: str, *, alone: bool = True) -> ir.Node | None:
    """Return the node that makes ``value`` if it is of this type and (``alone``) ``value`` has one reader."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type != op_type or node.domain not in ("", "ai.onnx"):
        return None
    return node if not alone or (len(list(value.uses())) == 1 and not value.is_graph_output()) else None


def _sums_to_one(weights: ir.Value) -> bool:
    node = weights.producer()
    if node is None or node.op_type != "Softmax" or node.domain not in ("", "ai.onnx"):
        return False
    axis = node.attributes.get("axis")
    return (
        axis is None or axis.as_int() == -1 or (weights.shape is not None and axis.as_int() == len(weights.shape) - 1)
    )


def _perm(node: ir.Node) -> tuple[int, ...]:
    perm = node.attributes.get("perm")
    return tuple(perm.as_ints()) if perm is not None else ()


def _size(value: ir.Value, axis: int) -> int | None:
    """Return the size of an axis where it is known."""
    size = value.shape[axis] if value.shape is not None and len(value.shape) > axis else None
    return size if isinstance(size, int) else None


def _head_size(split: ir.Node, channels: int) -> int | None:
    """Return the channels of a head where a Reshape makes ``[batch, tokens, heads, size]`` of ``[batch, tokens, channels]``."""
    before, after = split.inputs[0], split.outputs[0]
    if before is None or before.shape is None or after.shape is None or (len(before.shape), len(after.shape)) != (3, 4):
        return None
    same = all(before.shape[axis] == after.shape[axis] and before.shape[axis] is not None for axis in (0, 1))
    size = _size(after, 3)
    return size if same and size is not None and _size(before, 2) == channels and channels % size == 0 else None


def is_norm(node: ir.Node) -> bool:
    """Whether this is a LayerNormalization over the last axis whose scale and bias are constants."""
    if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx"):
        return False
    axis, weight = node.attributes.get("axis"), node.inputs[1]
    constants = all(v is None or v.const_value is not None for v in node.inputs[1:])
    return constants and (axis is None or axis.as_int() == -1) and weight is not None and len(weight.shape or ()) == 1


def gain(node: ir.Node) -> int | None:
    """Return which input multiplies every channel by a constant: an RMS norm's last step, or an RMSNormalization's scale."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Mul", "RMSNormalization"):
        return None
    axis = node.attributes.get("axis")
    if node.op_type == "RMSNormalization" and not (axis is None or axis.as_int() == -1):
        return None
    output = node.outputs[0]
    channels = output.shape[-1] if output.shape is not None and len(output.shape) else None
    for index, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and tuple(value.const_value.shape) == (channels,):
            return index
    return None
