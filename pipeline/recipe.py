"""Everything the user asked for, as one typed object and one YAML file.

A key that is not here is an error that names the nearest right one. The recipe says *what*; nothing in it depends on
the machine that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline import recipe_text
from pipeline.recipe_section import Section, listed
from pipeline.recipe_triton import TritonConfig
from pipeline.types import Precision, Role

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


class Method(StrEnum):
    """How a range is chosen from a tensor's statistics."""

    AUTO = "auto"
    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    ENTROPY_TRT = "entropy-trt"
    """TensorRT's own variant of the entropy calibrator."""


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


class Source(Section):
    """Where the trained model is: exactly one of ``onnx``, ``huggingface``, ``module``, ``pt2``."""

    onnx: Path | None = None
    """An ``.onnx`` file; external data stays beside it."""
    huggingface: str | None = None
    """A folder with a transformers model (safetensors only), or a hub id such as ``org/name`` where there is a network."""
    module: str | None = None
    """``package.module:factory``, a function that returns ``(torch.nn.Module, example_inputs)``. Your own code."""
    pt2: Path | None = None
    """A ``.pt2`` made by ``torch.export.save``. Loading one runs code that is in it."""
    task: str | None = None
    """feature-extraction, sequence-classification, image-classification or causal-lm; read from the model's config if not given."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    trust_source: bool = False
    """Needed for ``module`` and ``pt2``: their code runs on this machine, in a child process."""
    opset: int = Field(default=21, ge=21, le=23)
    """Opset of the exported graph."""
    kv_cache: bool = False
    """A causal language model in ``huggingface`` is exported with past keys and values as inputs (``past_key_values.N.key``) and outputs (``present.N.key``): one graph prefills and decodes (docs/language-models.md)."""
    strip_quantization: bool = False
    """Take existing Q/DQ pairs out of the graph first; without it a quantized model is refused."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [k for k in ("onnx", "huggingface", "module", "pt2") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"name exactly one of onnx, huggingface, module, pt2 (found {', '.join(given) or 'none'})")
        if self.kv_cache and self.huggingface is None:
            raise ValueError("kv_cache is for huggingface sources; an .onnx file has a cache or has none")
        return self


class Data(Section):
    """Samples for calibration or validation."""

    data: str | None = None
    """``.npz``, a folder of ``.npy``/``.npz`` or of images, ``.jsonl`` or ``.txt``, or ``package.module:callable``."""
    template: str = "{text}"
    """How a ``.jsonl`` record (or a ``.txt`` line, as ``text``) becomes the text to tokenize."""
    tokenizer: Path | None = None
    """Folder or ``tokenizer.json``; the Hugging Face source's own if not given."""
    max_length: int = Field(default=128, ge=1)
    """Tokens per sample; longer text is cut."""
    join: bool = False
    """Texts are joined and cut into windows of ``max_length`` tokens, as causal language models read them: a window's first
    token, which such models treat apart, is then any token and not always the same."""
    preprocessing: dict[str, Any] | None = None
    """Image preprocessing: size, crop, mean, std, scale, layout (see docs/data.md)."""
    samples: int = Field(default=512, ge=1)
    """At most this many samples are read."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per batch (a fixed batch dimension in the model wins)."""
    trust_data: bool = False
    """Needed for ``package.module:callable``: its code runs on this machine."""


class Calibration(Data):
    """How activation ranges are found."""

    method: Method = Method.AUTO
    """How a range is chosen; ``auto`` compares them and the report names the choice."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """For ``percentile``: the share of |x| kept."""
    cache: Path | None = None
    """A TensorRT calibration cache: its ranges are used, and only tensors that it lacks are calibrated."""
    ignore_padding: bool = True
    """Leave out positions where ``attention_mask`` is 0."""
    memory_mb: int = Field(default=1024, ge=64)
    """Activations held at once; more tensors are collected in several passes."""


class RuleConfig(Section):
    """Gives the nodes that match all of its conditions a precision. The last matching rule wins."""

    role: Role | Literal["attention", "ffn", "*"] | None = None
    """A role (``ffn_down``) or a family of roles (``attention``, ``ffn``)."""
    op_type: str | None = None
    """An ONNX operator, such as ``MatMul``."""
    name: str | None = None
    """A glob over node names, such as ``*/layer.5/*``."""
    precision: Annotated[Precision, BeforeValidator(_alias)]
    """fp32, fp16, bf16, int8, fp8, or of weights only: int4, fp4, w8a16, nf4."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.role is None and self.op_type is None and self.name is None:
            raise ValueError("a rule needs at least one of role, op_type, name")
        return self

    def __str__(self) -> str:
        wanted = [f"{k}: {v}" for k in ("role", "op_type", "name") if (v := getattr(self, k)) is not None]
        return "{" + ", ".join([*wanted, f"precision: {self.precision}"]) + "}"


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
    """Applied after the preset, in order; the last match wins."""
    skip: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Stays in high precision whatever the rules say: module names (``lm_head``, ``embed_tokens``) or globs over node names, those of torch modules too where its exporter kept them beside its own. One that names nothing is told."""
    outlier_threshold: float | None = Field(default=None, gt=1)
    """Nodes stay in high precision that read a tensor whose largest |x| is more than this many times its 99.9th percentile."""
    smooth: Annotated[
        Literal["off", "auto"] | Annotated[float, Field(ge=0, le=1)] | None,
        Field(union_mode="left_to_right"),
        BeforeValidator(_switch),
    ] = None
    """How outliers of static activations are moved into weights (SmoothQuant). ``auto`` searches for every GEMM how much, a number from 0 to 1 is that share (alpha) everywhere, ``off`` moves none; if not given, ``auto`` wherever the calibration data can be read again."""
    block_size: Literal[32, 64, 128] | None = None
    """How many INT4 weights (NF4's, and on ``cpu`` W8A16's too) along the summed axis share one scale; TensorRT takes 64 and 128 for INT4. 128 if not given, NF4's 64; FP4's blocks hold 16."""
    double_quantization: bool = False
    """NF4's absolute maxima are stored in 8 bits, in blocks of 256, less their mean (QLoRA's double quantization): 4.1 bits a weight in place of 4.5 in blocks of 64."""
    rounding: Literal["rtn", "gptq", "awq"] | None = None
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

    @model_validator(mode="after")
    def _threshold(self) -> Self:
        if self.llm_int8_threshold is not None and self.activations == "static":
            raise ValueError(
                "llm_int8_threshold looks for outliers at run time: set activations to dynamic or dynamic-per-token"
            )
        return self

    @model_validator(mode="after")
    def _weights_alone(self) -> Self:
        asked = {str(self.preset), *(str(r.precision) for r in self.rules)}
        if self.rounding == "awq" and not asked & {"int4", "fp4", "w8a16"}:
            raise ValueError("rounding: awq is for weights alone; take int4, fp4 or w8a16 as preset or in a rule")
        if self.double_quantization and "nf4" not in asked:
            raise ValueError("double_quantization is for nf4; take nf4 as preset or in a rule")
        return self


_GATE = re.compile(r"^\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:e[-+]?\d+)?)\s*(%\s*of\s*fp32)?\s*$", re.IGNORECASE)


class Validation(Data):
    """How the result is measured, on data that was not used to calibrate."""

    samples: int = Field(default=64, ge=1)
    """At most this many samples are read."""
    gates: dict[str, str] = Field(default_factory=dict)
    """Measurement to condition: ``{sqnr_db: ">= 20", "task.f1": ">= 99% of fp32", "latency_ms.p90": "<= 50"}``."""
    task: str | None = None
    """accuracy, f1, embedding-similarity, perplexity, or yours as ``package.module:callable``."""
    labels: str | None = None
    """File with the task's labels (see docs/validation.md); for ``perplexity`` a text, scored instead of ``data``."""
    stride: int | None = Field(default=None, ge=1)
    """For ``perplexity`` of a text: tokens from one window of ``max_length`` to the next; no overlap if not given."""
    prompts: str | None = None
    """Texts for a causal language model to continue, one a line (``.txt``, or ``.jsonl`` with ``template``): greedily, FP32 and each engine side by side."""
    new_tokens: int = Field(default=32, ge=1)
    """For ``prompts``: most tokens to add to each."""
    per_layer: bool = False
    """Also rank the layers by what each one loses."""
    latency: bool = True
    """Measure latency against FP32."""
    latency_batches: Annotated[tuple[int, ...], BeforeValidator(listed)] = (1, 8)
    """Batch sizes to time."""
    kept_samples: int = Field(default=64, ge=0)
    """With a GPU among the targets, so many held-out samples (32 MB at most) are kept in the build directory, so that the
    GPU's machine measures with it alone; 0 keeps none."""

    @model_validator(mode="after")
    def _gates(self) -> Self:
        for key, condition in self.gates.items():
            if not _GATE.match(condition):
                raise ValueError(f"gate {key}: {condition!r} is not a condition; write '>= 20' or '>= 99% of fp32'")
        return self


class ProfileShapes(Section):
    """The shapes that one input of an engine may have."""

    min: tuple[int, ...]
    """Smallest shape."""
    opt: tuple[int, ...]
    """The shape that kernels are chosen for."""
    max: tuple[int, ...]
    """Largest shape."""


class BuilderConfig(Section):
    """How TensorRT builds engines; a key that the installed version lacks is an error (versions: docs/tensorrt.md)."""

    profiles: tuple[dict[str, ProfileShapes], ...] = ()
    """Optimization profiles: ``{input: {min: [1, 1], opt: [8, 128], max: [32, 512]}}``; derived from the data's shapes and ``triton.max_batch_size`` if not given."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """Scratch memory that kernels may use, MiB; all of the GPU's if not given."""
    tactic_dram_mb: int | None = Field(default=None, ge=1)
    """Memory that trying out kernels may use, MiB."""
    tactic_shared_memory_kb: int | None = Field(default=None, ge=1)
    """Shared memory that a block of a kernel may use, KiB."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """0 builds fast, 5 looks longest for a fast engine; TensorRT's own default is 3."""
    timing_cache: Path | None = None
    """File of measured kernels: read, added to and written back; its hash is in the engine's manifest."""
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    """GPUs that the engine also runs on."""
    version_compatible: bool = False
    """The engine also runs in later versions of TensorRT."""
    refit: bool = False
    """Weights can be replaced after the build."""
    strip_plan: bool = False
    """Leave out of the engine what refitting puts back."""
    weight_streaming: bool = False
    """Weights may stay in host memory and be streamed."""
    sparsity: bool = False
    """Use 2:4 sparse kernels where weights are sparse."""
    tactic_sources: (
        tuple[Literal["cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions"], ...] | None
    ) = None
    """Libraries that kernels may come from; TensorRT's choice if not given."""
    tiling: Literal["none", "fast", "moderate", "full"] | None = None
    """How hard to look for tilings across layers."""
    max_aux_streams: int | None = Field(default=None, ge=0)
    """Streams beside the main one."""
    profiling_verbosity: Literal["none", "layer_names_only", "detailed"] = "detailed"
    """What an engine tells about its layers; compiled layers need ``detailed``."""
    plugin_libraries: Annotated[tuple[Path, ...], BeforeValidator(listed)] = ()
    """Shared libraries with plugins. Loading one runs its code."""
    tf32: bool = True
    """FP32 matrix products may round their inputs to TF32, as TensorRT does by default."""
    quantization: Literal["explicit", "implicit"] = "explicit"
    """``implicit`` gives TensorRT 10 the float graph, its precision flags and our ranges; TensorRT 11 has no such thing."""
    calibrator: Literal["entropy", "minmax"] = "entropy"
    """TensorRT 10's calibrator class for ``implicit``."""


class Recipe(Section):
    """Everything that decides a build."""

    name: str = Field(default="model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the build directory and the served model."""
    source: Source
    calibration: Calibration = Calibration()
    policy: PolicyConfig = PolicyConfig()
    targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("cpu",)
    """GPUs or ``cpu``; ``python -m pipeline doctor`` lists them."""
    validate_: Validation = Field(default=Validation(), alias="validate")
    triton: TritonConfig = TritonConfig()
    builder: BuilderConfig = BuilderConfig()
    costs: Path | None = None
    """``costs.json`` from ``python -m pipeline profile``: nodes that got slower in INT8 stay in high precision."""
    threads: int = Field(default=0, ge=0)
    """Threads for ONNX Runtime; 0 is one per core."""
    executor: Literal["local", "ray"] = "local"
    """``ray`` sends calibration and the builds and checks of GPU targets to the Ray cluster of ``RAY_ADDRESS``; the bytes
    are the same (docs/scaling.md)."""
    memory_mb: int | None = Field(default=None, ge=1)
    """Memory that a model's weights may take while it runs, MiB; a larger model runs in segments (docs/how-it-works.md). Half of what is free if not given."""
    seed: int = 0
    """Seed of everything that draws at random."""

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """Read a heading with nothing below it (``calibration:``) as the section's defaults."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values


PATHS = (
    *("source.onnx", "source.huggingface", "source.pt2", "calibration.data", "calibration.tokenizer"),
    *("validate.data", "validate.tokenizer", "validate.labels", "validate.prompts", "costs"),
    *("calibration.cache", "builder.timing_cache", "builder.plugin_libraries", "triton.labels"),
)
"""Keys whose value may be a path; a relative one in a YAML file starts at the file's folder."""


def parse(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Return the recipe that ``values`` describe.

    Raises:
        RecipeError: A wrong key or value; names the key and, for a wrong key, the nearest right one.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise recipe_text.explained(error, Recipe, where=where) from error


def load(path: Path) -> Recipe:
    """Return the recipe in a YAML file; relative paths in it start at the file's folder.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or holds a wrong key or value.
    """
    return parse(read(path), where=str(path))


def read(path: Path) -> dict[str, Any]:
    """Return the keys and values in a YAML file as they stand, except that paths start at the file's folder.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or names a key twice.
    """
    values = recipe_text.read_yaml(path)
    for dotted in PATHS:
        recipe_text.resolve_path(values, dotted.split("."), path.parent)
    return values


def merge(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return ``values`` with dotted keys set from text: ``{"calibration.samples": "64"}``.

    A key that holds text or a path is taken as it stands; any other value is read as YAML (``true``, ``[1, 8]``).

    Raises:
        RecipeError: A key is not in the recipe; names the nearest right one.
    """
    return recipe_text.merged(values, overrides, Recipe)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe, defaults included, as JSON; ``parse(to_dict(recipe)) == recipe``."""
    return recipe.model_dump(mode="json", by_alias=True)
