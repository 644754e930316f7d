"""What validation stores: typed, JSON round trip, ``None`` where nothing was measured.

Nothing here judges. A ``None`` always means "not measured", and :attr:`Measurements.not_measured` says why; a figure
is never replaced by zero. JSON has no infinity, so outputs that are equal bit for bit (an infinite SQNR) are
``sqnr_db: null`` beside ``exact: true``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import DataError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

QDQ_PLAIN = "qdq_plain"
"""Stage: the Q/DQ graph with ONNX Runtime's optimizations off, which is what the quantization itself costs."""
ENGINE = "engine"
"""Stage: the engine as it is served."""
STAGES = (QDQ_PLAIN, ENGINE)


class Mode(StrEnum):
    """How the candidate was run."""

    MEASURED = "measured"
    """The engine itself."""
    SIMULATED = "simulated"
    """The Q/DQ graph in ONNX Runtime on the CPU; the engine was not run."""
    EMULATED = "emulated"
    """As ``simulated``, with a type that has no CPU kernel replaced by its dequantized values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMetrics:
    """How far one output is from the FP32 reference, over all samples.

    Attributes:
        count: Values compared (padding positions left out).
        nonfinite: Positions where one side is NaN or infinite and the other is not the same; they are left out of
            every other figure except ``top1_agreement``.
        exact: All compared values are equal.
        sqnr_db: ``10 log10(sum ref^2 / sum (ref - out)^2)``, pooled over all samples. ``None`` if ``exact``, or if
            the reference is all zeros.
        cosine: Mean over the rows of the last axis; a row that is zero on both sides counts as 1.
        cosine_min: The least of them.
        max_abs: Largest ``|ref - out|``.
        mean_abs: Mean ``|ref - out|``.
        relative_l2: ``sqrt(sum (ref - out)^2 / sum ref^2)``; ``None`` if the reference is all zeros.
        top1_agreement: Share of rows whose largest value is at the same place; ``None`` below two values a row.
        exact_match: Integer, bool and string outputs: share of equal values. These have no other figure.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    count: int
    nonfinite: int = 0
    exact: bool = False
    sqnr_db: float | None = None
    cosine: float | None = None
    cosine_min: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    relative_l2: float | None = None
    top1_agreement: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMeasurement:
    """A task's metrics for FP32 and for the candidate, from the same code on the same data.

    A metric is ``None`` where it is undefined (the correlation of a constant, for instance).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    fp32: dict[str, float | None]
    engine: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One prompt, continued greedily by FP32 and by the candidate.

    Attributes:
        prompt: The text.
        fp32: FP32's continuation.
        engine: The candidate's.
        tokens: How many tokens FP32 added.
        agreed_tokens: How many of these the candidate names, each given FP32's tokens before it.
        same_tokens: How many tokens the two continuations share from the start.
        identical: The continuations are the same.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prompt: str
    fp32: str
    engine: str
    tokens: int
    agreed_tokens: int
    same_tokens: int
    identical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Greedy generation side by side.

    Attributes:
        prompts: One by one.
        new_tokens: Most tokens added to each.
        tokens: Tokens that FP32 added in all.
        token_agreement: Share of them that the candidate names, each given FP32's tokens before it.
        identical: Share of the prompts with the same continuation.
        fp32_step_ms: FP32's median time of a step that feeds one token, ms; ``None`` where the engine was not run.
        engine_step_ms: The engine's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    prompts: tuple[Generated, ...]
    new_tokens: int
    tokens: int
    token_agreement: float
    identical: float
    fp32_step_ms: float | None
    engine_step_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one model at one batch size, in milliseconds a batch.

    ``cpu_p50`` is process CPU time (all threads); ``None`` on a GPU.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    p50: float
    p90: float
    min: float
    max: float
    cpu_p50: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLatency:
    """The engine's times at one batch size, beside FP32's (on a CPU) or FP16's (on a GPU) from the same interleaved run.

    Attributes:
        batch: Samples a batch.
        runs: Timed repeats of each model.
        p50: Median, ms; ``p90``, ``min``, ``max`` likewise.
        cpu_p50: Median process CPU time, ms, all threads; ``None`` on a GPU, where CUDA events time the kernels.
        fp32: FP32's times; ``None`` on a GPU, where nobody would serve FP32.
        fp16: Times of the FP16 engine of the same model; ``None`` on a CPU.
        speedup: FP32's median over the engine's; above 1 the engine is faster.
        speedup_min: The same of the minima, which other load on the machine disturbs least.
        speedup_cpu: The same of the CPU times.
        speedup_fp16: The FP16 engine's median over the engine's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    batch: int
    runs: int
    p50: float
    p90: float
    min: float
    max: float
    cpu_p50: float | None
    fp32: Timing | None
    fp16: Timing | None = None
    speedup: float | None
    speedup_min: float | None
    speedup_cpu: float | None
    speedup_fp16: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoss:
    """What one quantized node loses.

    Attributes:
        node: Its name.
        local_sqnr_db: SQNR of its output in the whole quantized model against FP32: everything lost up to here.
        isolated_sqnr_db: SQNR of the network's outputs (the worst one) with only this node quantized.
        noise_share: Its part of the noise at the network's outputs, among the nodes ranked; they add up to 1.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    node: str
    local_sqnr_db: float | None
    isolated_sqnr_db: float | None
    noise_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Everything measured about one target.

    Attributes:
        mode: How the candidate was run.
        samples: Validation samples read.
        threads: Intra-op threads, 0 for one per core.
        device: GPU, driver and TensorRT that the engine ran with; ``None`` where it ran on a CPU or not at all.
        stages: FP32 against ``qdq_plain`` and against ``engine``: output name to metrics.
        task: Task metrics.
        generation: Prompts continued by FP32 and by the candidate.
        latency_ms: ``b<batch size>`` to times.
        engine_bytes: Size of the engine with its external data.
        fp32_bytes: Size of the FP32 model with its external data.
        layers: Losses by layer, worst first.
        not_measured: Field (``latency_ms``, ``task``, …) to why it is ``None``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    mode: Mode
    samples: int
    threads: int
    device: str | None = None
    stages: dict[str, dict[str, OutputMetrics] | None] = field(default_factory=lambda: dict.fromkeys(STAGES))
    task: TaskMeasurement | None = None
    generation: Generation | None = None
    latency_ms: dict[str, BatchLatency] | None = None
    engine_bytes: int | None = None
    fp32_bytes: int | None = None
    layers: tuple[LayerLoss, ...] | None = None
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, OutputMetrics] | None:
        """The metrics that gates judge: of the engine if it ran, else of the simulation."""
        engine = self.stages.get(ENGINE)
        return engine if engine is not None else self.stages.get(QDQ_PLAIN)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: every field, and ``outputs``."""
        values: dict[str, Any] = _adapter().dump_python(self, mode="json")
        outputs = values["stages"].get(ENGINE) or values["stages"].get(QDQ_PLAIN)
        return {"outputs": outputs, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "measurements") -> Measurements:
        """Return what :meth:`to_dict` wrote.

        Raises:
            DataError: A key or value that no version of this file has.
        """
        try:
            return _adapter().validate_python({k: v for k, v in values.items() if k != "outputs"})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"The stored measurements cannot be read: {first['msg']} ({key}).",
                where=where,
                fix="Run `python -m pipeline validate` again.",
            ) from error


@cache
def _adapter() -> TypeAdapter[Measurements]:
    return TypeAdapter(Measurements)
