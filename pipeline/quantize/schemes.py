"""Quantization schemes to compare on a model, and which targets execute each: some exist only as simulations.

All of them round to nearest, with the largest magnitude as range: what smoothing, clipping and GPTQ bring comes on top in a build.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from engines.target import Target, targets
from pipeline.errors import RecipeError
from pipeline.types import Precision, QuantDType, QuantSpec

SIMULATION_ONLY = "none (simulation only)"
"""What stands where a deployable scheme names its targets."""
LLM_INT8_THRESHOLD = 6.0
"""The threshold of LLM.int8() (Dettmers et al. 2022, section 3.2)."""


class Scales(StrEnum):
    """What has one scale in an activation."""

    STATIC = "static, per tensor"
    """The tensor; the scale is calibrated."""
    BATCH = "dynamic, per tensor"
    """The tensor of the batch at hand."""
    TOKEN = "dynamic, per token"
    """A row of the last axis."""
    BLOCK = "dynamic, per block"
    """Some elements of a row."""

    @property
    def dynamic(self) -> bool:
        """Whether the scale is found at run time, which only GEMMs have a form for."""
        return self is not Scales.STATIC


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the operands of products are quantized.

    Attributes:
        name: As ``--scheme`` takes it.
        weights: The weights' format, per output channel or in blocks.
        activations: The activations' format; its ``block`` is the elements that share a scale. ``None`` leaves them in float.
        scales: What has one scale.
        mx: Scales of blocks are powers of two (OCP MX).
        threshold: Columns of an activation with a larger magnitude stay in float; ``None`` keeps none.
        precision: What a target must have to execute it; ``None`` where no target does.
        cpu: Whether ONNX Runtime on a CPU executes it.
        gpu: Whether TensorRT does.
    """

    name: str
    weights: QuantSpec
    activations: QuantSpec | None = None
    scales: Scales = Scales.STATIC
    mx: bool = False
    threshold: float | None = None
    precision: Precision | None = None
    cpu: bool = False
    gpu: bool = False

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that execute the scheme; empty if it can only be simulated."""
        wanted = self.precision
        return tuple(
            t for t in targets() if wanted in t.precisions and (self.cpu if t.compute_capability is None else self.gpu)
        )

    @property
    def deployable(self) -> bool:
        """Whether any target executes the scheme."""
        return bool(self.targets)

    @property
    def runs_on(self) -> str:
        """The targets in words."""
        return ", ".join(t.name for t in self.targets) or SIMULATION_ONLY

    def in_words(self) -> tuple[str, str]:
        """Return the formats of weights and activations for people."""
        weights = _words(self.weights, "per output channel") + (", scales powers of two" if self.mx else "")
        if self.activations is None:
            return weights, "float"
        apart = "" if self.threshold is None else f", columns beyond {self.threshold:g} in float"
        return weights, _words(self.activations, self.scales) + apart


def _words(spec: QuantSpec, otherwise: str) -> str:
    kind = spec.dtype.replace("_", " ").upper()
    return f"{kind}, blocks of {spec.block}" if spec.block is not None else f"{kind}, {otherwise}"


_INT8 = QuantSpec(dtype=QuantDType.INT8)
_UINT8 = QuantSpec(dtype=QuantDType.UINT8, symmetric=False)
_E4M3, _E5M2 = QuantSpec(dtype=QuantDType.FP8_E4M3), QuantSpec(dtype=QuantDType.FP8_E5M2)


_MXFP8, _MXFP4 = (QuantSpec(dtype=d, block=32) for d in (QuantDType.FP8_E4M3, QuantDType.FP4_E2M1))


def _blocks(size: int) -> Scheme:
    block = QuantSpec(dtype=QuantDType.INT8, block=size)
    return Scheme(name=f"int8-block-{size}", weights=_INT8, activations=block, scales=Scales.BLOCK)


def _at_run_time(name: str, activations: QuantSpec, scales: Scales, *, threshold: float | None = None) -> Scheme:
    """Return a scheme whose scales are found at run time, which ONNX Runtime on a CPU executes."""
    return Scheme(
        name=name,
        weights=_INT8,
        activations=activations,
        scales=scales,
        threshold=threshold,
        precision=Precision.INT8,
        cpu=True,
    )


_TABLE = (
    Scheme(name="int8", weights=_INT8, activations=_INT8, precision=Precision.INT8, gpu=True),
    Scheme(name="uint8", weights=_INT8, activations=_UINT8, precision=Precision.INT8, cpu=True),
    _at_run_time("int8-dynamic", _UINT8, Scales.BATCH),
    _at_run_time("int8-per-token", _INT8, Scales.TOKEN),
    _at_run_time("llm-int8", _INT8, Scales.TOKEN, threshold=LLM_INT8_THRESHOLD),
    _blocks(128),
    _blocks(64),
    _blocks(32),
    Scheme(name="fp8-e4m3", weights=_E4M3, activations=_E4M3, precision=Precision.FP8, gpu=True),
    Scheme(name="fp8-e5m2", weights=_E5M2, activations=_E5M2),
    Scheme(name="fp8-e4m3-e5m2", weights=_E4M3, activations=_E5M2),
    Scheme(name="fp8-e5m2-weights", weights=_E5M2),
    Scheme(name="mxfp8", weights=_MXFP8, activations=_MXFP8, scales=Scales.BLOCK, mx=True),
    Scheme(name="mxfp4-mxfp8", weights=_MXFP4, activations=_MXFP8, scales=Scales.BLOCK, mx=True),
    Scheme(name="mxfp4-weights", weights=_MXFP4, mx=True),
    Scheme(
        name="fp4-weights",
        weights=QuantSpec(dtype=QuantDType.FP4_E2M1, block=16),
        precision=Precision.FP4,
        gpu=True,
    ),
    Scheme(
        name="int4-weights",
        weights=QuantSpec(dtype=QuantDType.INT4, block=128),
        precision=Precision.INT4,
        cpu=True,
        gpu=True,
    ),
)

SCHEMES: dict[str, Scheme] = {entry.name: entry for entry in _TABLE}
"""Every scheme by name, in the order in which they are shown."""


def schemes_named(names: tuple[str, ...]) -> tuple[Scheme, ...]:
    """Return the schemes of these names, all without names; in the table's order.

    Raises:
        RecipeError: There is no such scheme; lists all.
    """
    unknown = next((name for name in names if name not in SCHEMES), None)
    if unknown is not None:
        raise RecipeError(
            f"There is no scheme {unknown!r}.", where="--scheme", fix=f"The schemes are: {', '.join(SCHEMES)}."
        )
    return tuple(scheme for scheme in _TABLE if not names or scheme.name in names)
