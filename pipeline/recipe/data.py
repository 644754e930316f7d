"""Where the model and the samples come from, how ranges are found, and how the result is measured."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.recipe.section import Section, listed


class Method(StrEnum):
    """How a range is chosen from a tensor's statistics."""

    AUTO = "auto"
    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    ENTROPY_TRT = "entropy-trt"
    """TensorRT's own variant of the entropy calibrator."""


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
