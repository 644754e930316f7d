"""Planning: presets, guards, measured costs and the user's rules, applied to every node; then what must hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from engines.target import Target
from pipeline.errors import PolicyError
from pipeline.notices import notice
from pipeline.policy.plan import Format, NodePlan, PrecisionPlan
from pipeline.policy.rules import (
    Candidate,
    Rule,
    candidates,
    guard_rules,
    preset_rules,
    user_rule,
)
from pipeline.recipe import PolicyConfig, Preset
from pipeline.types import NodeRole, Precision, QuantDType, QuantSpec, Role

FLOAT16_MAX = 65504.0
SENTINEL = 1e30
"""Attention masks hold the most negative float; such a value saturates harmlessly in FP16 and is no activation."""

CPU_INT8 = Format(
    # uint8 x int8 is the pair of types that ONNX Runtime's CPU kernels are fast at: 1.8-2.5x of FP32, where
    # int8 x int8 is 0.8-1.05x and uint8 x uint8 1.0x.
    activations=QuantSpec(dtype=QuantDType.UINT8, symmetric=False),
    weights=QuantSpec(dtype=QuantDType.INT8),
    second=QuantSpec(dtype=QuantDType.INT8),
)
GPU_INT8 = Format(
    # TensorRT takes symmetric INT8 only.
    activations=QuantSpec(dtype=QuantDType.INT8),
    weights=QuantSpec(dtype=QuantDType.INT8),
    second=QuantSpec(dtype=QuantDType.INT8),
)

_QKV = (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE)
_PASSES = ("Relu", "Clip", "MaxPool", "Identity", "LeakyRelu")


def family(target: Target, preset: Preset) -> str:
    """Return the name of the variant that serves ``target``: variants are shared by targets that want the same graph."""
    if preset is Preset.FP32:
        return "fp32"
    if target.compute_capability is None:
        if preset is Preset.FP16:
            raise PolicyError(
                "The CPU has no FP16 kernels that are worth using.",
                where=f"target {target.name}, preset fp16",
                fix="Use --precision int8 or fp32 for cpu, or a GPU target for fp16.",
            )
        return "cpu"
    return "gpu-fp16" if preset is Preset.FP16 else "gpu-int8"


def plan(
    model: ir.Model,
    roles: dict[str, NodeRole],
    policy: PolicyConfig,
    family: str,
    *,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    extents: Mapping[str, float] | None = None,
) -> PrecisionPlan:
    """Return the precision of every node and the rule that decided it.

    Args:
        model: The canonical graph.
        roles: Its nodes' roles.
        policy: Preset and rules.
        family: The variant, from :func:`family`.
        costs: Node name to ``{"fp32_ms": …, "int8_ms": …}`` as measured; a node that INT8 makes slower stays high.
        extents: Tensor name to the largest finite |x| seen; nodes beyond the FP16 range compute in FP32.

    Raises:
        PolicyError: A rule's precision does not exist for this family.
    """
    elsewhere = Precision.FP16 if family.startswith("gpu") else Precision.FP32
    rules = _rules(policy, family, elsewhere, costs or {})
    found = candidates(model, roles)
    nodes = {c.name: _decide(c, rules, elsewhere) for c in found}
    _require_residuals_between_convolutions(found, nodes, elsewhere)
    _share_qkv(found, nodes)
    if elsewhere is Precision.FP16:
        _keep_fp32_beyond_fp16(found, nodes, extents or {})
    formats = {}
    if any(n.precision is Precision.INT8 for n in nodes.values()):
        formats[Precision.INT8] = CPU_INT8 if family == "cpu" else GPU_INT8
    return PrecisionPlan(
        family=family,
        elsewhere=elsewhere,
        dynamic=policy.activations == "dynamic" and family == "cpu",
        formats=formats,
        nodes=tuple(nodes.values()),
    )


def _rules(
    policy: PolicyConfig, family: str, elsewhere: Precision, costs: Mapping[str, Mapping[str, float]]
) -> list[Rule]:
    rules = [*preset_rules(policy.preset, elsewhere), *guard_rules(family, elsewhere)]
    rules += [
        Rule(
            text=f"costs: {cost['int8_ms']:.3g} ms in INT8, {cost['fp32_ms']:.3g} ms in FP32",
            precision=elsewhere,
            matches=lambda c, name=name: c.name == name,  # type: ignore[misc]
        )
        for name, cost in costs.items()
        if cost["int8_ms"] >= cost["fp32_ms"]
    ]
    for config in policy.rules:
        rules.append(user_rule(config, family))
    return rules


def _decide(candidate: Candidate, rules: list[Rule], elsewhere: Precision) -> NodePlan:
    rule = next(r for r in reversed(rules) if r.matches(candidate))
    precision, text = rule.precision, rule.text
    if precision.quantized and candidate.operands is None:
        precision, text = elsewhere, f"not quantizable: {_why_not(candidate)}"
    return NodePlan(
        node=candidate.name,
        op_type=candidate.node.op_type,
        role=candidate.role.role,
        block=candidate.role.block,
        precision=precision,
        rule=text,
    )


def _why_not(candidate: Candidate) -> str:
    if candidate.node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return "its weight is no constant of a known shape in the usual layout"
    return f"{candidate.node.op_type} has no quantized form"


def _require_residuals_between_convolutions(
    found: tuple[Candidate, ...], nodes: dict[str, NodePlan], elsewhere: Precision
) -> None:
    """Keep a residual add quantized only where both its inputs come from quantized convolutions or adds.

    Between transformer layers the add feeds a LayerNorm in high precision: rounding it costs 2.6-3.3 dB and saves
    nothing.
    """
    for candidate in found:
        entry = nodes[candidate.name]
        if (
            candidate.role.role is not Role.RESIDUAL_ADD
            or not entry.precision.quantized
            or entry.rule.startswith("recipe")
        ):
            continue
        sources = [_source(v) for v in candidate.node.inputs]
        if not all(
            s is not None and s.op_type in ("Conv", "Add") and nodes[s.name or ""].precision.quantized for s in sources
        ):
            nodes[candidate.name] = replace(
                entry, precision=elsewhere, rule="guard: residual add that is not between INT8 convolutions"
            )


def _source(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _PASSES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def _share_qkv(found: tuple[Candidate, ...], nodes: dict[str, NodePlan]) -> None:
    """Give query, key and value projections that read one tensor one precision.

    TensorRT merges the three into one GEMM, which has one input type; and the tensor has one quantizer. If one of
    them must stay high, the merged GEMM does, so all three do.
    """
    groups: dict[ir.Value, list[Candidate]] = defaultdict(list)
    for candidate in found:
        if candidate.role.role in _QKV and candidate.operands is not None and candidate.node.inputs[0] is not None:
            groups[candidate.node.inputs[0]].append(candidate)
    order = [Precision.FP32, Precision.FP16, Precision.FP8, Precision.INT8]
    for group in groups.values():
        entries = [nodes[c.name] for c in group]
        highest = min(entries, key=lambda e: order.index(e.precision))
        for entry in entries:
            if entry.precision is not highest.precision:
                nodes[entry.node] = replace(
                    entry, precision=highest.precision, rule=f"shared with {highest.node}, which has: {highest.rule}"
                )
        if any(e.precision is not highest.precision for e in entries):
            notice(
                "qkv-shared",
                f"Query, key and value share one GEMM, so all three compute in {highest.precision}",
                where=highest.node,
            )


def _keep_fp32_beyond_fp16(
    found: tuple[Candidate, ...], nodes: dict[str, NodePlan], extents: Mapping[str, float]
) -> None:
    for candidate in found:
        entry = nodes[candidate.name]
        names = [v.name or "" for v in (*candidate.node.outputs, *candidate.node.inputs) if v is not None]
        largest = max((extents[n] for n in names if extents.get(n, SENTINEL) < SENTINEL), default=0.0)
        if largest > FLOAT16_MAX and entry.precision is not Precision.FP32:
            nodes[candidate.name] = replace(
                entry,
                precision=Precision.FP32,
                rule=f"guard: |x| reaches {largest:.3g}, beyond FP16's {FLOAT16_MAX:.0f}",
            )
