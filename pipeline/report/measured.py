"""The part of the report that says what was measured about one target, and what the gates made of it.

The fields are those that validation stores (its ``Measurements.to_dict()`` and ``Verdict.to_dict()``), so a stored
measurement goes in as it is. They are written down here again because they are the contract: a change there that would
change ``report.json`` has to be made here, too, and shows in a test.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

Value = TypeVar("Value")
Sorted = Annotated[dict[str, Value], AfterValidator(lambda found: dict(sorted(found.items())))]
"""A map kept in the order of its keys."""


class Part(BaseModel):
    """A part of the report: unknown keys fail, floats are finite, nothing changes afterwards."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=True,
    )


class VerdictStatus(StrEnum):
    """What the gates say together."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_MEASURED = "not_measured"


class Mode(StrEnum):
    """How the figures came about."""

    MEASURED = "measured"
    """The engine itself ran."""
    SIMULATED = "simulated"
    """The Q/DQ graph ran in ONNX Runtime on the CPU; the engine did not."""
    EMULATED = "emulated"
    """As ``simulated``, with types that have no CPU kernel replaced by their dequantized values."""


class OutputMetrics(Part):
    """One output against the FP32 reference, over all samples."""

    count: int
    """Values compared."""
    nonfinite: int
    """Positions where only one side is NaN or infinite."""
    exact: bool
    """All compared values are equal."""
    sqnr_db: float | None
    """Signal to quantization noise, dB, pooled over all samples; null if ``exact``."""
    cosine: float | None
    """Mean cosine over the rows of the last axis."""
    cosine_min: float | None
    """The least of them."""
    max_abs: float | None
    """Largest absolute difference."""
    mean_abs: float | None
    """Mean absolute difference."""
    relative_l2: float | None
    """Norm of the difference over the norm of the reference."""
    top1_agreement: float | None
    """Share of rows whose largest value is at the same place."""
    exact_match: float | None
    """Integer, bool and string outputs: share of equal values."""


class Task(Part):
    """Task metrics of FP32 and of the engine, by the same code on the same data."""

    name: str
    fp32: Sorted[float | None]
    engine: Sorted[float | None]


class Generated(Part):
    """One prompt, continued greedily by FP32 and by the engine."""

    prompt: str
    fp32: str
    engine: str
    tokens: int
    """How many tokens FP32 added."""
    agreed_tokens: int
    """How many of these the engine names, each given FP32's tokens before it."""
    same_tokens: int
    """How many tokens the two continuations share from the start."""
    identical: bool


class Generation(Part):
    """Greedy generation side by side, with the models' key-value caches where they have one."""

    prompts: tuple[Generated, ...]
    new_tokens: int
    """Most tokens added to a prompt."""
    tokens: int
    """Tokens that FP32 added in all."""
    token_agreement: float
    """Share of them that the engine names, each given FP32's tokens before it."""
    identical: float
    """Share of the prompts with the same continuation."""
    fp32_step_ms: float | None
    """FP32's median time of a step of one token, ms; null where the engine was not run."""
    engine_step_ms: float | None
    """The engine's."""


class Timing(Part):
    """Milliseconds a batch."""

    p50: float
    p90: float
    min: float
    max: float
    cpu_p50: float | None
    """Process CPU time, all threads; null on a GPU."""


class BatchLatency(Timing):
    """The engine's times at one batch size, and from the same interleaved run FP32's (CPU) or an FP16 engine's (GPU)."""

    batch: int
    runs: int
    """Timed repeats of each."""
    fp32: Timing | None
    """Null on a GPU, where nobody would serve FP32."""
    fp16: Timing | None
    """The FP16 engine of the same model; null on a CPU."""
    speedup: float | None
    """FP32's median over the engine's; above 1 the engine is faster."""
    speedup_min: float | None
    """The same of the minima."""
    speedup_cpu: float | None
    """The same of the CPU times."""
    speedup_fp16: float | None
    """The FP16 engine's median over the engine's."""

    @property
    def beside(self) -> tuple[str, Timing, float] | None:
        """What the engine is compared with: its name, its times, and its median over the engine's."""
        if self.fp32 is not None and self.speedup is not None:
            return "FP32", self.fp32, self.speedup
        if self.fp16 is not None and self.speedup_fp16 is not None:
            return "FP16", self.fp16, self.speedup_fp16
        return None


class LayerLoss(Part):
    """What one quantized node loses."""

    node: str
    local_sqnr_db: float | None
    """Its output in the whole quantized model against FP32."""
    isolated_sqnr_db: float | None
    """The network's worst output with only this node quantized."""
    noise_share: float | None
    """Its share of the noise at the outputs, among the nodes ranked."""


class Gate(Part):
    """One condition of the recipe and how it came out."""

    key: str
    condition: str
    value: float | None
    reference: float | None
    """FP32's figure, where the condition is relative to it or there is one."""
    passed: bool | None
    """Null if it could not be judged; ``reason`` says why."""
    reason: str | None


class Validation(Part):
    """Everything measured about one target."""

    verdict: VerdictStatus
    gates: tuple[Gate, ...]
    mode: Mode | None
    samples: int | None
    threads: int | None
    """Intra-op threads; 0 is one per core."""
    device: str | None
    """GPU, driver and TensorRT that the engine ran with; null where it ran on a CPU or not at all."""
    outputs: Sorted[OutputMetrics] | None
    """What the gates judge: of the engine if it ran, else of the simulation."""
    stages: Sorted[Sorted[OutputMetrics] | None]
    """``qdq_plain`` (optimizations off: what quantization itself costs) and ``engine``."""
    task: Task | None
    generation: Generation | None = None
    latency_ms: Sorted[BatchLatency] | None
    """``b<batch size>`` to times."""
    engine_bytes: int | None
    fp32_bytes: int | None
    layers: tuple[LayerLoss, ...] | None
    """Quantized nodes, worst first."""
    not_measured: Sorted[str]
    """Key to why it is null."""


def nothing_measured(reason: str) -> Validation:
    """Return the validation of a target about which nothing was measured."""
    keys = ("outputs", "task", "generation", "latency_ms", "engine_bytes", "fp32_bytes", "layers")
    return Validation(
        verdict=VerdictStatus.NOT_MEASURED,
        gates=(),
        mode=None,
        samples=None,
        threads=None,
        device=None,
        outputs=None,
        stages={"engine": None, "qdq_plain": None},
        task=None,
        latency_ms=None,
        engine_bytes=None,
        fp32_bytes=None,
        layers=None,
        not_measured=dict.fromkeys(keys, reason),
    )
