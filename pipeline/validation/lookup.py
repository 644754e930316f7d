"""Finds the measurement that a gate's key names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import RecipeError
from pipeline.validation.measurement import BatchLatency, Measurements, OutputMetrics

HIGHER_IS_BETTER = {
    "sqnr_db": True,
    "cosine": True,
    "cosine_min": True,
    "max_abs": False,
    "mean_abs": False,
    "relative_l2": False,
    "top1_agreement": True,
    "exact_match": True,
    "nonfinite": False,
}
OUTPUT_METRICS = tuple(HIGHER_IS_BETTER)
LATENCY = ("p50", "p90", "min", "max", "cpu_p50")
GENERATION = ("token_agreement", "identical")
SPEEDUPS = {
    "speedup": "FP32 is not timed on a GPU; gate on speedup_fp16 there",
    "speedup_fp16": "no FP16 engine was timed; it is on a GPU",
}
"""Ratios of latencies, and why one may be missing where latency was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A measurement.

    Attributes:
        value: May be infinite (an exact output's SQNR); ``None`` if not measured.
        reference: FP32's figure, where there is one.
        reason: Why there is no value, or what is to know about it.
        broken: The outputs hold NaN or infinity where FP32's do not: no condition on them can hold.
    """

    value: float | None = None
    reference: float | None = None
    reason: str | None = None
    broken: bool = False


def find(measurements: Measurements, key: str) -> Found:
    """Return the measurement that ``key`` (already checked for its form) names.

    Raises:
        RecipeError: ``key`` names an output, batch size or task metric that was not among those measured.
    """
    parts = key.split(".")
    if key in OUTPUT_METRICS:
        return _worst_output(measurements, key)
    if parts[0] == "outputs":
        return _one_output(measurements, ".".join(parts[1:-1]), parts[-1], key)
    if parts[0] == "task":
        return _task(measurements, ".".join(parts[1:]), key)
    if parts[0] == "generation":
        found = measurements.generation
        if found is None:
            return Found(reason=_why(measurements, "generation"))
        return Found(value=getattr(found, parts[1]))
    if parts[0] == "engine_bytes":
        return Found(
            value=measurements.engine_bytes,
            reference=measurements.fp32_bytes,
            reason=None if measurements.engine_bytes is not None else _why(measurements, "engine_bytes"),
        )
    if parts[0] in SPEEDUPS:
        batch = _batch(measurements, parts[1] if len(parts) == 2 else None)
        if not isinstance(batch, BatchLatency):
            return batch
        value = batch.speedup if parts[0] == "speedup" else batch.speedup_fp16
        return Found(value=value, reason=None if value is not None else SPEEDUPS[parts[0]])
    batch = _batch(measurements, parts[1] if len(parts) == 3 else None)
    if not isinstance(batch, BatchLatency):
        return batch
    # FP32's Timing has every latency key that the engine's own times have.
    value = getattr(batch, parts[-1])
    return Found(
        value=value,
        reference=getattr(batch.fp32, parts[-1]) if batch.fp32 is not None else None,
        reason=None if value is not None else "CUDA events time kernels, not the process",
    )


def require(name: str, known: Iterable[str], where: str, *, prefix: str = "") -> None:
    """Refuse ``name`` if it is not ``known``.

    Raises:
        RecipeError: Names the nearest known one, or all of them.
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise RecipeError(
        f"There is no measurement {prefix}{name}.",
        where=where,
        fix=f"Did you mean {prefix}{near[0]}?" if near else f"There are: {', '.join(prefix + n for n in names)}.",
    )


def _why(measurements: Measurements, what: str) -> str:
    return measurements.not_measured.get(what, f"{what} was not measured")


def _value(metrics: OutputMetrics, metric: str) -> float | None:
    """Return the figure; infinities that JSON cannot hold are put back."""
    value: float | None = getattr(metrics, metric)
    if value is not None or metric not in ("sqnr_db", "relative_l2") or metrics.mean_abs is None:
        return value
    if metrics.exact or metrics.mean_abs == 0:
        return math.inf if metric == "sqnr_db" else 0.0
    return -math.inf if metric == "sqnr_db" else math.inf


def _of_output(metrics: OutputMetrics, metric: str, name: str) -> Found:
    if metrics.count == 0:
        return Found(reason=f"output {name} held no values")
    if metrics.nonfinite and metric not in ("nonfinite", "exact_match"):
        reason = f"output {name} has {metrics.nonfinite} NaN or infinite values where FP32 has others"
        return Found(value=_value(metrics, metric), reason=reason, broken=True)
    if metric == "nonfinite" and metrics.exact_match is not None:
        return Found(reason=f"output {name} is not floating point")
    value = _value(metrics, metric)
    if value is None:
        return Found(reason=f"{metric} is not defined for output {name}")
    if math.isinf(value):
        return Found(value=value, reason="identical" if value > 0 and metrics.exact else "FP32's output is all zeros")
    return Found(value=value)


def _worst_output(measurements: Measurements, metric: str) -> Found:
    outputs = measurements.outputs
    if outputs is None:
        return Found(reason=_why(measurements, "outputs"))
    found = [_of_output(metrics, metric, name) for name, metrics in outputs.items()]
    broken = next((item for item in found if item.broken), None)
    if broken is not None:
        return broken
    measured = [item for item in found if item.value is not None]
    if not measured:
        return found[0] if len(found) == 1 else Found(reason=f"no output has {metric}")
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    return min(measured, key=lambda item: sign * (item.value or 0.0))


def _one_output(measurements: Measurements, name: str, metric: str, key: str) -> Found:
    outputs = measurements.outputs
    if outputs is None:
        return Found(reason=_why(measurements, "outputs"))
    known = [f"outputs.{output}.{metric}" for output in outputs]
    require(key, known, f"validate.gates.{key}")
    return _of_output(outputs[name], metric, name)


def _task(measurements: Measurements, metric: str, key: str) -> Found:
    task = measurements.task
    if task is None:
        return Found(reason=_why(measurements, "task"))
    require(key, [f"task.{name}" for name in task.engine], f"validate.gates.{key}")
    value = task.engine[metric]
    reason = None if value is not None else f"{task.name} could not compute {metric}"
    return Found(value=value, reference=task.fp32.get(metric), reason=reason)


def _batch(measurements: Measurements, name: str | None) -> BatchLatency | Found:
    measured = measurements.latency_ms
    if not measured:
        return Found(reason=_why(measurements, "latency_ms"))
    if name is None:
        return min(measured.values(), key=lambda item: item.batch)
    if name not in measured:
        return Found(reason=f"latency at batch {name[1:]} was not measured; measured: {', '.join(measured)}")
    return measured[name]
