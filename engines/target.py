"""The one table of targets: what each device can compute in, and which runtime its engine is for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RecipeError
from pipeline.types import Precision

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

NEEDS: dict[Precision, tuple[int, int]] = {
    Precision.FP16: (5, 3),
    Precision.INT8: (6, 1),
    Precision.FP8: (8, 9),
}
"""Smallest compute capability that has a precision in its matrix units (TensorRT support matrix, hardware section)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device that engines are made for.

    Attributes:
        name: As a recipe writes it.
        title: As people write it.
        compute_capability: CUDA compute capability (major, minor); ``None`` for a CPU.
        memory_gib: Device memory as sold; ``None`` for a CPU.
        runtime: What loads the engine.
    """

    name: str
    title: str
    compute_capability: tuple[int, int] | None = None
    memory_gib: int | None = None
    runtime: Runtime = "tensorrt"

    @property
    def precisions(self) -> frozenset[Precision]:
        """What a node may compute in on this device."""
        capability = self.compute_capability
        if capability is None:
            # ONNX Runtime's CPU provider: no FP8 kernels, and FP16 only by casting to FP32 and back.
            return frozenset({Precision.FP32, Precision.INT8})
        return frozenset({Precision.FP32, *(p for p, least in NEEDS.items() if capability >= least)})

    @property
    def sm(self) -> str:
        """``SM80``; ``CPU`` without a compute capability."""
        return "CPU" if self.compute_capability is None else "SM{}{}".format(*self.compute_capability)

    def family(self, preset: str) -> str:
        """Return the variant of the graph that this target runs under a preset.

        Targets of one family share one quantized ONNX: ``fp32`` (nothing to do), ``cpu``, ``gpu-int8``, ``gpu-fp16``.

        Args:
            preset: A preset's name (``int8-all``) or a precision's.
        """
        precision = preset.partition("-")[0]
        if precision == Precision.FP32:
            return "fp32"
        return "cpu" if self.compute_capability is None else f"gpu-{precision}"


_TABLE = (
    # Compute capabilities: developer.nvidia.com/cuda-gpus; memory: the data sheet of each board.
    Target(name="cpu", title="CPU", runtime="onnxruntime"),
    Target(name="t4", title="T4", compute_capability=(7, 5), memory_gib=16),
    Target(name="a100", title="A100", compute_capability=(8, 0), memory_gib=80),
    Target(name="a30", title="A30", compute_capability=(8, 0), memory_gib=24),
    Target(name="a10", title="A10", compute_capability=(8, 6), memory_gib=24),
    Target(name="l4", title="L4", compute_capability=(8, 9), memory_gib=24),
    Target(name="l40s", title="L40S", compute_capability=(8, 9), memory_gib=48),
    Target(name="rtx4090", title="RTX 4090", compute_capability=(8, 9), memory_gib=24, runtime="tensorrt-rtx"),
    Target(name="h100", title="H100", compute_capability=(9, 0), memory_gib=80),
    Target(name="h200", title="H200", compute_capability=(9, 0), memory_gib=141),
    Target(name="b200", title="B200", compute_capability=(10, 0), memory_gib=180),
    Target(name="rtx5090", title="RTX 5090", compute_capability=(12, 0), memory_gib=32, runtime="tensorrt-rtx"),
)

TARGETS: dict[str, Target] = {entry.name: entry for entry in _TABLE}
"""Every target by name."""


def targets() -> tuple[Target, ...]:
    """Return every target, CPU first, then by age."""
    return _TABLE


def target(name: str) -> Target:
    """Return the target called ``name`` (case, spaces and hyphens do not matter).

    Raises:
        RecipeError: There is none; names the nearest and lists all.
    """
    wanted = "".join(c for c in name.lower() if c.isalnum())
    if wanted in TARGETS:
        return TARGETS[wanted]
    near = difflib.get_close_matches(wanted, TARGETS, n=1, cutoff=0.5)
    raise RecipeError(
        f"There is no target {name!r}" + (f"; did you mean {near[0]}?" if near else "."),
        where="targets",
        fix=f"The targets are: {', '.join(TARGETS)}.",
    )


def check_precision(device: Target, precision: Precision) -> None:
    """Refuse a precision that the device has not.

    Raises:
        RecipeError: Says what the precision needs and names the nearest that the device has.
    """
    if precision in device.precisions:
        return
    if device.compute_capability is None:
        reason = f"The CPU provider of ONNX Runtime has no {precision.upper()} kernels"
    else:
        least = NEEDS[precision]
        reason = f"{device.title} is {device.sm} and has no {precision.upper()} (needs SM{least[0]}{least[1]} or newer)"
    # FP8's nearest is INT8 (the same size), FP16's is FP32 (the same accuracy), INT8's is FP16.
    order = {
        Precision.FP8: (Precision.INT8, Precision.FP16, Precision.FP32),
        Precision.INT8: (Precision.FP16, Precision.FP32),
        Precision.FP16: (Precision.FP32,),
    }[precision]
    nearest = next(p for p in order if p in device.precisions)
    raise RecipeError(f"{reason}; use {nearest}.", where=f"target {device.name}", fix=f"Write --precision {nearest}.")
