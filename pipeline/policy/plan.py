"""The precision plan: for every node its precision and the rule that decided it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from engines.target import INT4_BLOCKS
from pipeline.recipe import METHODS
from pipeline.types import BFLOAT16, Precision, QuantDType, QuantSpec, Role

CPU_BLOCKS = (32, 64, 128)
"""Sizes of INT4 and INT8 blocks for ONNX Runtime on a CPU, which takes any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """One node's precision, and the methods that keep its accuracy.

    Attributes:
        node: Name in the canonical graph.
        op_type: ONNX operator.
        role: What the node is for.
        block: Repeated layer it belongs to, if any.
        precision: What it computes in. A quantized node reads Q/DQ pairs.
        rule: The rule that decided, in words a user can find in the recipe or the documentation; behind it, after a
            semicolon, the recipe's rules that gave the node a method.
        smooth: Exponent by which what it reads is smoothed, searched (``auto``) or none (``off``); ``None`` where nothing
            that it multiplies by a constant weight is quantized.
        rounding: How its weight is rounded; ``None`` where it multiplies by no quantized constant.
        block_size: Weights along the summed axis that share a scale; ``None`` is all of an output channel.
        llm_int8_threshold: Columns of its dynamic activation that exceed it in a batch are multiplied in float; ``None`` for none.
    """

    node: str
    op_type: str
    role: Role
    block: int | None
    precision: Precision
    rule: str
    smooth: Literal["off", "auto"] | float | None = None
    rounding: Literal["rtn", "gptq", "awq"] | None = None
    block_size: int | None = None
    llm_int8_threshold: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a quantized node's operands are stored: activations per tensor, weights per output channel or in blocks.

    ``activations`` is ``None`` where only weights are quantized. ``second`` is for the second operand of a matmul of two activations, where the target wants another type.
    """

    activations: QuantSpec | None
    weights: QuantSpec
    second: QuantSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """The whole graph's precisions and methods for one family of targets.

    Attributes:
        family: Variant this is for: ``cpu``, ``gpu-int8``, ``gpu-fp16``, ``gpu-bf16``, ``fp32``.
        elsewhere: What nodes that are not quantized compute in unless their own entry says otherwise.
        dynamic: Activation ranges are computed at run time.
        per_token: Dynamic activations have a scale for each token.
        formats: Storage for each quantized precision in use.
        nodes: Every node of the main graph, in topological order.
    """

    family: str
    elsewhere: Precision
    dynamic: bool = False
    per_token: bool = False
    formats: Mapping[Precision, Format] = field(default_factory=dict)
    nodes: tuple[NodePlan, ...] = ()

    def __iter__(self) -> Iterator[NodePlan]:
        return iter(self.nodes)

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        """What scales are stored in: the type that the rest of the graph computes in."""
        return {Precision.FP16: np.dtype(np.float16), Precision.BF16: BFLOAT16}.get(
            self.elsewhere, np.dtype(np.float32)
        )

    @property
    def signed_scales(self) -> bool:
        """Whether scales of blocks may be negative: TensorRT refuses them, ONNX Runtime multiplies with them."""
        return self.family == "cpu"

    @property
    def emulated(self) -> bool:
        """Whether the graph has types that ONNX Runtime's CPU provider has no kernels for."""
        return self.elsewhere is Precision.BF16 or Precision.FP4 in self.formats

    def precisions(self) -> dict[str, Precision]:
        """Return node name to precision."""
        return {n.node: n.precision for n in self.nodes}

    def quantized(self) -> tuple[NodePlan, ...]:
        """Return the nodes that read Q/DQ pairs."""
        return tuple(n for n in self.nodes if n.precision.quantized)

    def weight_spec(self, entry: NodePlan) -> QuantSpec:
        """Return how a quantized node's weight is stored: its precision's format, in blocks of its own size."""
        return replace(self.formats[entry.precision].weights, block=entry.block_size)

    def reading(self, *methods: str) -> str:
        """Return as JSON what a stage reads that looks at these methods of the nodes and no others, for its cache key."""
        left = {"rule", *METHODS}.difference(methods)
        whole = asdict(self)
        whole["nodes"] = [{k: v for k, v in node.items() if k not in left} for node in whole["nodes"]]
        return json.dumps(whole, ensure_ascii=False)

    def counts(self) -> dict[str, int]:
        """Return how many nodes each precision has."""
        return dict(sorted(Counter(str(n.precision) for n in self.nodes).items()))

    def to_json(self) -> str:
        """Return the plan as JSON text; the same plan gives the same text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """Return the plan that :meth:`to_json` wrote."""
        raw = json.loads(text)
        nodes = tuple(
            NodePlan(**{**n, "role": Role(n["role"]), "precision": Precision(n["precision"])}) for n in raw["nodes"]
        )
        formats = {Precision(p): _format(f) for p, f in raw["formats"].items()}
        return cls(
            family=raw["family"],
            elsewhere=Precision(raw["elsewhere"]),
            dynamic=raw["dynamic"],
            per_token=raw.get("per_token", False),
            formats=formats,
            nodes=nodes,
        )


def fitted(spec: QuantSpec, summed: int, family: str) -> int | None:
    """Return the largest block, at most the one asked for, that divides the summed axis; ``None`` where none does.

    Integers fall back to smaller blocks (64 on GPUs, as TensorRT documents them; 64 or 32 on a CPU); FP4 has one size.
    """
    assert spec.block is not None
    others = () if spec.dtype is QuantDType.FP4_E2M1 else (CPU_BLOCKS if family == "cpu" else INT4_BLOCKS)
    sizes = sorted({spec.block, *(b for b in others if b < spec.block)}, reverse=True)
    return next((b for b in sizes if summed % b == 0), None)


def _format(raw: dict[str, Any]) -> Format:
    found = {key: None if value is None else _spec(value) for key, value in raw.items()}
    weights = found["weights"]
    assert weights is not None
    return Format(activations=found["activations"], weights=weights, second=found["second"])


def _spec(raw: dict[str, Any]) -> QuantSpec:
    return QuantSpec(
        dtype=QuantDType(raw["dtype"]),
        symmetric=raw["symmetric"],
        axis=raw["axis"],
        block=raw.get("block"),
        double=raw.get("double", False),
    )
