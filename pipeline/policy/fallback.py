"""What a target gets of a policy whose precisions it lacks: the nearest that it has, where the recipe allows that."""

from __future__ import annotations

from engines.target import Target, check_block, check_precision, nearest
from pipeline.notices import notice
from pipeline.policy.formats import block_size
from pipeline.policy.planning import half_of
from pipeline.policy.rules import LOW
from pipeline.recipe import PolicyConfig, Preset
from pipeline.types import HALVES, Precision


def policy_on(device: Target, policy: PolicyConfig) -> PolicyConfig:
    """Return the policy as ``device`` can carry it out.

    With ``policy.fallback`` a precision that the device lacks becomes the nearest that it has, with a notice; without, the
    policy is returned as it is.

    Raises:
        RecipeError: The device lacks a precision or block size, and the recipe allows no other.
        PolicyError: A rule asks for another 16-bit type than the rest.
    """
    if policy.fallback:
        policy = _carried(device, policy)
    half = half_of(policy)
    asked = {_own(policy.preset), *policy.asked}
    asked |= {half} if policy.preset is not Preset.FP32 and half is Precision.BF16 else set()
    for precision in sorted(asked):
        # On a CPU the 16-bit types mean FP32.
        if device.compute_capability is not None or precision not in HALVES:
            check_precision(device, precision)
    if Precision.INT4 in asked:
        check_block(device, block_size(policy))
        for rule in policy.rules:
            if rule.block_size is not None and rule.precision in (None, Precision.INT4):
                check_block(device, rule.block_size, where=f"policy.rules {rule}")
    return policy


def _own(preset: Preset) -> Precision:
    """Return the precision that a preset needs most."""
    if preset is Preset.FP8_INT8:
        return Precision.FP8
    return LOW[preset] if preset in LOW else Precision(preset)


def _carried(device: Target, policy: PolicyConfig) -> PolicyConfig:
    preset, on_gpu = policy.preset, device.compute_capability is not None
    changed: dict[str, Precision] = {}

    def has(precision: Precision) -> Precision:
        if precision in device.precisions or (not on_gpu and precision in HALVES):
            return precision
        found = nearest(device, precision)
        changed[precision] = found
        return found

    own = _own(preset)
    kept = has(own)
    if not on_gpu and own in HALVES:
        kept = changed[own] = Precision.FP32
    if kept is not own:
        preset = Preset(kept)
    half = "fp16" if on_gpu and policy.half == "bf16" and has(Precision.BF16) is not Precision.BF16 else policy.half
    rules = tuple(
        r if r.precision is None else r.model_copy(update={"precision": has(r.precision)}) for r in policy.rules
    )
    for lacking, found in changed.items():
        notice(
            "fallback",
            f"{device.title} has no {lacking.upper()}; it gets {found.upper()} instead",
            where=f"target {device.name}",
        )
    return policy.model_copy(update={"preset": preset, "half": half, "rules": rules})
