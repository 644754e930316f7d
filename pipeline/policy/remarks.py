"""What a user should know about a precision plan: rules that did nothing, and precisions that follow others."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from pipeline.notices import notice
from pipeline.policy.methods import SHARES, asked, gains, untaken
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import SHARED, Evidence
from pipeline.policy.rules import LOW, Candidate, conditions
from pipeline.policy.skip import skips
from pipeline.recipe import SCALED, PolicyConfig, RuleConfig
from pipeline.types import Precision


def remark(
    plan: PrecisionPlan,
    found: tuple[Candidate, ...],
    policy: PolicyConfig,
    seen: Evidence | None = None,
) -> None:
    """Give a notice for every rule without effect, for a policy's method that nodes do not take, and for nodes that had to agree.

    Args:
        plan: What was planned.
        found: The graph's nodes, from :func:`pipeline.policy.rules.candidates`.
        policy: The recipe's rules.
        seen: What planning read beside the policy.
    """
    seen = seen or Evidence()
    for index, config in enumerate(policy.rules):
        if _remark_rule(plan, found, config, where=f"policy.rules[{index}]"):
            _remark_methods(plan, found, policy, index)
    _remark_policy(plan, policy, seen)
    names = sorted({name for c in found for name in c.names})
    for pattern in policy.skip:
        if not any(skips(pattern, candidate) for candidate in found):
            near = _nearest(pattern, names)
            notice("skip-unmatched", f"No node is named {pattern!r}; the nearest is {near}.", where="policy.skip")
    static = any(f.activations is not None for f in plan.formats.values()) and not plan.dynamic
    if policy.activations != "static" and static:
        smoothed = "" if policy.llm_int8_threshold is None else "; outlier channels are those that smoothing separates"
        notice(
            "not-dynamic",
            f"The variant {plan.family} computes no activation ranges at run time: calibration fixes them{smoothed}.",
            where="policy.activations",
        )
    if policy.preset in LOW and LOW[policy.preset].quantized and not plan.quantized():
        why = Counter(entry.rule for entry in plan if not entry.rule.startswith("preset")).most_common(1)
        notice(
            "nothing-quantized",
            f"The variant {plan.family} quantizes no node" + (f", mostly for this: {why[0][0]}." if why else "."),
            where=f"preset {policy.preset}",
        )
    for entry in plan:
        if entry.rule.startswith(SHARED):
            notice(
                "qkv-shared",
                f"Query, key and value share one GEMM, so all three compute in {entry.precision}",
                where=f"{entry.node} {entry.rule}",
            )
    if seen.costs and not {c.name for c in found} & set(seen.costs):
        notice(
            "costs-unused", "The node costs name no node of this model; they were measured on another.", where="costs"
        )


def _remark_rule(plan: PrecisionPlan, found: tuple[Candidate, ...], config: RuleConfig, where: str) -> bool:
    """Say why a rule has no effect; return whether it may have one."""
    matched = [c for c in found if all(conditions(config, c).values())]
    if not matched:
        notice("rule-unmatched", f"The rule {config} matches no node: {_unmet(found, config)}", where=where)
        return False
    if config.precision is not None and config.precision.quantized:
        refused = {e.node: e.rule for e in plan if e.rule.startswith("not quantizable")}
        if all(c.name in refused for c in matched):
            notice(
                "rule-not-quantizable",
                f"The rule {config} matches {len(matched)} nodes, none of which can be quantized; "
                f"{matched[0].name} is {refused[matched[0].name]}",
                where=where,
            )
            return False
    return True


def _remark_policy(plan: PrecisionPlan, policy: PolicyConfig, seen: Evidence) -> None:
    """Say which quantized nodes the policy's own smoothing and rounding are not for."""
    if policy.smooth not in (None, "off") and plan.dynamic:
        notice("not-smoothed", "Nothing is smoothed where activations are dynamic.", where="policy.smooth")
    method = policy.rounding
    if method is None and not seen.data and not plan.dynamic and (what := gains(plan)):
        notice(
            "rounded-to-nearest",
            f"{what} are rounded to nearest; with --calibration DATA, GPTQ would round them for these inputs",
            where=plan.family,
        )
    if method not in ("gptq", "awq") or not plan.formats:
        return
    if plan.dynamic:
        notice(
            f"not-{method}", "Weights are rounded to nearest where activations are dynamic.", where="policy.rounding"
        )
    elif left := {p for p in plan.formats if p is Precision.NF4 or (method == "awq" and p not in SCALED)}:
        which = " and ".join(sorted(p.upper() for p in left))
        notice(
            f"not-{method}",
            f"{method.upper()} does not round {which} weights; they are rounded to nearest",
            where=plan.family,
        )


def _remark_methods(plan: PrecisionPlan, found: tuple[Candidate, ...], policy: PolicyConfig, index: int) -> None:
    """Say which of its nodes do not take a method that a rule sets, and which nodes beside them had to agree."""
    config, where = policy.rules[index], f"policy.rules[{index}]"
    precisions = plan.precisions()
    for key, value in config.methods.items():
        own = [c for c in found if asked(policy, c, key).rule == index]
        why = {c.name: untaken(c, precisions[c.name], key, value, plan.family, dynamic=plan.dynamic) for c in own}
        refused = [c.name for c in own if why[c.name] and precisions[c.name].quantized]
        if own and (refused or all(why.values())):
            first = (refused or list(why))[0]
            notice(
                "rule-method-unused",
                f"The rule {config} sets {key} for {len(refused) or len(own)} {'quantized ' if refused else ''}nodes that do not take it "
                f"in the variant {plan.family}; for {first}, {why[first]}",
                where=where,
            )
    followers = [e.node for e in plan if f"recipe {config} {SHARES}" in e.rule]
    if followers:
        notice(
            "rule-method-shared",
            f"The rule {config} decides for {len(followers)} more nodes, which read a tensor with those it matches "
            "and share its scales or blocks",
            where=followers[0],
        )


def _unmet(found: tuple[Candidate, ...], config: RuleConfig) -> str:
    """Return which condition no node meets, with the nearest thing that exists."""
    stated = [conditions(config, c) for c in found]
    for condition in ("role", "op_type", "name"):
        if not any(met.get(condition, True) for met in stated):
            existing = {
                "role": {str(c.role.role) for c in found},
                "op_type": {c.node.op_type for c in found},
                "name": {name for c in found for name in c.names},
            }[condition]
            near = _nearest(str(getattr(config, condition)), sorted(existing))
            return f"the model has no such {condition.replace('_', ' ')}; the nearest is {near}."
    return "each of its conditions is met by some node, but no node meets them all."


def _nearest(wanted: str, existing: Iterable[str]) -> str:
    """Return what shares the longest piece with ``wanted``, whose wildcards count for nothing."""
    literal = max(wanted.replace("?", "*").split("*"), key=len)

    def likeness(name: str) -> tuple[int, float]:
        matcher = difflib.SequenceMatcher(None, name, literal, autojunk=False)
        return matcher.find_longest_match().size, matcher.quick_ratio()

    return max(existing, key=likeness, default="none at all")
