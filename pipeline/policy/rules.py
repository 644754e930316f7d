"""Rules: a condition on a node and the precision it asks for. Applied in order, the last match wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.recipe import Preset, RuleConfig
from pipeline.sources.names import module_path
from pipeline.types import HALVES, NodeRole, Precision, Role

PROJECTIONS = (
    Role.ATTENTION_QUERY,
    Role.ATTENTION_KEY,
    Role.ATTENTION_VALUE,
    Role.ATTENTION_QKV,
    Role.ATTENTION_OUTPUT,
)
FFN = (Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN)
CONVOLUTIONS = (Role.CONV_STEM, Role.CONV, Role.DEPTHWISE_CONV)
SKEWED = (Role.ATTENTION_OUTPUT, Role.FFN_DOWN)
"""GEMMs whose inputs have long tails, because a nonlinearity or attention made them. FP8's steps grow with the value, INT8's do
not; behind a norm values are even, and INT8 has more steps for them."""
LOW = {
    Preset.INT8: Precision.INT8,
    Preset.INT8_ALL: Precision.INT8,
    Preset.FP8: Precision.FP8,
    Preset.FP8_INT8: Precision.INT8,
    Preset.INT4: Precision.INT4,
    Preset.FP4: Precision.FP4,
    Preset.W8A16: Precision.W8A16,
    Preset.NF4: Precision.NF4,
}
"""What a preset's projections, FFN and other linear layers compute in, where it quantizes them."""
ATTENTION_MATMULS = (Role.ATTENTION_SCORES, Role.ATTENTION_CONTEXT)

# NVIDIA's explicit-quantization guidance: below these sizes the INT8 kernel costs more than it saves.
MIN_GEMM_DIM = 16
MIN_CONV_CHANNELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A node as the rules see it.

    Attributes:
        node: The node in the canonical graph.
        role: What it is for.
        operands: What it reads; ``None`` where it cannot be quantized.
        names: What patterns are compared with: its own name and, where torch's exporter called it ``node_linear_14`` and kept
            the module beside it, the module's path with the operator (``/model/lm_head/MatMul``).
    """

    node: ir.Node
    role: NodeRole
    operands: Operands | None
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the node's name in the canonical graph."""
        return self.node.name or ""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the constant weight's shape, ``()`` where there is none."""
        return () if self.operands is None else self.operands.weight_shape(self.node)

    @property
    def summed(self) -> int:
        """Return how many products a GEMM with a constant weight adds up for each output."""
        assert self.operands is not None
        return self.weight_shape[1 - (self.operands.channel_axis or 0)]


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
        Candidate(node=node, role=roles.get(node.name or "", other), operands=operands(node), names=tuple(_names(node)))
        for node in model.graph
    )


def _names(node: ir.Node) -> Iterator[str]:
    yield node.name or ""
    if path := module_path(node):
        yield f"{path}/{node.op_type}"


def by_role(text: str, precision: Precision, *roles: Role) -> Rule:
    """Return the rule that gives nodes of these roles a precision."""
    return Rule(text=text, precision=precision, matches=lambda c: c.role.role in roles)


def preset_rules(preset: Preset, high: Precision, family: str) -> list[Rule]:
    """Return the rules of a preset: first everything ``high``, then what the preset quantizes."""
    rules = [Rule(text=f"preset {preset}: the rest", precision=high, matches=lambda _: True)]
    low = LOW.get(preset)
    if low is not None:
        rules += [
            by_role(f"preset {preset}: attention projections", low, *PROJECTIONS),
            by_role(f"preset {preset}: FFN", low, *FFN),
            by_role(f"preset {preset}: linear layers", low, Role.LINEAR),
        ]
    if preset is Preset.FP8_INT8:
        rules.append(by_role(f"preset {preset}: reads a nonlinearity or attention", Precision.FP8, *SKEWED))
    if preset in (Preset.INT8, Preset.INT8_ALL, Preset.FP8_INT8):
        rules += [
            by_role(f"preset {preset}: convolutions", Precision.INT8, *CONVOLUTIONS),
            by_role(f"preset {preset}: residual add", Precision.INT8, Role.RESIDUAL_ADD),
        ]
    if preset is Preset.INT8_ALL or (preset is Preset.INT8 and family == "cpu"):
        # On a GPU the look-up becomes a kernel of its own, where in FP16 it is part of the norm behind it.
        rules.append(by_role(f"preset {preset}: embedding tables", Precision.INT8, Role.EMBEDDING))
    if preset is Preset.INT8_ALL:
        rules.append(by_role("preset int8-all: attention matmuls", Precision.INT8, *ATTENTION_MATMULS))
    return rules


def guard_rules(family: str, high: Precision, low: Precision | None = None) -> list[Rule]:
    """Return what stays in high precision because INT8 is known to be slower or useless there.

    Args:
        family: The variant.
        high: What stays computes in this.
        low: What the preset quantizes to.
    """
    rules = [
        Rule(text=f"guard: GEMM with K or N below {MIN_GEMM_DIM}", precision=high, matches=_narrow_gemm),
        Rule(
            text=f"guard: convolution with fewer than {MIN_CONV_CHANNELS} channels",
            precision=high,
            matches=_narrow_convolution,
        ),
        Rule(text="guard: matrix-vector product", precision=high, matches=_matrix_vector),
    ]
    if family == "cpu":
        rules += [
            # Networks of depthwise convolutions ran at 0.35-0.5x of FP32 in ONNX Runtime's INT8 CPU kernels.
            by_role("guard: depthwise convolution is slower in INT8 on CPU", high, Role.DEPTHWISE_CONV),
            Rule(
                text="guard: ONNX Runtime has no INT8 kernel for ConvTranspose on CPU",
                precision=high,
                matches=lambda c: c.node.op_type == "ConvTranspose",
            ),
        ]
    if family == "cpu" and low is not Precision.NF4:  # whose kernel reads FP16 tensors
        rules += [
            Rule(
                text="guard: ONNX Runtime has no INT8 kernels for FP16 tensors on CPU; start from the FP32 model",
                precision=high,
                matches=lambda c: any(v is not None and v.dtype is ir.DataType.FLOAT16 for v in c.node.inputs),
            ),
        ]
    return rules


def cost_rules(costs: Mapping[str, Mapping[str, float]], high: Precision) -> list[Rule]:
    """Return one rule for every node that was measured to be no faster in INT8."""
    return [
        Rule(
            text=f"costs: {cost['int8_ms']:.3g} ms in INT8, {cost['fp32_ms']:.3g} ms in FP32",
            precision=high,
            matches=lambda c, name=name: c.name == name,  # type: ignore[misc]
        )
        for name, cost in costs.items()
        if cost["int8_ms"] >= cost["fp32_ms"]
    ]


def user_rules(configs: Iterable[RuleConfig], family: str) -> list[Rule]:
    """Return the rules of a recipe that set a precision; without a GPU, ``fp16`` and ``bf16`` mean FP32, which is what a CPU's kernels compute."""
    return [_user_rule(config, config.precision, family) for config in configs if config.precision is not None]


def _user_rule(config: RuleConfig, precision: Precision, family: str) -> Rule:
    text = f"recipe {config}"
    if precision in HALVES and not family.startswith("gpu"):
        precision, text = Precision.FP32, f"{text} (a CPU computes {precision.upper()} in FP32)"
    return Rule(text=text, precision=precision, matches=lambda candidate: all(conditions(config, candidate).values()))


def conditions(config: RuleConfig, candidate: Candidate) -> dict[str, bool]:
    """Return each condition that a recipe's rule states (``role``, ``op_type``, ``name``) and whether the node meets it."""
    role = candidate.role.role
    met = {}
    if config.role is not None:
        family = config.role in ("attention", "ffn") and role.startswith(f"{config.role}_")
        met["role"] = config.role in ("*", role) or family
    if config.op_type is not None:
        met["op_type"] = config.op_type == candidate.node.op_type
    if config.name is not None:
        met["name"] = any(fnmatchcase(name, config.name) for name in candidate.names)
    return met


def _narrow_gemm(candidate: Candidate) -> bool:
    return candidate.node.op_type in ("MatMul", "Gemm") and 0 < min(candidate.weight_shape, default=0) < MIN_GEMM_DIM


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
