"""Measures a quantized model against its FP32 original, stage by stage, on data that was not used to calibrate."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import kv_cache
from pipeline.errors import DataError
from pipeline.model import size_bytes
from pipeline.notices import notice
from pipeline.running import memory
from pipeline.types import Array, CalibrationData, Feeds, Progress, Runner, silent
from pipeline.validation.engine_on_gpu import GpuEngine
from pipeline.validation.feeds import fit, mask_of, size_of
from pipeline.validation.generation import Prompts, generate
from pipeline.validation.latency import LatencyOptions, measure_latency
from pipeline.validation.layers import LayerOptions, rank_layers
from pipeline.validation.measurement import (
    ENGINE,
    QDQ_PLAIN,
    BatchLatency,
    Generation,
    LayerLoss,
    Measurements,
    Mode,
    OutputMetrics,
    TaskMeasurement,
)
from pipeline.validation.metrics import Comparison
from pipeline.validation.tasks import Task

_NOT_RUN = "no engine was run, only the Q/DQ graph in ONNX Runtime"
_IN_SEGMENTS = "the models do not fit into memory together (memory_mb), so they ran in segments"


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOptions:
    """What to measure.

    Attributes:
        mode: ``measured`` runs the engine, too; the others run its Q/DQ graph only, and neither latency nor engine size
            is theirs to give.
        engine: The engine on a GPU; if not given, ``measured`` runs the variant as ONNX Runtime optimizes it.
        threads: Intra-op threads, 0 for one per core.
        task: A task to score, with FP32 and with the engine.
        prompts: Texts to continue, with FP32 and with the engine.
        latency: How to time; ``None`` leaves latency out.
        layers: How to rank layers; ``None`` leaves the ranking out.
        unquantized: The float graph that the variant was quantized from, where smoothing made it another than the reference:
            a node switched to float must fit the nodes around it.
    """

    mode: Mode = Mode.MEASURED
    engine: GpuEngine | None = None
    threads: int = 0
    task: Task | None = None
    prompts: Prompts | None = None
    latency: LatencyOptions | None = field(default_factory=LatencyOptions)
    layers: LayerOptions | None = None
    unquantized: Path | None = None


def validate(
    reference: Path,
    variant: Path,
    data: CalibrationData,
    *,
    options: ValidateOptions | None = None,
    progress: Progress = silent,
) -> Measurements:
    """Return what the variant costs and gains against the reference.

    Every stage reads the data batch by batch and keeps sums only, so memory does not grow with the samples. Models that do
    not fit into memory together run in segments, are not timed, and their layers are not ranked.

    Args:
        reference: The canonical FP32 ONNX.
        variant: The Q/DQ ONNX (for ``measured`` without a GPU engine, as ONNX Runtime optimizes it, the engine).
        data: Held-out samples.
        options: What to measure.
        progress: Told about stages ``validate``, ``task``, ``generation``, ``latency`` and ``layers``.

    Raises:
        DataError: There are no samples, or they do not fit the model.
        EngineError: A model cannot be loaded or run, or the two have different outputs.
    """
    options = options or ValidateOptions()
    measured = options.mode is Mode.MEASURED
    if not len(data):
        raise DataError("There are no validation samples.", fix="Give validate.data with at least one sample.")
    served_here = measured and options.engine is None
    whole = memory.fit(reference, variant, *([variant] if served_here else []))
    threads = options.threads
    with contextlib.ExitStack() as stack:
        fp32 = stack.enter_context(OnnxRuntimeRunner(reference, threads=threads, whole=whole))
        plain = stack.enter_context(OnnxRuntimeRunner(variant, threads=threads, optimize=False, whole=whole))
        candidates: dict[str, Runner] = {QDQ_PLAIN: plain}
        if measured:
            candidates[ENGINE] = stack.enter_context(
                options.engine.runner()
                if options.engine is not None
                else OnnxRuntimeRunner(variant, threads=threads, whole=whole)
            )
        cached = any(kv_cache.is_past(info.name) for info in fp32.inputs)
        stages, samples = _compare(fp32, candidates, data, progress)
        served = candidates.get(ENGINE, plain)
        task = _score(options.task, fp32, served, data, progress) if options.task else None
        generation = (
            generate(fp32, served, options.prompts, timed=measured, progress=progress) if options.prompts else None
        )
        if generation is not None:
            _say_if_steps_are_slower(generation)
        latency = None
        if measured and options.latency and whole:
            latency = (
                options.engine.latency(served, data, options.latency, progress=progress)
                if options.engine is not None
                else measure_latency(fp32, served, data, options.latency, progress=progress)
            )
            _say_if_slower(latency)
    layers = None
    if options.layers and whole:
        graph = options.unquantized or reference
        layers = rank_layers(graph, variant, data, options.layers, threads=threads, progress=progress)
    return Measurements(
        mode=options.mode,
        samples=samples,
        threads=threads,
        device=options.engine.device if options.engine is not None else None,
        stages={QDQ_PLAIN: stages[QDQ_PLAIN], ENGINE: stages.get(ENGINE)},
        task=task,
        generation=generation,
        latency_ms=latency,
        engine_bytes=_size(options.engine, variant) if measured else None,
        fp32_bytes=size_bytes(reference),
        layers=layers,
        not_measured=_reasons(options, task, latency, layers, whole=whole, cached=cached),
    )


def _compare(
    fp32: Runner, candidates: dict[str, Runner], data: CalibrationData, progress: Progress
) -> tuple[dict[str, dict[str, OutputMetrics]], int]:
    comparisons = {name: Comparison() for name in candidates}
    samples, total = 0, len(data)
    progress("validate", 0, total)
    runners = [fp32, *candidates.values()]
    batches, *copies = itertools.tee(data, 1 + len(runners))  # in segments a runner may be some batches ahead
    outputs = [_outputs(runner, copy) for runner, copy in zip(runners, copies, strict=True)]
    for feeds, floats, *found in zip(batches, *outputs, strict=True):
        # A cache counts by what the model makes of it; variants store it in types of their own.
        wanted = {name: values for name, values in floats.items() if not kv_cache.is_present(name)}
        for comparison, got in zip(comparisons.values(), found, strict=True):
            comparison.update(wanted, got, mask_of(feeds))
        samples += size_of(feeds)
        progress("validate", samples, total)
    return {name: comparison.result() for name, comparison in comparisons.items()}, samples


def _outputs(runner: Runner, data: Iterator[Feeds]) -> Iterator[dict[str, Array]]:
    fitted = (fit(runner, feeds) for feeds in data)
    return runner.infer_all(fitted) if isinstance(runner, OnnxRuntimeRunner) else map(runner.infer, fitted)


def _score(task: Task, fp32: Runner, served: Runner, data: CalibrationData, progress: Progress) -> TaskMeasurement:
    progress("task", 0, 2)
    reference = task.score(fp32, data)
    progress("task", 1, 2)
    candidate = task.score(served, data)
    progress("task", 2, 2)
    return TaskMeasurement(name=task.name, fp32=reference, engine=candidate)


def _size(engine: GpuEngine | None, variant: Path) -> int:
    return engine.plan.stat().st_size if engine is not None else size_bytes(variant)


def _reasons(
    options: ValidateOptions,
    task: TaskMeasurement | None,
    latency: dict[str, BatchLatency] | None,
    layers: tuple[LayerLoss, ...] | None,
    *,
    whole: bool,
    cached: bool,
) -> dict[str, str]:
    measured = options.mode is Mode.MEASURED
    reasons = {}
    if not measured:
        reasons["stages.engine"] = reasons["engine_bytes"] = _NOT_RUN
    if task is None:
        reasons["task"] = "no task was named (validate.task)"
    if options.prompts is None and cached:
        reasons["generation"] = "no prompts were named (validate.prompts)"
    if latency is None:
        asked = "not asked for (validate.latency)" if options.latency is None else _IN_SEGMENTS
        reasons["latency_ms"] = asked if measured else _NOT_RUN
    if layers is None:
        reasons["layers"] = "not asked for (validate.per_layer)" if options.layers is None else _IN_SEGMENTS
    return reasons


def _say_if_steps_are_slower(generation: Generation) -> None:
    fp32, engine = generation.fp32_step_ms, generation.engine_step_ms
    if fp32 is not None and engine is not None and engine > fp32:
        notice(
            "slower-than-fp32",
            f"Decoding token by token, the quantized engine takes {engine / fp32:.2f}x FP32's time.",
            where="generation",
        )


def _say_if_slower(latency: dict[str, BatchLatency]) -> None:
    """Say aloud where the engine is slower than what it is compared with."""
    for name in ("FP32", "FP16"):
        ratios = {i.batch: i.speedup if name == "FP32" else i.speedup_fp16 for i in latency.values()}
        slower = [f"{1 / r:.2f}x {name}'s time at batch {batch}" for batch, r in ratios.items() if r and r < 1]
        if slower:
            notice(
                f"slower-than-{name.lower()}",
                f"The quantized engine is slower than {name} here: {', '.join(slower)}.",
                where="latency_ms",
            )
