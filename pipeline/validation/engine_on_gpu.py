"""A TensorRT engine on this machine's GPU, as validation runs and times it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.tensorrt.flavour import Flavour
from engines.tensorrt.latency import GpuTiming, latencies_ms
from engines.tensorrt.runner import TrtRunner
from pipeline.types import CalibrationData, Progress, Runner, silent
from pipeline.validation.feeds import fit, fixed_batch
from pipeline.validation.latency import LatencyOptions, first_samples
from pipeline.validation.measurement import BatchLatency, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuEngine:
    """An engine, and the FP16 engine of the same model to compare it with.

    Attributes:
        plan: The serialized engine.
        fp16: The FP16 engine; ``None`` where the engine itself quantizes nothing.
        flavour: Which TensorRT both are for.
        device: GPU, driver and TensorRT, for people.
    """

    plan: Path
    fp16: Path | None
    flavour: Flavour
    device: str

    def runner(self) -> Runner:
        """Return the engine's runner.

        Raises:
            MissingError: TensorRT or a GPU is missing.
            EngineError: The engine does not load here.
        """
        return TrtRunner(self.plan, flavour=self.flavour)

    def latency(
        self, runner: Runner, data: CalibrationData, options: LatencyOptions, *, progress: Progress = silent
    ) -> dict[str, BatchLatency]:
        """Return ``b<batch size>`` to kernel times by CUDA events, with the FP16 engine turn by turn.

        Args:
            runner: The engine's runner; says what its inputs are.
            data: Its first samples are the feeds.
            options: Batch sizes.
            progress: Told the rounds that are done.

        Raises:
            DataError: There are no samples.
            EngineError: An engine takes no such batch, or fails.
        """
        fixed = fixed_batch(runner)
        plans = {"engine": self.plan} | ({"fp16": self.fp16} if self.fp16 is not None else {})
        found = {}
        for batch in (fixed,) if fixed else tuple(dict.fromkeys(options.batches)):
            feeds = fit(runner, first_samples(data, batch))
            times = latencies_ms(plans, feeds, GpuTiming(), flavour=self.flavour, progress=progress)
            found[f"b{batch}"] = _beside_fp16(batch, times["engine"], times.get("fp16"))
        return found


def _beside_fp16(batch: int, engine: Sequence[float], fp16: Sequence[float] | None) -> BatchLatency:
    own, other = _timing(engine), _timing(fp16) if fp16 is not None else None
    return BatchLatency(
        batch=batch,
        runs=len(engine),
        p50=own.p50,
        p90=own.p90,
        min=own.min,
        max=own.max,
        cpu_p50=None,
        fp32=None,
        fp16=other,
        speedup=None,
        speedup_min=None,
        speedup_cpu=None,
        speedup_fp16=other.p50 / own.p50 if other is not None else None,
    )


def _timing(times: Sequence[float]) -> Timing:
    return Timing(
        p50=float(np.median(times)),
        p90=float(np.quantile(times, 0.9)),
        min=min(times),
        max=max(times),
        cpu_p50=None,
    )
