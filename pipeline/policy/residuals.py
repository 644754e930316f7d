"""Which residual adds may read INT8: those of convolutions, and those that share their pair with smoothed GEMMs."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from pipeline.graph.operands import operands
from pipeline.policy.plan import NodePlan
from pipeline.policy.rules import Candidate
from pipeline.types import Precision, Role

_PASSES = ("Relu", "Clip", "MaxPool", "Identity", "LeakyRelu")


def guard_residuals(found: tuple[Candidate, ...], nodes: dict[str, NodePlan], high: Precision, *, shared: bool) -> None:
    """Keep in high precision the residual adds that a preset quantizes and that would lose more than they save.

    Between convolutions an add is quantized if both its inputs come from quantized convolutions or adds. Between
    transformer layers INT8 costs 7-10 dB where outliers stretch its scale; ``shared``, where smoothing evens the
    channels out, the add may read the pair that the GEMMs read, so that the norm writes INT8 alone.
    """
    for candidate in found:
        entry = nodes[candidate.name]
        if (
            candidate.role.role is not Role.RESIDUAL_ADD
            or not entry.precision.quantized
            or entry.rule.startswith("recipe")
            or (shared and _reads_with_gemms(candidate, nodes))
        ):
            continue
        sources = [_source(v) for v in candidate.node.inputs]
        if not all(
            s is not None and s.op_type in ("Conv", "Add") and nodes[s.name or ""].precision.quantized for s in sources
        ):
            nodes[candidate.name] = replace(
                entry, precision=high, rule="guard: residual add that no INT8 neighbour shares its input with"
            )


def _reads_with_gemms(candidate: Candidate, nodes: dict[str, NodePlan]) -> bool:
    """Whether quantized GEMMs with a constant weight, whose input is smoothed, read one of the add's inputs too."""
    for value in candidate.node.inputs:
        for reader, index in value.uses() if value is not None else ():
            what, entry = operands(reader), nodes.get(reader.name or "")
            smoothed = entry is not None and entry.precision is Precision.INT8 and entry.smooth not in (None, "off")
            if (
                smoothed
                and reader.op_type in ("MatMul", "Gemm")
                and what is not None
                and what.weight is not None
                and index == 0
            ):
                return True
    return False


def _source(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _PASSES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node
