"""Compile a graph for a GPU that this machine does not have, with TensorRT for RTX: a check, never the engine.

The builder is the one that builds engines (:mod:`engines.tensorrt.builder`), in a child process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.compiled_layers import CompiledLayers
from engines.layer_log import parse_layers
from engines.tensorrt.child import in_child, report
from engines.tensorrt.flavour import Flavour, ready, require, select
from pipeline.errors import EngineError
from pipeline.types import Progress, silent

CHECKABLE = {(7, 5): "SM75", (8, 0): "SM80", (8, 6): "SM86", (8, 9): "SM89", (12, 0): "SM120", (12, 1): "SM121"}
"""What TensorRT for RTX compiles for."""
PROXIES = {(9, 0): (8, 9), (10, 0): (12, 0), (10, 3): (12, 0)}
"""A GPU that it does not compile for, and the nearest that it does."""


def checked_capability(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the compute capability that a check for this one compiles for: itself, a proxy, or ``None``."""
    return capability if capability in CHECKABLE else PROXIES.get(capability)


def available() -> bool:
    """Return whether TensorRT for RTX and Polygraphy, which drives it, are installed."""
    return ready(Flavour.RTX) is not None


def compile_check(
    onnx: Path,
    capability: tuple[int, int],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    progress: Progress = silent,
) -> CompiledLayers:
    """Compile ``onnx`` for a GPU and return its compiled layers; the engine itself is thrown away.

    Args:
        onnx: A strongly typed graph; external data beside it.
        capability: A key of :data:`CHECKABLE`.
        shapes: A concrete shape for every input, so that every compiled layer has a size.
        progress: Told thousandths of the compilation.

    Raises:
        MissingError: TensorRT for RTX is not installed.
        EngineError: The parser or the builder refuses the graph; names the node where it says which
            (:func:`engines.tensorrt.refusal.refused_node`).
    """
    require(Flavour.RTX, "A compile check")
    crashed = EngineError(
        f"TensorRT for RTX crashed while it compiled for {CHECKABLE[capability]}.",
        where=str(onnx),
        fix="Keep more nodes in FP16 with rules, or take this target out.",
    )
    return in_child(_compile, onnx, capability, dict(shapes), progress=progress, crashed=crashed)


def _compile(onnx: Path, capability: tuple[int, int], shapes: dict[str, tuple[int, ...]]) -> CompiledLayers:
    select(Flavour.RTX)
    # TensorRT is imported once it is chosen, and only in the child.
    from engines.tensorrt.binding import trt
    from engines.tensorrt.builder import Job, build

    sm = CHECKABLE[capability]
    made = build(Job(onnx=onnx, device=sm, capability=capability, shapes=shapes), progress=report)
    return CompiledLayers(
        builder=f"tensorrt-rtx {trt.__version__}",
        compute_capability=sm,
        engine_bytes=len(made.data),
        layers=parse_layers(message for _, message in made.messages),
    )
