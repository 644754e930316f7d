"""Rules: a condition on a node and the precision it asks for. Applied in order, the last match wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.recipe import Preset, RuleConfig
from pipeline.types import NodeRole, Precision, Role

PROJECTIONS = (
    Role.ATTENTION_QUERY,
    Role.ATTENTION_KEY,
    Role.ATTENTION_VALUE,
    Role.ATTENTION_QKV,
    Role.ATTENTION_OUTPUT,
)
FFN = (Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN)
CONVOLUTIONS = (Role.CONV_STEM, Role.CONV, Role.DEPTHWISE_CONV)
ATTENTION_MATMULS = (Role.ATTENTION_SCORES, Role.ATTENTION_CONTEXT)

# NVIDIA's explicit-quantization guidance: below these sizes the INT8 kernel costs more than it saves.
MIN_GEMM_DIM = 16
MIN_CONV_CHANNELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node as the rules see it."""

    node: ir.Node
    role: NodeRole
    operands: Operands | None

    @property
    def name(self) -> str:
        """Return the node's name in the canonical graph."""
        return self.node.name or ""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the constant weight's shape, ``()`` where there is none."""
        if self.operands is None or self.operands.weight is None:
            return ()
        value = self.node.inputs[self.operands.weight]
        return tuple(value.shape.numpy()) if value is not None and value.shape is not None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Gives ``precision`` to the candidates that ``matches``; ``text`` names the rule in the precision plan."""

    text: str
    precision: Precision
    matches: Callable[[Candidate], bool]


def candidates(model: ir.Model, roles: dict[str, NodeRole]) -> tuple[Candidate, ...]:
    """Return every node of the main graph with its role and operands, in graph order."""
    other = NodeRole(role=Role.OTHER)
    return tuple(
        Candidate(node=node, role=roles.get(node.name or "", other), operands=operands(node)) for node in model.graph
    )


def by_role(text: str, precision: Precision, *roles: Role) -> Rule:
    """Return the rule that gives nodes of these roles a precision."""
    return Rule(text=text, precision=precision, matches=lambda c: c.role.role in roles)


def preset_rules(preset: Preset, elsewhere: Precision) -> list[Rule]:
    """Return the rules of a preset: first everything ``elsewhere``, then what the preset quantizes."""
    rules = [Rule(text=f"preset {preset}: the rest", precision=elsewhere, matches=lambda _: True)]
    if preset in (Preset.INT8, Preset.INT8_ALL):
        int8 = Precision.INT8
        rules += [
            by_role(f"preset {preset}: attention projections", int8, *PROJECTIONS),
            by_role(f"preset {preset}: FFN", int8, *FFN),
            by_role(f"preset {preset}: convolutions", int8, *CONVOLUTIONS),
            by_role(f"preset {preset}: residual add of convolutions", int8, Role.RESIDUAL_ADD),
            by_role(f"preset {preset}: linear layers", int8, Role.LINEAR),
        ]
    if preset is Preset.INT8_ALL:
        rules.append(by_role("preset int8-all: attention matmuls", Precision.INT8, *ATTENTION_MATMULS))
    return rules


def guard_rules(family: str, elsewhere: Precision) -> list[Rule]:
    """Return what stays in high precision because INT8 is known to be slower or useless there."""
    rules = [
        Rule(
            text=f"guard: GEMM with K or N below {MIN_GEMM_DIM}",
            precision=elsewhere,
            matches=lambda c: (
                c.node.op_type in ("MatMul", "Gemm") and 0 < min(c.weight_shape, default=0) < MIN_GEMM_DIM
            ),
        ),
        Rule(
            text=f"guard: convolution with fewer than {MIN_CONV_CHANNELS} channels",
            precision=elsewhere,
            matches=_narrow_convolution,
        ),
        Rule(text="guard: matrix-vector product", precision=elsewhere, matches=_matrix_vector),
    ]
    if family == "cpu":
        # Networks of depthwise convolutions ran at 0.35-0.5x of FP32 in ONNX Runtime's INT8 CPU kernels.
        rules.append(by_role("guard: depthwise convolution is slower in INT8 on CPU", elsewhere, Role.DEPTHWISE_CONV))
    return rules


def user_rule(config: RuleConfig, family: str) -> Rule:
    """Return the rule that a recipe asks for; on ``cpu``, ``fp16`` means FP32, which is what its kernels compute."""
    precision = config.precision
    if family == "cpu" and precision is Precision.FP16:
        precision = Precision.FP32

    def matches(candidate: Candidate) -> bool:
        role = candidate.role.role
        return (
            (
                config.role in (None, "*", role)
                or (config.role in ("attention", "ffn") and role.startswith(f"{config.role}_"))
            )
            and config.op_type in (None, candidate.node.op_type)
            and (config.name is None or fnmatchcase(candidate.name, config.name))
        )

    return Rule(text=f"recipe {config}", precision=precision, matches=matches)


def _narrow_convolution(candidate: Candidate) -> bool:
    shape = candidate.weight_shape
    if candidate.role.role not in (Role.CONV, Role.CONV_STEM) or len(shape) < 3:
        return False
    # An image has three channels: a stem's output width decides.
    widths = shape[:1] if candidate.role.role is Role.CONV_STEM else shape[:2]
    return min(widths) < MIN_CONV_CHANNELS


def _matrix_vector(candidate: Candidate) -> bool:
    if candidate.node.op_type not in ("MatMul", "Gemm") or not candidate.weight_shape:
        return False
    value = candidate.node.inputs[0]
    rows = value.shape[:-1] if value is not None and value.shape is not None else ()
    return bool(rows) and all(isinstance(d, int) and d == 1 for d in rows)
