"""Planning: presets, guards, measured costs and the user's rules, applied to every node; then what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from engines.target import Target
from pipeline.errors import PolicyError
from pipeline.graph.operands import WEIGHTED, has_dynamic_form
from pipeline.policy.formats import CPU_INT8, GPU_FP8, GPU_INT8, weight_only
from pipeline.policy.half_range import FLOAT16_MAX, SENTINEL, half_guards
from pipeline.policy.methods import Methods, gains, give_methods, stored_alone
from pipeline.policy.overrides import override_rules
from pipeline.policy.plan import NodePlan, PrecisionPlan, fitted
from pipeline.policy.residuals import guard_residuals
from pipeline.policy.rules import LOW, Candidate, Rule, candidates, cost_rules, guard_rules, preset_rules, user_rules
from pipeline.policy.sharing import merged_projections
from pipeline.policy.skip import skip_rules
from pipeline.recipe import PolicyConfig, Preset
from pipeline.types import HALVES, WEIGHT_ONLY, NodeRole, Precision, QuantSpec, Role

SHARED = "shared with"
"""How the rule of a projection begins that follows another one of its query, key and value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured before planning.

    Attributes:
        costs: Node name to ``{"fp32_ms": …, "int8_ms": …}`` as measured on a CPU; on ``cpu``, a node that INT8 makes
            slower stays high.
        extents: Tensor name to the largest finite |x| seen; nodes beyond the FP16 range compute in FP32.
        outliers: Tensor name to how far its outliers stand out, for ``policy.outlier_threshold``.
        overrides: Node name to why it computes in what the rest does, whatever the rules say.
        smoothable: Activations are smoothed before they are quantized where the recipe does not say.
        data: There is calibration data to round weights on.
    """

    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    extents: Mapping[str, float] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    smoothable: bool = True
    data: bool = True


def family(target: Target, policy: PolicyConfig) -> str:
    """Return the name of the variant that serves ``target``: variants are shared by targets that want the same graph.

    Raises:
        PolicyError: The target has nothing to offer for the preset.
    """
    asked = policy.asked | {p for p in (LOW.get(policy.preset),) if p is not None}
    int8, weights = Precision.INT8 in asked, [p for p in WEIGHT_ONLY if p in asked]
    fp8 = policy.preset is Preset.FP8_INT8 or Precision.FP8 in asked
    if target.compute_capability is None:
        if policy.preset in (Preset.FP16, Preset.BF16):
            raise PolicyError(
                f"The CPU has no {policy.preset.upper()} kernels that are worth using.",
                where=f"target {target.name}, preset {policy.preset}",
                fix="Use --precision int8 or fp32 for cpu, or a GPU target for fp16.",
            )
        return "cpu" if int8 or weights else "fp32"
    if fp8:
        return "gpu-fp8"
    if int8:
        return "gpu-int8"
    if weights:
        return f"gpu-{weights[0]}"
    half = half_of(policy)
    return f"gpu-{half}" if policy.preset in (Preset.FP16, Preset.BF16) or half in asked else "fp32"


def half_of(policy: PolicyConfig) -> Precision:
    """Return what GPUs compute the rest in: FP16, or BF16 where the policy says so.

    Raises:
        PolicyError: A rule asks for the other one; a graph has one of them.
    """
    half = Precision.BF16 if policy.preset is Preset.BF16 else Precision(policy.half)
    other = next((r for r in policy.rules if r.precision in HALVES and r.precision is not half), None)
    if other is not None and other.precision is not None:
        raise PolicyError(
            f"A graph computes in one 16-bit type, here {half.upper()}, and a rule asks for {other.precision.upper()}.",
            where=f"policy.rules {other}",
            fix=f"Write {half} or fp32 in the rule, or set policy.half: {other.precision}.",
        )
    return half


def plan(
    model: ir.Model,
    roles: dict[str, NodeRole],
    policy: PolicyConfig,
    family: str,
    seen: Evidence = Evidence(),
) -> PrecisionPlan:
    """Return the precision and the methods of every node, and the rules that decided.

    Args:
        model: The canonical graph.
        roles: Its nodes' roles.
        policy: Preset and rules.
        family: The variant, from :func:`family`.
        seen: What earlier runs measured.
    """
    elsewhere = _elsewhere(policy, family)
    high = Precision.FP32 if policy.preset is Preset.FP32 else elsewhere
    dynamic = policy.activations != "static" and family == "cpu"
    found = candidates(model, roles)
    rules = [*preset_rules(policy.preset, high, family), *guard_rules(family, high, LOW.get(policy.preset))]
    rules += half_guards(found, elsewhere) if elsewhere in HALVES else []
    rules += cost_rules(seen.costs, high) if family == "cpu" else []
    rules += user_rules(policy.rules, family)
    rules += skip_rules(policy, high, seen.outliers)
    rules += override_rules(seen.overrides, elsewhere)
    nodes = {c.name: _decide(c, rules, high, policy, family, dynamic=dynamic) for c in found}
    if elsewhere is Precision.FP16:
        _keep_fp32_beyond_fp16(found, nodes, seen.extents)
    _share_qkv(found, nodes)
    give_methods(found, nodes, _methods(policy, family, nodes, seen, dynamic=dynamic))
    guard_residuals(found, nodes, high, shared=family.startswith("gpu"))
    formats = {}
    used = {n.precision for n in nodes.values()}
    if Precision.INT8 in used:
        formats[Precision.INT8] = CPU_INT8 if family == "cpu" else GPU_INT8
    if Precision.FP8 in used:
        formats[Precision.FP8] = GPU_FP8
    formats |= {p: weight_only(p, policy, family) for p in WEIGHT_ONLY if p in used}
    return PrecisionPlan(
        family=family,
        elsewhere=elsewhere,
        dynamic=dynamic,
        per_token=dynamic and policy.activations == "dynamic-per-token",
        formats=formats,
        nodes=tuple(nodes.values()),
    )


def _methods(
    policy: PolicyConfig, family: str, nodes: Mapping[str, NodePlan], seen: Evidence, *, dynamic: bool
) -> Methods:
    """Return the methods of nodes that no rule speaks of: the policy's, and where it says nothing what gains most."""
    return Methods(
        policy=policy,
        family=family,
        dynamic=dynamic,
        smooth=policy.smooth if policy.smooth is not None else "auto" if seen.smoothable else "off",
        rounding=policy.rounding or ("gptq" if seen.data and gains(nodes.values()) else "rtn"),
    )


def _elsewhere(policy: PolicyConfig, family: str) -> Precision:
    half = policy.preset is not Preset.FP32 or bool(policy.asked & {*HALVES})
    return half_of(policy) if half and family.startswith("gpu") else Precision.FP32


def _decide(
    candidate: Candidate, rules: list[Rule], high: Precision, policy: PolicyConfig, family: str, *, dynamic: bool
) -> NodePlan:
    rule = next(r for r in reversed(rules) if r.matches(candidate))
    precision, text = rule.precision, rule.text
    spec = stored_alone(candidate, precision, policy, family) if precision in WEIGHT_ONLY else None
    if precision.quantized and (why := _why_not(candidate, precision, spec, family, dynamic=dynamic)):
        precision, text = high, f"not quantizable ({why}), asked by {rule.text}"
    return NodePlan(
        node=candidate.name,
        op_type=candidate.node.op_type,
        role=candidate.role.role,
        block=candidate.role.block,
        precision=precision,
        rule=text,
    )


def _why_not(candidate: Candidate, precision: Precision, alone: QuantSpec | None, family: str, *, dynamic: bool) -> str:
    """Return why a node cannot be quantized, ``""`` if it can."""
    kind = candidate.node.op_type
    if candidate.role.role is Role.KV_CACHE:
        return _why_no_cache(precision, dynamic=dynamic)
    if candidate.operands is not None:
        if alone is not None:
            return _why_not_alone(candidate, precision, alone, family)
        if dynamic and not has_dynamic_form(candidate.node, candidate.operands):
            return f"{kind} has no form with dynamic activations"
        return ""
    if kind in WEIGHTED:
        return "its weight is no constant of a known shape in the usual layout"
    if kind == "Gather":
        return "its table is no constant matrix that is read by rows"
    return f"{kind} has no quantized form"


def _why_no_cache(precision: Precision, *, dynamic: bool) -> str:
    if precision in WEIGHT_ONLY:
        return "a cache is stored in INT8 or FP8"
    return "a cache needs one scale for all steps, and activations are dynamic" if dynamic else ""


def _why_not_alone(candidate: Candidate, precision: Precision, spec: QuantSpec, family: str) -> str:
    """Return why a node's weight cannot be stored narrow by itself, in blocks along the axis that is summed."""
    what, kind = candidate.operands, candidate.node.op_type
    if what is None or what.weight is None or kind not in ("MatMul", "Gemm") or what.channel_axis is None:
        return f"{kind} has no weight that is stored in {precision.upper()}{' blocks' if spec.block else ''}"
    bias = candidate.node.inputs[what.bias] if what.bias is not None else None
    if precision is Precision.NF4 and bias is not None and bias.const_value is None:
        return "its bias is no constant"  # the kernel's weight exists in no other form that could be multiplied
    summed = candidate.summed
    if spec.block is None or fitted(spec, summed, family) is not None:
        return ""
    return f"it sums {summed} values, which is no multiple of the block of {spec.block} or of a smaller one"


def _share_qkv(found: tuple[Candidate, ...], nodes: dict[str, NodePlan]) -> None:
    """Give query, key and value projections that read one tensor one precision.

    TensorRT merges the three into one GEMM, which has one input type; and the tensor has one quantizer. If one of
    them must stay high, the merged GEMM does, so all three do.
    """
    order = [Precision.FP32, *HALVES, *WEIGHT_ONLY, Precision.FP8, Precision.INT8]
    for group in merged_projections(found):
        entries = [nodes[c.name] for c in group]
        highest = min(entries, key=lambda e: order.index(e.precision))
        for entry in entries:
            if entry.precision is not highest.precision:
                nodes[entry.node] = replace(
                    entry, precision=highest.precision, rule=f"{SHARED} {highest.node}, which has: {highest.rule}"
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
