"""Which node computes in which precision: presets, rules, and the methods that keep accuracy."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.recipe.section import Section, listed
from pipeline.types import WEIGHT_ONLY, Precision, Role

ALIASES = {
    "w8a8": "int8",
    "int8-fp16": "int8",
    "w16a16": "fp16",
    "w32a32": "fp32",
    "int8_all": "int8-all",
    "half": "fp16",
    "float16": "fp16",
    "fp8-fp16": "fp8",
    "fp8_e4m3": "fp8",
    "float32": "fp32",
    "w4a16": "int4",
    "int4-fp16": "int4",
    "int8-fp8": "fp8-int8",
    "none": "fp32",
    "bfloat16": "bf16",
    "w4a16-fp4": "fp4",
    "full": "int8-all",
    "int8-weights": "w8a16",
    "int8wo": "w8a16",
    "int8-weight-only": "w8a16",
    "normalfloat4": "nf4",
    "bnb-nf4": "nf4",
}
"""Names that people use for a preset or precision, and the name used here."""

NOT_YET = {"w4a8", "mxfp8", "nvfp4"}
"""Schemes that people ask for and this version does not make; named so that the answer is clear."""
ROUNDINGS = {"awq", "gptq"}
"""Ways to round that people ask for as if they were precisions."""


class Preset(StrEnum):
    """A ready-made policy."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    """INT8 projections, FFN, other linear layers and convolutions; attention core and the rest in high precision."""
    INT8_ALL = "int8-all"
    """The same, and the attention matmuls too."""
    FP8 = "fp8"
    """As ``int8``, but in FP8 (E4M3) and without convolutions; needs SM89 (L4, L40S, H100) or newer."""
    FP8_INT8 = "fp8-int8"
    """FP8 for GEMMs that read what a nonlinearity or attention made, INT8 for the others and convolutions; needs SM89."""
    INT4 = "int4"
    """Weights of projections, FFN and other linear layers in INT4, in blocks; everything computes in high precision."""
    FP4 = "fp4"
    """As ``int4``, in FP4 (E2M1) and blocks of 16; needs a Blackwell GPU (B200, RTX 5090)."""
    W8A16 = "w8a16"
    """As ``int4``, in INT8: a scale for each output channel on GPUs, for each block on ``cpu``; nearly lossless without calibration data."""
    NF4 = "nf4"
    """As ``int4``, in NF4 (QLoRA's NormalFloat) and blocks of 64, as bitsandbytes stores it; ``cpu`` only, and needs no calibration data."""


def _alias(value: Any) -> Any:
    if isinstance(value, str):
        name = value.strip().lower()
        if name in NOT_YET:
            raise ValueError(f"{value} is not made by this version; it makes {', '.join(Preset)} (and W8A8 = int8)")
        if name in ROUNDINGS:
            raise ValueError(f"{value} is a way to round; write int4 here and {name} for policy.rounding")
        return ALIASES.get(name, name)
    return value


def _switch(value: Any) -> Any:
    """Read YAML's ``off`` and ``on``, which are booleans there, as the words they were."""
    return {True: "auto", False: "off"}[value] if isinstance(value, bool) else value


Smooth = Annotated[
    Literal["off", "auto"] | Annotated[float, Field(ge=0, le=1)] | None,
    Field(union_mode="left_to_right"),
    BeforeValidator(_switch),
]
Rounding = Literal["rtn", "gptq", "awq"]
METHODS = ("smooth", "rounding", "block_size", "llm_int8_threshold")
"""What a rule sets beside a precision; the policy's key of the same name is for nodes that no rule speaks of."""
BLOCKED = (Precision.INT4, Precision.NF4, Precision.W8A16)
"""Precisions whose block the recipe sizes; FP4's blocks hold 16."""
SCALED = tuple(p for p in WEIGHT_ONLY if p is not Precision.NF4)
"""Precisions that AWQ is for."""


class RuleConfig(Section):
    """Gives the nodes that match all of its conditions a precision, a method, or both. Of the rules that set a thing, the last one that matches wins for it."""

    role: Role | Literal["attention", "ffn", "*"] | None = None
    """A role (``ffn_down``) or a family of roles (``attention``, ``ffn``)."""
    op_type: str | None = None
    """An ONNX operator, such as ``MatMul``."""
    name: str | None = None
    """A glob over node names, such as ``*/layer.5/*``."""
    precision: Annotated[Precision | None, BeforeValidator(_alias)] = None
    """fp32, fp16, bf16, int8, fp8, or of weights only: int4, fp4, w8a16, nf4."""
    smooth: Smooth = None
    """As ``policy.smooth``, for these nodes: off, auto, or a number from 0 to 1. GEMMs that read one tensor share its scales: the last rule that matches one of them decides for all."""
    rounding: Rounding | None = None
    """As ``policy.rounding``, for the weights of these nodes."""
    block_size: Literal[32, 64, 128] | None = None
    """As ``policy.block_size``, for the weights of these nodes (int4, nf4, and on ``cpu`` w8a16)."""
    llm_int8_threshold: float | None = Field(default=None, gt=0)
    """As ``policy.llm_int8_threshold``, for what these nodes read; all that read one tensor share it."""

    @property
    def methods(self) -> dict[str, Any]:
        """Return the methods that the rule sets, by key."""
        return {key: value for key in METHODS if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.role is None and self.op_type is None and self.name is None:
            raise ValueError("a rule needs at least one of role, op_type, name")
        if self.precision is None and not self.methods:
            raise ValueError(f"a rule needs at least one thing to set: precision, {', '.join(METHODS)}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Refuse a method that nodes of the rule's own precision do not have."""
        precision = self.precision
        if precision is None:
            return self
        if self.methods and not precision.quantized:
            raise ValueError(
                f"{next(iter(self.methods))} is for quantized nodes, and the rule sets precision: {precision}"
            )
        if self.smooth is not None and precision in WEIGHT_ONLY:
            raise ValueError(f"smooth is for quantized activations, and {precision} quantizes weights alone")
        if self.block_size is not None and precision not in BLOCKED:
            raise ValueError(f"block_size is for {', '.join(BLOCKED)}, and the rule sets precision: {precision}")
        if self.llm_int8_threshold is not None and precision is not Precision.INT8:
            raise ValueError(f"llm_int8_threshold is for int8, and the rule sets precision: {precision}")
        if self.rounding == "awq" and precision not in SCALED:
            raise ValueError(f"rounding: awq is for {', '.join(SCALED)}, and the rule sets precision: {precision}")
        if self.rounding == "gptq" and precision is Precision.NF4:
            raise ValueError("nf4 is rounded to its nearest code; rounding: gptq is for the other precisions")
        return self

    def __str__(self) -> str:
        stated = ("role", "op_type", "name", "precision", *METHODS)
        return "{" + ", ".join(f"{k}: {v}" for k in stated if (v := getattr(self, k)) is not None) + "}"


class MixedPrecision(Section):
    """Quantized nodes that cost the outputs most for what they compute go back to high precision, by measurement on calibration samples, until ``sqnr_db`` is reached or ``low_share`` leaves nothing more (docs/how-it-works.md)."""

    sqnr_db: float | None = None
    """Enough SQNR of the worst output, dB, on the calibration samples."""
    low_share: float = Field(default=0.0, ge=0, le=1)
    """Least share of the multiplications in MatMul, Gemm and Conv that stays in low precision."""
    samples: int = Field(default=8, ge=1)
    """Calibration samples to measure on; one forward pass of each for every quantized node and every step."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.sqnr_db is None and not self.low_share:
            raise ValueError("give sqnr_db (enough accuracy), low_share (least share in low precision), or both")
        return self


class PolicyConfig(Section):
    """Which node computes in which precision."""

    preset: Annotated[Preset, BeforeValidator(_alias)] = Preset.INT8
    """The policy to start from."""
    rules: tuple[RuleConfig, ...] = ()
    """Applied after the preset, in order; for each thing that is set, the last match wins: ``{role: ffn_down, smooth: 0.85}``."""
    skip: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Stays in high precision whatever the rules say: module names (``lm_head``, ``embed_tokens``) or globs over node names, those of torch modules too where its exporter kept them beside its own. One that names nothing is told."""
    outlier_threshold: float | None = Field(default=None, gt=1)
    """Nodes stay in high precision that read a tensor whose largest |x| is more than this many times its 99.9th percentile."""
    smooth: Smooth = None
    """How outliers of static activations are moved into weights (SmoothQuant). ``auto`` searches for every GEMM how much, a number from 0 to 1 is that share (alpha) everywhere, ``off`` moves none; if not given, ``auto`` wherever the calibration data can be read again."""
    block_size: Literal[32, 64, 128] | None = None
    """How many INT4 weights (NF4's, and on ``cpu`` W8A16's too) along the summed axis share one scale; TensorRT takes 64 and 128 for INT4. 128 if not given, NF4's 64; FP4's blocks hold 16."""
    double_quantization: bool = False
    """NF4's absolute maxima are stored in 8 bits, in blocks of 256, less their mean (QLoRA's double quantization): 4.1 bits a weight in place of 4.5 in blocks of 64."""
    rounding: Rounding | None = None
    """How weights of MatMul, Gemm and Conv are rounded: to nearest; by GPTQ, which keeps the outputs close and reads the calibration data again; or, weights alone, by AWQ, which scales them by their inputs and clips their blocks. If not given, and with calibration data, GPTQ for variants with INT4 or FP4 weights and for networks with depthwise convolutions; to nearest otherwise."""
    mixed_precision: MixedPrecision | None = None
    """Quantized nodes that go back to high precision where they cost too much accuracy."""
    fallback: bool = False
    """A target that lacks a precision gets the nearest that it has (FP8 becomes INT8 on an A100), with a notice; an error if not."""
    half: Literal["fp16", "bf16"] = "fp16"
    """What GPUs compute the rest in. BF16 (from SM80 on) reaches as far as FP32, in steps eight times as wide as FP16's."""
    activations: Literal["static", "dynamic", "dynamic-per-token"] = "static"
    """``dynamic`` computes activation ranges at run time (``cpu`` only; no calibration needed), one for each tensor and batch; ``dynamic-per-token`` gives every token a scale of its own. GPU targets keep static ranges, with a notice."""
    llm_int8_threshold: float | None = Field(default=None, gt=0)
    """With dynamic activations: columns in which a batch has an |x| above this are multiplied in float, as LLM.int8() does (6.0 there, with ``dynamic-per-token``). On GPUs smoothing separates channels that calibration chose. Off if not given."""

    @property
    def asked(self) -> frozenset[Precision]:
        """Return the precisions that rules ask for."""
        return frozenset(r.precision for r in self.rules if r.precision is not None)

    @model_validator(mode="after")
    def _threshold(self) -> Self:
        wanted = [self.llm_int8_threshold, *(r.llm_int8_threshold for r in self.rules)]
        if any(value is not None for value in wanted) and self.activations == "static":
            raise ValueError(
                "llm_int8_threshold looks for outliers at run time: set activations to dynamic or dynamic-per-token"
            )
        return self

    @model_validator(mode="after")
    def _weights_alone(self) -> Self:
        asked = {str(self.preset), *self.asked}
        awq = self.rounding == "awq" or any(r.rounding == "awq" for r in self.rules)
        if awq and not asked & {*SCALED}:
            raise ValueError("rounding: awq is for weights alone; take int4, fp4 or w8a16 as preset or in a rule")
        if any(r.block_size is not None for r in self.rules) and not asked & {*BLOCKED}:
            raise ValueError("a rule's block_size is for int4, nf4 and w8a16; take one of them as preset or in a rule")
        if self.double_quantization and "nf4" not in asked:
            raise ValueError("double_quantization is for nf4; take nf4 as preset or in a rule")
        return self
