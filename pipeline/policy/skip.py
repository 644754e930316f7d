"""What stays in high precision because the recipe names it, or because its input has outliers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from calibrators.percentile import quantile
from calibrators.sketch import Sketch
from pipeline.policy.rules import Candidate, Rule
from pipeline.recipe import PolicyConfig
from pipeline.types import Precision

_ORDINARY = 0.999
"""Share of the values that count as ordinary: beyond it lie one channel in a thousand, or one value."""


def skip_rules(policy: PolicyConfig, high: Precision, outliers: Mapping[str, float]) -> list[Rule]:
    """Return the rules of ``policy.skip`` and ``policy.outlier_threshold``, which win over all others.

    Args:
        policy: The recipe's policy.
        high: What a skipped node computes in.
        outliers: Tensor name to how far its outliers stand out, from :func:`outlier_ratios`.
    """
    rules = [
        Rule(text=f"skip: {name}", precision=high, matches=lambda c, name=name: skips(name, c))  # type: ignore[misc]
        for name in policy.skip
    ]
    threshold = policy.outlier_threshold
    if threshold is not None:
        rules.append(
            Rule(
                text=f"outliers: an input's largest |x| is over {threshold:g} times its 99.9th percentile",
                precision=high,
                matches=lambda c: _worst(c, outliers) > threshold,
            )
        )
    return rules


def skips(pattern: str, candidate: Candidate) -> bool:
    """Return whether ``pattern`` meets the node by one of its names."""
    return any(named(pattern, name) for name in candidate.names)


def named(pattern: str, node: str) -> bool:
    """Return whether a node's name meets ``pattern``: a glob over the whole name, or a module's name anywhere in it.

    ``lm_head`` meets ``/lm_head/MatMul`` and ``model.lm_head.weight_MatMul``, not ``/lm_head_norm/MatMul``.
    """
    if any(sign in pattern for sign in "*?[/"):
        return fnmatchcase(node, pattern)
    return re.search(rf"(?:^|[/.:])({re.escape(pattern)})(?:$|[/.:])", node) is not None


def outlier_ratios(statistics: Mapping[str, Sketch]) -> dict[str, float]:
    """Return tensor name to its largest |x| over the 99.9th percentile of |x|; 1 where that is 0.

    A tensor with one huge channel in a thousand has a high ratio: one scale for all of it leaves few steps to the rest.
    """
    found = {}
    for name, sketch in statistics.items():
        if sketch.count and not sketch.nonfinite:
            ordinary = quantile(sketch.distribution(magnitudes=True), _ORDINARY)
            found[name] = float(np.float64(sketch.amax) / ordinary) if ordinary > 0 else 1.0
    return found


def _worst(candidate: Candidate, outliers: Mapping[str, float]) -> float:
    if candidate.operands is None:
        return 0.0
    values = [candidate.node.inputs[i] for i in candidate.operands.activations]
    return max((outliers.get(v.name or "", 0.0) for v in values if v is not None), default=0.0)
