"""Methods: how a planned node's input is smoothed or parted, its weight rounded, and how many weights share a scale.

The policy says it for all nodes, rules for those that they match. Nodes that must agree get what the last rule that matches
any of them says: GEMMs and convolutions that read one tensor share its scales (smoothing, AWQ) and its outliers, and query, key and value
projections that TensorRT merges into one GEMM share its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.policy.formats import FP4_BLOCK, weight_only
from pipeline.policy.plan import NodePlan, fitted
from pipeline.policy.rules import Candidate, conditions
from pipeline.policy.sharing import by_input, merged_projections
from pipeline.recipe import BLOCKED, METHODS, SCALED, PolicyConfig
from pipeline.types import WEIGHT_ONLY, Precision, QuantSpec, Role

SHARES = "with what reads the same tensor"
"""How the rule of a node ends that takes a method from another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """What decides the methods of a variant's nodes.

    Attributes:
        policy: The recipe's policy, with its rules.
        family: The variant.
        dynamic: Activation ranges are computed at run time.
        smooth: ``off``, ``auto`` or an alpha, for nodes that no rule gives one.
        rounding: ``rtn``, ``gptq`` or ``awq``, for nodes that no rule gives one.
    """

    policy: PolicyConfig
    family: str
    dynamic: bool
    smooth: str | float
    rounding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A method's value, and the index of the recipe's rule that gave it; -1 where none did."""

    value: Any
    rule: int = -1


def asked(policy: PolicyConfig, candidate: Candidate, key: str, default: Any = None) -> Asked:
    """Return what the last matching rule that sets a method gives a node, or the default."""
    for index, config in reversed([*enumerate(policy.rules)]):
        value = getattr(config, key)
        if value is not None and all(conditions(config, candidate).values()):
            return Asked(value=value, rule=index)
    return Asked(value=default)


def untaken(
    candidate: Candidate, precision: Precision, key: str, value: Any, family: str, *, dynamic: bool = False
) -> str:
    """Return why a node that is planned in ``precision`` has no use for a method's value, ``""`` if it has."""
    if not precision.quantized:
        return f"it computes in {precision.upper()}"
    if not _is_product(candidate):
        return f"{candidate.node.op_type} has no constant weight that a method is for"
    if key == "smooth":
        alone = "its weight alone is quantized" if precision in WEIGHT_ONLY else ""
        return alone or ("its range is found at run time" if dynamic else "")
    if key == "llm_int8_threshold":
        alone = "its weight alone is quantized" if precision in WEIGHT_ONLY else ""
        return alone or ("" if dynamic else "calibration fixes its range")
    if key == "block_size":
        if precision is Precision.FP4:
            return f"blocks of FP4 weights hold {FP4_BLOCK}"
        blocked = precision in BLOCKED and (precision is not Precision.W8A16 or family == "cpu")
        return "" if blocked else f"{precision.upper()} weights have one scale for each output channel"
    if value == "rtn":
        return ""
    if dynamic:
        return "weights are rounded to nearest where activations are dynamic"
    if value == "awq":
        return "" if precision in SCALED else f"AWQ does not round {precision.upper()} weights"
    if precision is Precision.NF4:
        return "GPTQ does not round NF4 weights"
    return "several nodes read its weight" if _readers(candidate) > 1 else ""


def gains(nodes: Iterable[NodePlan]) -> str:
    """Return which weights GPTQ rounds unasked, because rounding to nearest costs much; ``""`` where it does not."""
    planned = list(nodes)
    if any(n.precision in (Precision.INT4, Precision.FP4) for n in planned):
        return "Four-bit weights"
    depthwise = any(n.role is Role.DEPTHWISE_CONV for n in planned)
    quantized = any(n.op_type == "Conv" and n.precision.quantized for n in planned)
    return "Weights of a network with depthwise convolutions" if depthwise and quantized else ""


def stored_alone(candidate: Candidate, precision: Precision, policy: PolicyConfig, family: str) -> QuantSpec:
    """Return how a weight would be stored by itself, in blocks of the size that is asked for."""
    spec = weight_only(precision, policy, family).weights
    wanted = asked(policy, candidate, "block_size", spec.block).value
    return spec if untaken(candidate, precision, "block_size", wanted, family) else replace(spec, block=wanted)


def give_methods(found: Sequence[Candidate], nodes: dict[str, NodePlan], methods: Methods) -> None:
    """Give the quantized products among ``nodes``, whose precisions are decided, their methods, and their rules' text."""
    products = [c for c in found if nodes[c.name].precision.quantized and _is_product(c)]
    for key in METHODS:
        own = {c.name: _own(c, nodes[c.name].precision, key, methods) for c in products}
        for group in _agreeing(key, products, nodes, own, methods.family):
            winner = max((own[c.name] for c in group), key=lambda a: a.rule)
            for candidate in group:
                entry = nodes[candidate.name]
                value = winner.value
                text = entry.rule + _by_rule(entry, candidate, winner, methods.policy)
                if key == "block_size" and value is not None:
                    value, text = _fitted(candidate, entry.precision, winner.value, text, methods)
                nodes[candidate.name] = replace(entry, **{key: value}, rule=text)


def _own(candidate: Candidate, precision: Precision, key: str, methods: Methods) -> Asked:
    """Return what one node would get if it had to agree with no other: the rule's, the policy's, or nothing."""
    alone = weight_only(precision, methods.policy, methods.family).weights if precision in WEIGHT_ONLY else None
    block = None if alone is None else alone.block
    default = {
        "smooth": methods.smooth,
        "rounding": methods.rounding,
        "block_size": block,
        "llm_int8_threshold": methods.policy.llm_int8_threshold,
    }[key]
    for wanted in (asked(methods.policy, candidate, key, default), Asked(value=default)):
        if not untaken(candidate, precision, key, wanted.value, methods.family, dynamic=methods.dynamic):
            return wanted
    return Asked(value={"rounding": "rtn", "block_size": block}.get(key))


def _agreeing(
    key: str,
    products: Sequence[Candidate],
    nodes: Mapping[str, NodePlan],
    own: Mapping[str, Asked],
    family: str,
) -> list[list[Candidate]]:
    """Return the products in groups that get one value; most stand alone."""
    together: list[list[Candidate]] = []
    if key == "smooth":
        together = by_input(c for c in products if own[c.name].value is not None)
    elif key == "llm_int8_threshold":
        together = by_input(c for c in products if nodes[c.name].precision not in WEIGHT_ONLY)
    elif key == "rounding":
        # AWQ scales the input, and with it the weights of all that read it.
        scaled = by_input(c for c in products if nodes[c.name].precision in SCALED)
        together = [group for group in scaled if any(own[c.name].value == "awq" for c in group)]
    elif family.startswith("gpu"):
        together = merged_projections([c for c in products if own[c.name].value is not None])
    grouped = {c.name for group in together for c in group}
    return [*together, *([c] for c in products if c.name not in grouped)]


def _by_rule(entry: NodePlan, candidate: Candidate, winner: Asked, policy: PolicyConfig) -> str:
    """Return what a plan's rule says more where a rule of the recipe gave the method, and not already the precision."""
    if winner.rule < 0:
        return ""
    config = policy.rules[winner.rule]
    text = f"recipe {config}" + ("" if all(conditions(config, candidate).values()) else f" {SHARES}")
    return "" if text in entry.rule else f"; {text}"


def _fitted(candidate: Candidate, precision: Precision, wanted: int, text: str, methods: Methods) -> tuple[int, str]:
    """Return the block that divides the summed axis, and the rule's text, which says so where it is another one."""
    spec = replace(weight_only(precision, methods.policy, methods.family).weights, block=wanted)
    block = fitted(spec, candidate.summed, methods.family)
    assert block is not None  # planning leaves weights high that no block divides
    if block == wanted:
        return block, text
    return block, f"{text}, in blocks of {block}: it sums {candidate.summed} values, which is no multiple of {wanted}"


def _is_product(candidate: Candidate) -> bool:
    """Whether the node multiplies an activation by a constant weight; transposed convolutions have no method."""
    what = candidate.operands
    return what is not None and what.weight is not None and candidate.node.op_type in ("MatMul", "Gemm", "Conv")


def _readers(candidate: Candidate) -> int:
    assert candidate.operands is not None
    assert candidate.operands.weight is not None
    weight = candidate.node.inputs[candidate.operands.weight]
    return 0 if weight is None else len(list(weight.uses()))
