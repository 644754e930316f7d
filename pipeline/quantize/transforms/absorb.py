"""Which constants in front of a convolution can take a scale (and shift) of each channel in, so that it costs nothing.

``(x - z) / s`` passes backwards through what is linear in each channel or keeps signs: a summand, a factor, ReLU, pooling. It ends
in a convolution's output channels (cross-layer equalization, Nagel et al. 2019), in a constant factor, or in the small factor
of a squeeze-and-excitation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from pipeline.quantize.products import product


class Kind(StrEnum):
    """What takes the scale in."""

    SUMMAND = "summand"
    """A constant that is added: ``(b - z) / s``; what it is added to is scaled further up."""
    FACTOR = "factor"
    """A constant factor: ``c / s``."""
    DIVISOR = "divisor"
    """A constant divisor: ``c * s``."""
    SMALL = "small"
    """A factor of one value for each channel that the graph computes: gets a Mul of its own, which is next to nothing."""
    CONVOLUTION = "convolution"
    """The output channels of a convolution: ``W / s`` and ``(b - z) / s``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One thing that changes.

    Attributes:
        kind: What it is.
        node: The node.
        index: Which of its inputs, where it is one.
    """

    kind: Kind
    node: ir.Node
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorption:
    """Everything that changes, from the tensor upwards.

    Attributes:
        places: What changes.
        between: Tensors between that are scaled too.
    """

    places: tuple[Place, ...]
    between: tuple[ir.Value, ...]


_HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity")
"""``f(x / s) = f(x) / s`` for positive ``s``, channel by channel."""


def absorption(value: ir.Value, channels: int, *, shifted: bool) -> Absorption | None:
    """Return what can absorb a scale of every channel (axis 1) of ``value``; ``None`` where nothing can.

    That nobody else reads ``value`` itself is the caller's to know; what lies above has no other reader.

    Args:
        value: ``[batch, channels, *space]``.
        channels: Their number.
        shifted: Whether a shift must be absorbed too.
    """
    places: list[Place] = []
    between: list[ir.Value] = []
    current = value
    while True:
        node = current.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        index = 0
        if node.op_type == "Conv":
            found = product(node)
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if found is None or found.shape[0] != channels or (bias is not None and bias.const_value is None):
                return None
            places.append(Place(kind=Kind.CONVOLUTION, node=node))
            break
        if node.op_type in ("Mul", "Div", "Add"):
            constant = next((i for i in (1, 0) if _by_channel(node, i, channels)), None)
            if node.op_type == "Add" and constant is not None:
                places.append(Place(kind=Kind.SUMMAND, node=node, index=constant))
                shifted, index = False, 1 - constant
            else:
                place = None if shifted else _factor(node, constant, channels)
                if place is None:
                    return None
                places.append(place)
                break
        elif shifted or not (node.op_type in _HOMOGENEOUS or _is_relu(node)) or any(o.uses() for o in node.outputs[1:]):
            return None
        above = node.inputs[index]
        if above is None or len(list(above.uses())) != 1 or above.is_graph_output():
            return None
        between.append(above)
        current = above
    return Absorption(places=tuple(places), between=tuple(between))


def _factor(node: ir.Node, constant: int | None, channels: int) -> Place | None:
    if node.op_type == "Div":
        return Place(kind=Kind.DIVISOR, node=node, index=1) if constant == 1 else None
    if node.op_type != "Mul":
        return None
    if constant is not None:
        return Place(kind=Kind.FACTOR, node=node, index=constant)
    index = next((i for i in (1, 0) if _one_for_each_channel(node.inputs[i], channels)), None)
    return None if index is None else Place(kind=Kind.SMALL, node=node, index=index)


def _by_channel(node: ir.Node, index: int, channels: int) -> bool:
    """Whether an input is a constant for all channels, or one for each, of the output's axis 1."""
    value, output = node.inputs[index], node.outputs[0]
    other = node.inputs[1 - index]
    if value is None or value.const_value is None or output.shape is None or other is None or other.shape is None:
        return False
    rank, shape = len(output.shape), tuple(value.const_value.shape.numpy())
    if len(other.shape) != rank or len(shape) > rank:
        return False
    whole = (1,) * (rank - len(shape)) + shape
    return whole in ((1,) * rank, (1, channels, *[1] * (rank - 2)))


def _one_for_each_channel(value: ir.Value | None, channels: int) -> bool:
    shape = value.shape if value is not None else None
    return shape is not None and len(shape) > 2 and shape[1] == channels and all(d == 1 for d in shape[2:])


def _is_relu(node: ir.Node) -> bool:
    """Whether a Clip only cuts at zero."""
    if node.op_type != "Clip":
        return False
    low, high = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    return high is None and low is not None and low.const_value is not None and not low.const_value.numpy().any()
