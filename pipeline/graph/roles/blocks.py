"""Repeated blocks: each attention with its feed-forward network, numbered in topological order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.graph.roles import ops
from pipeline.graph.roles.attention import Attention
from pipeline.graph.roles.ffn import FeedForward
from pipeline.graph.roles.flow import Flow
from pipeline.graph.roles.residual import Residual

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """An attention or a feed-forward network on its way into a block."""

    order: tuple[int, int, int]
    core: list[ir.Node]
    residual: Residual | None
    attention: bool
    cross: bool


def number_blocks(
    flow: Flow,
    attentions: Sequence[Attention],
    feed_forwards: Sequence[FeedForward],
    residuals: Mapping[ir.Node, Residual],
    norms: Sequence[Sequence[ir.Node]],
) -> dict[ir.Node, int]:
    """Return the block of each node on a path through an attention or a feed-forward network.

    A block holds one self-attention, the cross-attention that may follow it, its feed-forward networks, their norms
    and residual adds. Feed-forward networks alone (mixers) are a block each.
    """
    units = sorted(_units(flow, attentions, feed_forwards, residuals), key=lambda unit: unit.order)
    numbers: dict[ir.Node, int] = {}
    for unit, number in zip(units, _numbers(units), strict=True):
        path = [*unit.residual.path, unit.residual.add] if unit.residual else []
        for node in (*unit.core, *path):
            numbers.setdefault(node, number)
    _add_post_norms(flow, [unit.residual.add for unit in units if unit.residual], norms, numbers)
    return numbers


def _units(
    flow: Flow,
    attentions: Sequence[Attention],
    feed_forwards: Sequence[FeedForward],
    residuals: Mapping[ir.Node, Residual],
) -> list[_Unit]:
    units: list[_Unit] = []
    for attention in attentions:
        residual = _residual_after(flow, attention.outputs or [attention.anchor], residuals)
        anchor = flow.position[attention.anchor]
        # Attention and FFN that run in parallel end in one add: sorted by it, attention comes first.
        end = flow.position[residual.add] if residual else anchor
        units.append(
            _Unit(
                order=(end, 0, anchor),
                core=list(attention.roles),
                residual=residual,
                attention=True,
                cross=attention.cross,
            )
        )
    for ffn in feed_forwards:
        order = (flow.position[ffn.residual.add], 1, flow.position[ffn.down])
        core = list(ffn.roles)
        units.append(_Unit(order=order, core=core, residual=ffn.residual, attention=False, cross=False))
    return units


def _residual_after(flow: Flow, layers: Sequence[ir.Node], residuals: Mapping[ir.Node, Residual]) -> Residual | None:
    def through(node: ir.Node) -> bool:
        return node.op_type in ops.LINEAR_PATH and node not in residuals

    for layer in layers:
        for node in flow.forward(layer, through).ends:
            if node in residuals:
                return residuals[node]
    return None


def _numbers(units: Sequence[_Unit]) -> list[int]:
    """Number the units: a self-attention starts a block, or the FFN before it does where blocks start with one."""
    leading_ffn = bool(units) and not units[0].attention
    number = -1
    has_attention = ffn_after = False
    numbers: list[int] = []
    for unit in units:
        if unit.attention:
            starts = has_attention and (ffn_after or not unit.cross)
        else:
            starts = leading_ffn and (ffn_after or (number >= 0 and not has_attention))
        if starts or number < 0:
            number += 1
            has_attention = ffn_after = False
        if unit.attention:
            has_attention = True
        else:
            ffn_after = ffn_after or has_attention
        numbers.append(number)
    return numbers


def _add_post_norms(
    flow: Flow, adds: Sequence[ir.Node], norms: Sequence[Sequence[ir.Node]], numbers: dict[ir.Node, int]
) -> None:
    """Give each add's norm the add's block, in models that normalize after the add and not before the layers.

    The first block tells which: there a norm before the layers is already in a block, as it lies on the branch.
    """
    norm_of = {node: list(norm) for norm in norms for node in norm}

    def norm_after(add: ir.Node) -> list[ir.Node]:
        if add in norm_of:
            return norm_of[add]
        following = [norm_of.get(node, []) for node in flow.consumers(add)]
        alone = bool(following) and all(norm is following[0] for norm in following)
        return following[0] if alone else []

    first = norm_after(adds[0]) if adds else []
    if not first or any(node in numbers for node in first):
        return
    for add in adds:
        for node in norm_after(add):
            numbers.setdefault(node, numbers[add])
