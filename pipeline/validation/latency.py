"""FP32 and the engine timed in one process, turn by turn, so that what else the machine does hits both alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.types import CalibrationData, Feeds, Progress, Runner, silent
from pipeline.validation.feeds import fit, fixed_batch, size_of
from pipeline.validation.measurement import BatchLatency, Timing

_NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """How to time.

    Attributes:
        batches: Batch sizes; a model with a fixed batch dimension is timed at that one only.
        warmup: Untimed runs of each model at each batch size.
        repeats: Timed runs of each model, at most.
        min_repeats: Timed runs before the time bound may stop them.
        seconds: Time bound for one batch size; passed over only to reach ``min_repeats``.
    """

    batches: tuple[int, ...] = (1, 8)
    warmup: int = 2
    repeats: int = 25
    min_repeats: int = 7
    seconds: float = 12.0


def measure_latency(
    reference: Runner,
    engine: Runner,
    data: CalibrationData,
    options: LatencyOptions | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, BatchLatency]:
    """Return ``b<batch size>`` to times, in the order of the batch sizes.

    Who runs first alternates, so neither model always finds the other's data in the caches. The feeds are the
    data's first samples, repeated where there are fewer than the batch needs.

    Raises:
        DataError: There are no samples.
        EngineError: A model fails on them.
    """
    options = options or LatencyOptions()
    fixed = fixed_batch(engine) or fixed_batch(reference)
    batches = (fixed,) if fixed else tuple(dict.fromkeys(options.batches))
    result = {}
    for index, batch in enumerate(batches):
        feeds = first_samples(data, batch)

        def step(done: int, offset: int = index * options.repeats, total: int = len(batches) * options.repeats) -> None:
            progress("latency", offset + done, total)

        result[f"b{batch}"] = _time((reference, engine), feeds, batch, options, step)
        step(options.repeats)
    return result


def first_samples(data: CalibrationData, count: int) -> Feeds:
    """Return the first ``count`` samples as one batch, repeated from the start if there are fewer.

    Samples whose shape differs from the first one's end the batch early (it is then repeated).

    Raises:
        DataError: There are no samples.
    """
    taken: list[Feeds] = []
    for feeds in data:
        if taken and any(feeds[name].shape[1:] != taken[0][name].shape[1:] for name in taken[0]):
            break
        taken.append(feeds)
        if sum(map(size_of, taken)) >= count:
            break
    if not taken or not size_of(taken[0]):
        raise DataError("There are no samples to time the models on.", fix="Give validation data with at least one.")
    joined = {name: np.concatenate([part[name] for part in taken]) for name in taken[0]}
    return {name: values[np.arange(count) % len(values)] for name, values in joined.items()}


def _time(
    runners: tuple[Runner, Runner], feeds: Feeds, batch: int, options: LatencyOptions, step: Callable[[int], None]
) -> BatchLatency:
    """Time FP32 (first) and the engine (second) on one batch."""
    fitted = [fit(runner, feeds) for runner in runners]
    for _, (runner, own) in itertools.product(range(options.warmup), zip(runners, fitted, strict=True)):
        runner.infer(own)
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    deadline = time.monotonic() + options.seconds
    for repeat in range(options.repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            cpu_start, start = time.process_time_ns(), time.perf_counter_ns()
            runners[which].infer(fitted[which])
            end, cpu_end = time.perf_counter_ns(), time.process_time_ns()
            wall[which].append((end - start) / _NS_PER_MS)
            cpu[which].append((cpu_end - cpu_start) / _NS_PER_MS)
        step(repeat + 1)
        if repeat + 1 >= options.min_repeats and time.monotonic() > deadline:
            break
    fp32, own_times = (_summary(wall[i], cpu[i]) for i in (0, 1))
    fp32_cpu, own_cpu = (float(np.median(cpu[i])) for i in (0, 1))
    return BatchLatency(
        batch=batch,
        runs=len(wall[0]),
        p50=own_times.p50,
        p90=own_times.p90,
        min=own_times.min,
        max=own_times.max,
        cpu_p50=own_times.cpu_p50,
        fp32=fp32,
        speedup=fp32.p50 / own_times.p50,
        speedup_min=fp32.min / own_times.min,
        # A model so small that the CPU clock did not tick has no CPU ratio.
        speedup_cpu=fp32_cpu / own_cpu if own_cpu > 0 else None,
    )


def _summary(wall: Sequence[float], cpu: Sequence[float]) -> Timing:
    return Timing(
        p50=float(np.median(wall)),
        p90=float(np.quantile(wall, 0.9)),
        min=min(wall),
        max=max(wall),
        cpu_p50=float(np.median(cpu)),
    )
