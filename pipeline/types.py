"""Value types that every room shares: precisions, quantization formats, ranges, roles, data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
Feeds = dict[str, Array]
"""One batch: an array for each model input, first axis the batch."""


class Precision(StrEnum):
    """What a node computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"
    """Weights only, in blocks; what they multiply stays in the precision of the rest."""
    FP4 = "fp4"
    """Weights only (E2M1), in blocks of 16; as ``int4``."""
    W8A16 = "w8a16"
    """Weights only, in INT8: per output channel on a GPU, in blocks on a CPU."""
    NF4 = "nf4"
    """Weights only, as one of the sixteen quantiles of NormalFloat, in blocks; on a CPU."""

    @property
    def quantized(self) -> bool:
        """Whether a node of this precision reads Q/DQ pairs."""
        return self in (Precision.INT8, Precision.FP8, *WEIGHT_ONLY)


WEIGHT_ONLY = (Precision.W8A16, Precision.INT4, Precision.FP4, Precision.NF4)
"""Storage types: the products are those of the rest."""
HALVES = (Precision.FP16, Precision.BF16)
"""What a GPU computes the rest in; a graph has one of them."""


class QuantDType(StrEnum):
    """The stored type of a quantized tensor."""

    INT8 = "int8"
    UINT8 = "uint8"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"
    """Simulated only: no runtime of a target multiplies it."""
    INT4 = "int4"
    FP4_E2M1 = "fp4_e2m1"
    NF4 = "nf4"
    """One of sixteen values from -1 to 1 (:data:`pipeline.quantize.weights.nf4.CODE`); its scale is the block's largest magnitude."""

    @property
    def qmin(self) -> float:
        """Smallest representable quantized value."""
        return _LIMITS[self][0]

    @property
    def qmax(self) -> float:
        """Largest representable quantized value."""
        return _LIMITS[self][1]


_LIMITS = {
    QuantDType.INT8: (-128.0, 127.0),
    QuantDType.UINT8: (0.0, 255.0),
    QuantDType.FP8_E4M3: (-448.0, 448.0),
    QuantDType.FP8_E5M2: (-57344.0, 57344.0),
    QuantDType.INT4: (-8.0, 7.0),
    QuantDType.FP4_E2M1: (-6.0, 6.0),
    QuantDType.NF4: (-1.0, 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized.

    Attributes:
        dtype: Stored type.
        symmetric: Zero point 0 and a range mirrored about zero.
        axis: Per-channel axis; ``None`` is per tensor.
        block: Elements along the summed axis that share a scale (weights only); ``None`` is all of them.
        double: The scales of blocks are quantized too (NF4 only).
    """

    dtype: QuantDType
    symmetric: bool = True
    axis: int | None = None
    block: int | None = None
    double: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The interval of real values that quantization keeps; what lies outside saturates. Both ends finite."""

    min: float
    max: float

    def scale_zero_point(self, spec: QuantSpec) -> tuple[float, int]:
        """Return ``(scale, zero_point)`` of the affine map ``real = scale * (quantized - zero_point)``.

        The range is first widened to hold 0, so that zero (padding, ReLU) stays exact. Symmetric INT8 uses
        ``amax / 127`` (UINT8 too, about zero point 128), symmetric FP8 ``amax / 448`` (E5M2: 57344); an all-zero range gets scale 1.
        The scale is rounded to float32, the zero point computed from the rounded scale.
        """
        low, high = min(self.min, 0.0), max(self.max, 0.0)
        if spec.symmetric:
            amax = max(-low, high)
            unsigned = spec.dtype is QuantDType.UINT8
            scale = np.float32(amax / (127.0 if unsigned else spec.dtype.qmax))
            return (float(scale) if scale > 0 else 1.0), (128 if unsigned else 0)
        qmin, qmax = spec.dtype.qmin, spec.dtype.qmax
        scale = np.float32((high - low) / (qmax - qmin))
        if not scale > 0:
            return 1.0, int(qmin if spec.dtype is QuantDType.UINT8 else 0)
        zero_point = int(np.clip(np.rint(qmin - low / float(scale)), qmin, qmax))
        return float(scale), zero_point


class Role(StrEnum):
    """What a node is for in the network."""

    ATTENTION_QUERY = "attention_query"
    ATTENTION_KEY = "attention_key"
    ATTENTION_VALUE = "attention_value"
    ATTENTION_QKV = "attention_qkv"
    """One GEMM that makes query, key and value together."""
    ATTENTION_SCORES = "attention_scores"
    """The matmul of query and key."""
    ATTENTION_SOFTMAX = "attention_softmax"
    ATTENTION_CONTEXT = "attention_context"
    """The matmul of probabilities and value."""
    ATTENTION_OUTPUT = "attention_output"
    FFN_UP = "ffn_up"
    FFN_GATE = "ffn_gate"
    FFN_DOWN = "ffn_down"
    EMBEDDING = "embedding"
    NORM = "norm"
    HEAD = "head"
    """The last GEMM before an output: classifier, language-model head, pooler."""
    CONV_STEM = "conv_stem"
    CONV = "conv"
    DEPTHWISE_CONV = "depthwise_conv"
    LINEAR = "linear"
    """A GEMM with a constant weight that is none of the above."""
    RESIDUAL_ADD = "residual_add"
    KV_CACHE = "kv_cache"
    """Joins past keys or values of a cache and new ones; its precision is what the cache is stored in."""
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRole:
    """A node's role and the repeated block (0, 1, …; ``None`` outside blocks) it belongs to."""

    role: Role
    block: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Name, numpy dtype and shape of a model input or output; a dimension is a number, a symbol or unknown."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@runtime_checkable
class CalibrationData(Protocol):
    """Batches that can be read again and again: the same ones in the same order every time."""

    def __len__(self) -> int:
        """Return the number of samples (not batches)."""
        ...

    def __iter__(self) -> Iterator[Feeds]:
        """Yield batches; the first axis of every array is the batch."""
        ...

    def digest(self) -> str:
        """Return the SHA-256 (hex) of everything that decides the samples: files, template, tokenizer, options."""
        ...


class Progress(Protocol):
    """Told how far a long stage is. ``total`` is in the same unit as ``done``."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``stage`` are finished."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@runtime_checkable
class Runner(Protocol):
    """Something that computes a model's outputs: a context manager whose session is freed on exit."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output by name for one batch."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exc: object) -> None: ...
