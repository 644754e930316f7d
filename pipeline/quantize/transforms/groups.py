"""Which quantized GEMMs and convolutions read one tensor, and so share what its channels are scaled by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from pipeline.policy.plan import NodePlan, PrecisionPlan
from pipeline.quantize.products import Product, product
from pipeline.quantize.transforms.absorb import absorption
from pipeline.quantize.transforms.upstream import gain, is_norm, upstream
from pipeline.recipe import SCALED
from pipeline.types import Precision, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The quantized GEMMs or convolutions that read one tensor, and so share its scales.

    Attributes:
        tensor: The activation, ``[..., channels]``, or ``[batch, channels, ...]`` of convolutions.
        nodes: Names of the MatMul and Gemm, or of the Conv nodes, in graph order.
        precision: What they compute in.
        adds: Quantized residual adds that read the tensor too: they get it back from the smoothed pair.
        axis: The channel axis: -1, or 1 of convolutions.
        smooth: The alpha that the plan wants, ``auto`` for one that is searched, ``off`` for none.
    """

    tensor: str
    nodes: tuple[str, ...]
    precision: Precision
    adds: tuple[str, ...] = ()
    axis: int = -1
    smooth: Literal["off", "auto"] | float = "auto"


def groups(model: ir.Model, plan: PrecisionPlan, *, weights_alone: bool = False) -> tuple[Group, ...]:
    """Return the groups of quantized nodes with a constant weight, in graph order, one for each tensor they read.

    A tensor whose readers do not all compute in one precision and along one axis has no group (weights that AWQ scales may be
    stored in several), nor has one of a convolution's where smoothing would cost more than it may bring (:func:`_is_cheap`).

    Args:
        model: The canonical graph.
        plan: What is quantized.
        weights_alone: The groups whose tensor stays in high precision, in place of those that quantize it.
    """
    entries = {n.node: n for n in plan.quantized()}
    found: dict[str, list[tuple[Product, NodePlan]]] = {}
    adds: dict[str, list[str]] = {}
    for node in model.graph:
        entry, made = entries.get(node.name or ""), product(node)
        if entry is not None and entry.role is Role.RESIDUAL_ADD:
            for value in node.inputs:
                adds.setdefault(value.name or "" if value is not None else "", []).append(entry.node)
        if entry is None or made is None:
            continue
        if (plan.formats[entry.precision].activations is None) != weights_alone:
            continue
        value = node.inputs[0]
        assert value is not None
        found.setdefault(value.name or "", []).append((made, entry))
    made_groups = []
    for tensor, readers in found.items():
        group = Group(
            tensor=tensor,
            nodes=tuple(made.node.name or "" for made, _ in readers),
            precision=readers[0][1].precision,
            adds=tuple(adds.get(tensor, ())) if plan.family != "cpu" else (),
            axis=readers[0][0].channel_axis,
            smooth="off" if readers[0][1].smooth is None else readers[0][1].smooth,
        )
        alike = len({(_stored(entry), made.channel_axis) for made, entry in readers}) == 1
        if alike and (group.axis == -1 or _is_cheap(group, readers[0][0], plan, entries)):
            made_groups.append(group)
    return tuple(made_groups)


def _stored(entry: NodePlan) -> str:
    """Return what readers of one tensor must have in common: AWQ weighs the errors of weights in several formats together."""
    return "scaled" if entry.precision in SCALED else entry.precision


def absorbable(value: ir.Value, group: Group, channels: int, *, shifted: bool) -> bool:
    """Whether what makes a group's input takes its scale (and shift) in for nothing, because nobody else reads it."""
    if {r.name for r, _ in value.uses()} != {*group.nodes} or value.is_graph_output():
        return False
    if group.axis == 1:
        return absorption(value, channels, shifted=shifted) is not None
    maker = value.producer()
    if maker is None:
        return False
    if is_norm(maker) or (gain(maker) is not None and not shifted):
        return True
    source = upstream(value, channels)
    return source is not None and (source.shifts or not shifted)


def _is_cheap(group: Group, reader: Product, plan: PrecisionPlan, entries: Mapping[str, NodePlan]) -> bool:
    """Whether a convolution's input can be smoothed for nothing, or with a Mul that does not part what belongs together.

    A residual add would have to undo the Mul, and where ONNX Runtime's convolution writes INT8 itself, the tensor would be
    quantized before it.
    """
    value = reader.node.inputs[0]
    assert value is not None
    if absorbable(value, group, reader.channels.max() + 1, shifted=False):
        return True
    if group.adds:
        return False
    maker = value.producer()
    while maker is not None and maker.op_type in ("Relu", "Clip", "MaxPool"):
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    return plan.family != "cpu" or maker is None or maker.name not in entries
