"""Parse a graph, configure a build and run it, through Polygraphy's loaders: the same code for both TensorRTs.

Runs in the process that :func:`engines.tensorrt.flavour.select` was called in; callers use a child process
(:mod:`engines.tensorrt.child`), because a build maps hundreds of megabytes and a crash must not take the rest along.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polygraphy.backend.trt.util as polygraphy_util
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, LoadPlugins, create_network
from polygraphy.backend.trt import Profile as PolygraphyProfile
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from engines.tensorrt.binding import trt
from engines.tensorrt.flavour import Flavour, selected
from engines.tensorrt.observers import BuildProgress, MessageLog
from engines.tensorrt.options import BuilderOptions, check_options
from engines.tensorrt.profiles import Profile
from engines.tensorrt.refusal import builder_errors, parser_errors, refused
from pipeline.errors import EngineError
from pipeline.types import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One build.

    Attributes:
        onnx: A strongly typed graph; external data beside it.
        device: The GPU's name in messages: ``SM80``.
        capability: Compute capability to compile for (TensorRT for RTX); TensorRT builds for the GPU at hand.
        options: How to build.
        profiles: Optimization profiles; empty where ``shapes`` makes every input static.
        shapes: A concrete shape for every input, so that every compiled layer has a size; ``None`` keeps them dynamic.
    """

    onnx: Path
    device: str
    capability: tuple[int, int]
    options: BuilderOptions = field(default_factory=BuilderOptions)
    profiles: tuple[Profile, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A serialized engine and everything that the builder said."""

    data: bytes
    messages: tuple[tuple[int, str], ...]


def build(job: Job, *, progress: Progress = silent, extra: Mapping[str, Any] | None = None) -> BuiltEngine:
    """Return the engine of a graph.

    Args:
        job: What to build.
        progress: Told thousandths of the build.
        extra: More arguments for Polygraphy's configuration (:mod:`engines.tensorrt.implicit`); with any, the network
            is weakly typed.

    Raises:
        RecipeError: The installed version lacks an option.
        EngineError: The parser or the builder refuses the graph; names the node where it says which.
    """
    check_options(job.options, selected(), trt.__version__)
    log = MessageLog()
    with _quiet(log), _named_plugins(job.options):
        network = _parse(job, log, strongly_typed=not extra)
        config = _config(job, BuildProgress(f"build {job.device}", progress), extra or {})
        try:
            save = None if job.options.timing_cache is None else str(job.options.timing_cache)
            data = bytes(EngineBytesFromNetwork(network, config=config, save_timing_cache=save)())
        except PolygraphyException as error:
            reasons = builder_errors(log.messages) or [str(error)]
            raise refused(f"{selected().label}'s builder", str(job.onnx), job.device, reasons) from error
    return BuiltEngine(data=data, messages=tuple(log.messages))


def _parse(
    job: Job, log: MessageLog, *, strongly_typed: bool
) -> tuple[trt.Builder, trt.INetworkDefinition, trt.OnnxParser]:
    """Return builder, network and parser; Polygraphy's own ONNX loader keeps the parser's errors to itself."""
    # Later versions may drop the flag: all their networks are strongly typed.
    typed = strongly_typed and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network = create_network(strongly_typed=typed)
    trt.init_libnvinfer_plugins(log, "")
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.onnx)):
        raise refused(f"{selected().label}'s parser", str(job.onnx), job.device, parser_errors(parser))
    if job.shapes is not None:
        for index in range(network.num_inputs):
            value = network.get_input(index)
            value.shape = job.shapes[value.name]
    return builder, network, parser


def _config(job: Job, monitor: BuildProgress, extra: Mapping[str, Any]) -> Any:
    options = job.options
    common = {
        "profiles": [_profile(p) for p in job.profiles] or None,
        "memory_pool_limits": _pools(options) or None,
        "builder_optimization_level": options.optimization_level,
        "load_timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        "version_compatible": options.version_compatible,
        "refittable": options.refit,
        "strip_plan": options.strip_plan,
        "weight_streaming": options.weight_streaming,
        "sparse_weights": options.sparsity,
        "max_aux_streams": options.max_aux_streams,
        "profiling_verbosity": getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper()),
        "progress_monitor": monitor,
    }
    if options.hardware_compatibility is not None:
        common["hardware_compatibility_level"] = getattr(
            trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper()
        )
    if options.tactic_sources is not None:
        common["tactic_sources"] = [getattr(trt.TacticSource, name.upper()) for name in options.tactic_sources]
    if options.tiling is not None:
        common["tiling_optimization_level"] = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
    if selected() is Flavour.RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(compute_capabilities=[job.capability], **common)
    return CreateConfig(tf32=options.tf32, **common, **extra)


def _pools(options: BuilderOptions) -> dict[trt.MemoryPoolType, int]:
    pools = trt.MemoryPoolType
    asked = {
        pools.WORKSPACE: (options.workspace_mb, 20),
        pools.TACTIC_DRAM: (options.tactic_dram_mb, 20),
        pools.TACTIC_SHARED_MEMORY: (options.tactic_shared_memory_kb, 10),
    }
    return {pool: size << shift for pool, (size, shift) in asked.items() if size is not None}


def _profile(profile: Profile) -> Any:
    made = PolygraphyProfile()
    for name, shapes in profile.items():
        made.add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
    return made


@contextlib.contextmanager
def _quiet(log: MessageLog) -> Iterator[None]:
    """Give TensorRT our logger, and keep Polygraphy off the terminal: what matters is in the log and in errors."""
    before = polygraphy_util.TRT_LOGGER
    polygraphy_util.TRT_LOGGER = log
    try:
        # Polygraphy writes critical messages to the terminal before it raises them.
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
            # It also hands RTX an empty timing cache, which RTX ignores with a deprecation warning.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        polygraphy_util.TRT_LOGGER = before


@contextlib.contextmanager
def _named_plugins(options: BuilderOptions) -> Iterator[None]:
    try:
        LoadPlugins(plugins=[str(path) for path in options.plugin_libraries])()
    except OSError as error:
        raise EngineError(
            f"A plugin library cannot be loaded: {error}.",
            where="builder.plugin_libraries",
            fix="Check the path, and that it is built for this TensorRT and CUDA.",
        ) from error
    yield


def shapes_of(profiles: Sequence[Profile]) -> dict[str, tuple[int, ...]]:
    """Return the usual shapes of the first profile."""
    return {name: shapes.opt for name, shapes in profiles[0].items()} if profiles else {}
