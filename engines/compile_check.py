"""Compile a graph for a GPU that this machine does not have, with TensorRT for RTX: a check, never the engine.

The builder runs in a child process: it maps hundreds of megabytes, and a crash in it must not take the build along.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from engines.compiled_layers import CompiledLayers
from engines.layer_log import parse_layers
from pipeline.errors import EngineError, MissingError

CHECKABLE = {(7, 5): "SM75", (8, 0): "SM80", (8, 6): "SM86", (8, 9): "SM89", (12, 0): "SM120", (12, 1): "SM121"}
"""What TensorRT for RTX compiles for."""
PROXIES = {(9, 0): (8, 9), (10, 0): (12, 0), (10, 3): (12, 0)}
"""A GPU that it does not compile for, and the nearest that it does."""

_WARNING = 2


def checked_capability(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the compute capability that a check for this one compiles for: itself, a proxy, or ``None``."""
    return capability if capability in CHECKABLE else PROXIES.get(capability)


def available() -> bool:
    """Return whether TensorRT for RTX is installed."""
    return importlib.util.find_spec("tensorrt_rtx") is not None


def compile_check(onnx: Path, capability: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> CompiledLayers:
    """Compile ``onnx`` for a GPU and return its compiled layers; the engine itself is thrown away.

    Args:
        onnx: A strongly typed graph; external data beside it.
        capability: A key of :data:`CHECKABLE`.
        shapes: A concrete shape for every input, so that every compiled layer has a size.

    Raises:
        MissingError: TensorRT for RTX is not installed.
        EngineError: The parser or the builder refuses the graph; names the node where it says which.
    """
    if not available():
        raise MissingError(
            "A compile check needs TensorRT for RTX, which is not installed.", fix="pip install '.[rtx]'"
        )
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_compile, onnx, capability, dict(shapes)).result()
    except BrokenProcessPool as error:
        raise EngineError(
            f"TensorRT for RTX crashed while it compiled for {CHECKABLE[capability]}.",
            where=str(onnx),
            fix="Keep more nodes in FP16 with rules, or take this target out.",
        ) from error


def _compile(onnx: Path, capability: tuple[int, int], shapes: dict[str, tuple[int, ...]]) -> CompiledLayers:
    import tensorrt_rtx as trt

    messages: list[tuple[int, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((int(severity), message))

    log = Log()
    builder = trt.Builder(log)
    flags = trt.NetworkDefinitionCreationFlag
    # Newer versions type every network strongly and have no flag for it any more.
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise _refused(onnx, capability, _parser_errors(parser), "parser")
    for index in range(network.num_inputs):
        value = network.get_input(index)
        value.shape = shapes[value.name]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, CHECKABLE[capability]), 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(onnx, capability, [m for s, m in messages if s < _WARNING][-2:], "builder")
    return CompiledLayers(
        builder=f"tensorrt-rtx {trt.__version__}",
        compute_capability=CHECKABLE[capability],
        engine_bytes=engine.nbytes,
        layers=parse_layers(m for _, m in messages),
    )


def _parser_errors(parser: Any) -> list[str]:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [f"node {e.node_name() or '?'} ({e.node_operator()}): {e.desc()}" for e in errors]


def _refused(onnx: Path, capability: tuple[int, int], reasons: list[str], who: str) -> EngineError:
    text = "; ".join(" ".join(r.split())[:300] for r in reasons) or "it gives no reason"
    return EngineError(
        f"TensorRT for RTX's {who} refuses the graph for {CHECKABLE[capability]}: {text}",
        where=str(onnx),
        fix="Keep the node in high precision with a rule, or report the graph.",
    )
