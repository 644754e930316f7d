"""Latency of engines on the GPU, from CUDA events, several engines turn by turn: INT8 beside FP16 is the question."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.tensorrt.buffers import DeviceBuffers
from engines.tensorrt.cuda_graph import CudaGraph
from engines.tensorrt.flavour import Flavour, require, select
from engines.tensorrt.runner import load_engine, profile_for
from pipeline.errors import EngineError
from pipeline.types import Feeds, Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTiming:
    """How to time engines.

    Attributes:
        warmup: Untimed runs of each engine.
        repeats: Timed runs of each engine.
        cuda_graph: Launch each run as one CUDA graph, which leaves out the host's launch times.
    """

    warmup: int = 10
    repeats: int = 100
    cuda_graph: bool = False


def latencies_ms(
    plans: Mapping[str, Path],
    feeds: Feeds,
    options: GpuTiming | None = None,
    *,
    flavour: Flavour = Flavour.TENSORRT,
    progress: Progress = silent,
) -> dict[str, tuple[float, ...]]:
    """Return for each engine the milliseconds of every timed run: kernels only, data is on the GPU before.

    The engines run turn by turn, so clocks and temperature are alike for all.

    Args:
        plans: Name to serialized engine, such as ``{"int8": …, "fp16": …}``.
        feeds: One batch.
        options: How to time.
        flavour: Which TensorRT the engines are for.
        progress: Told the rounds that are done.

    Raises:
        MissingError: A package or the GPU is missing.
        EngineError: An engine does not load, takes no such batch, or fails.
    """
    options = options or GpuTiming()
    require(flavour, "Timing engines")
    select(flavour)
    times: dict[str, list[float]] = {name: [] for name in plans}
    with contextlib.ExitStack() as stack:
        live = {name: stack.enter_context(_ready(path, feeds, options)) for name, path in plans.items()}
        for index, order in zip(range(options.warmup + options.repeats), alternating(list(live)), strict=False):
            for name in order:
                elapsed = live[name]()
                if index >= options.warmup:
                    times[name].append(elapsed)
            progress("latency", index + 1, options.warmup + options.repeats)
    return {name: tuple(found) for name, found in times.items()}


@contextlib.contextmanager
def _ready(path: Path, feeds: Feeds, options: GpuTiming) -> Iterator[Any]:
    """Yield a function that runs the engine once and returns its milliseconds."""
    engine = load_engine(path)
    context = engine.create_execution_context()
    buffers = DeviceBuffers()
    handle = int(buffers.stream.handle)
    context.set_optimization_profile_async(profile_for(engine, feeds, path), handle)
    for name, array in feeds.items():
        context.set_input_shape(name, array.shape)
        context.set_tensor_address(name, buffers.upload(name, array))
    for name, size_bytes in _outputs(engine, context, path).items():
        context.set_tensor_address(name, buffers.reserve(name, size_bytes))
    start, end = buffers.event(), buffers.event()

    def enqueue() -> None:
        if not context.execute_async_v3(handle):
            raise EngineError("The engine fails to run.", where=str(path), fix="Build it again on this GPU.")

    with contextlib.ExitStack() as stack:
        stack.callback(buffers.free)
        launch = enqueue
        if options.cuda_graph:
            enqueue()
            buffers.stream.synchronize()
            launch = stack.enter_context(CudaGraph(handle, enqueue)).launch

        def run() -> float:
            start.record(buffers.stream)
            launch()
            end.record(buffers.stream)
            end.synchronize()
            return float(end.time_since(start))

        yield run


def _outputs(engine: Any, context: Any, path: Path) -> dict[str, int]:
    """Return each output's size in bytes at the shapes that are set."""
    from engines.tensorrt.binding import trt

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    sizes = {}
    for name in names:
        if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT:
            continue
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(
                f"The shape of the output {name} depends on the data, so it cannot be timed.", where=str(path)
            )
        sizes[name] = int(np.prod(shape, dtype=np.int64)) * np.dtype(trt.nptype(engine.get_tensor_dtype(name))).itemsize
    return sizes


def alternating(names: list[str]) -> Iterator[list[str]]:
    """Yield the order of every round: each engine goes first in turn."""
    for first in itertools.count():
        shift = first % len(names)
        yield names[shift:] + names[:shift]
