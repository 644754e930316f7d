"""What FP16 cannot hold whatever the data: kept in FP32 by rules that a recipe's own rules may override."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.policy.rules import Candidate, Rule
from pipeline.types import Precision, Role

FLOAT16_MAX = 65504.0
SENTINEL = 1e8
"""Attention masks hold -1e9 or the most negative float; such a value saturates harmlessly in FP16 and is no activation."""

_UNDERFLOW = 2.0**-25
"""The largest magnitude that FP16 rounds to zero."""
_WHOLE_NORMS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization",
                "BatchNormalization")  # fmt: skip


def half_guards(found: tuple[Candidate, ...], half: Precision) -> list[Rule]:
    """Return the rules that keep in FP32 what loses its meaning in FP16 or BF16."""
    angles = _angles(found)
    why = (
        "squares its input, which overflows FP16" if half is Precision.FP16 else "adds squares, which BF16 rounds away"
    )
    rules = [
        Rule(
            text=f"guard: a norm of single operators {why}",
            precision=Precision.FP32,
            matches=lambda c: c.role.role is Role.NORM and c.node.op_type not in _WHOLE_NORMS,
        ),
        Rule(
            # Above 2048 FP16 has no odd numbers: a rotary embedding's angles would be off by radians.
            text=f"guard: sine and cosine of positions, which {half.upper()} cannot count",
            precision=Precision.FP32,
            matches=lambda c: c.name in angles,
        ),
    ]
    if half is Precision.FP16:  # BF16 reaches as far down as FP32
        rules.append(
            Rule(
                text="guard: a constant that FP16 rounds to zero",
                precision=Precision.FP32,
                matches=lambda c: any(_vanishes(v) for v in c.node.inputs),
            )
        )
    return rules


def _vanishes(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or value.dtype is not ir.DataType.FLOAT:
        return False
    return value.const_value.size == 1 and 0.0 < abs(float(np.ravel(value.const_value.numpy())[0])) < _UNDERFLOW


def _angles(found: tuple[Candidate, ...]) -> set[str]:
    """Return the names of Sin and Cos nodes whose argument is computed from integers, and of what computes it."""
    computed: dict[ir.Value, ir.Node] = {}
    wanted: set[str] = set()
    for candidate in found:
        node = candidate.node
        changing = [v for v in node.inputs if v is not None and v.const_value is None]
        # A table of floats that is looked up holds activations, not positions.
        table = node.op_type == "Gather" and changing[:1] != [node.inputs[0]]
        if not table and all(_integer(v) or v in computed for v in changing):
            computed |= dict.fromkeys((v for v in node.outputs if not _integer(v)), node)
        if node.op_type in ("Sin", "Cos") and node.inputs[0] in computed:
            wanted |= {node.name or ""} | _makers(node.inputs[0], computed)
    return wanted


def _makers(value: ir.Value | None, computed: dict[ir.Value, ir.Node]) -> set[str]:
    names: set[str] = set()
    stack = [value]
    while stack:
        node = computed.get(current) if (current := stack.pop()) is not None else None
        if node is not None and (node.name or "") not in names:
            names.add(node.name or "")
            stack += node.inputs
    return names


def _integer(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_integer()
