"""The registry of rules."""

from __future__ import annotations

from pipeline.lint.rule import Rule
from pipeline.lint.rules import (
    attention,
    bias,
    operand_types,
    pairs,
    placement,
    products,
    scales,
    shapes,
    types,
    validity,
    zero_points,
)

_MODULES = (
    zero_points, scales, shapes, types, operand_types, bias, validity, pairs, placement, products, attention,
)  # fmt: skip

RULES: tuple[Rule, ...] = tuple(
    sorted((item for m in _MODULES for item in vars(m).values() if isinstance(item, Rule)), key=lambda r: r.id)
)
"""Every rule, by id."""
