"""The one table of targets: what each device can compute in, and which runtime its engine is for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import RecipeError
from pipeline.types import Precision

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

NEEDS: dict[Precision, tuple[int, int]] = {
    Precision.FP16: (5, 3),
    Precision.BF16: (8, 0),
    Precision.INT8: (6, 1),
    Precision.FP8: (8, 9),
    Precision.INT4: (8, 0),
    Precision.FP4: (10, 0),
    Precision.W8A16: (6, 1),
}
"""Smallest compute capability that has a precision (TensorRT support matrix, hardware section; INT4 and FP4 weights: as
TensorRT for RTX compiles them). INT4, FP4 and W8A16 are storage types: the products are FP16's or BF16's. TensorRT has no NF4."""


INT4_BLOCKS = (64, 128)
"""Blocks of INT4 weights that TensorRT documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device that engines are made for.

    Attributes:
        name: As a recipe writes it.
        title: As people write it.
        compute_capability: CUDA compute capability (major, minor); ``None`` for a CPU.
        memory_gib: Device memory as sold; ``None`` for a CPU.
        bandwidth_gb_s: Memory bandwidth, 10^9 bytes a second; ``None`` for a CPU.
        tera_ops: Dense matrix throughput by precision, 10^12 operations a second (a multiply-add counts as two).
        runtime: What loads the engine.
    """

    name: str
    title: str
    compute_capability: tuple[int, int] | None = None
    memory_gib: int | None = None
    bandwidth_gb_s: float | None = None
    tera_ops: Mapping[Precision, float] = field(default_factory=dict)
    runtime: Runtime = "tensorrt"

    @property
    def precisions(self) -> frozenset[Precision]:
        """What a node may compute in on this device."""
        capability = self.compute_capability
        if capability is None:
            # ONNX Runtime's CPU provider: no FP8 kernels, and FP16 only by casting to FP32 and back.
            return frozenset({Precision.FP32, Precision.INT8, Precision.INT4, Precision.W8A16, Precision.NF4})
        return frozenset({Precision.FP32, *(p for p, least in NEEDS.items() if capability >= least)})

    @property
    def sm(self) -> str:
        """``SM80``; ``CPU`` without a compute capability."""
        return "CPU" if self.compute_capability is None else "SM{}{}".format(*self.compute_capability)


def _gpu(
    name: str,
    title: str,
    capability: tuple[int, int],
    memory: tuple[int, float],
    rates: tuple[float, float, float, float | None],
    runtime: Runtime = "tensorrt",
) -> Target:
    """Return a row: (GiB, GB/s) and dense tera-operations in (FP32, FP16, INT8, FP8)."""
    precisions = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.FP8)
    return Target(
        name=name,
        title=title,
        compute_capability=capability,
        memory_gib=memory[0],
        bandwidth_gb_s=memory[1],
        tera_ops={p: r for p, r in zip(precisions, rates, strict=True) if r is not None},
        runtime=runtime,
    )


_TABLE = (
    # Compute capabilities: developer.nvidia.com/cuda-gpus. Memory, bandwidth and rates: the data sheet named behind each
    # row, SXM boards where there are several, without sparsity; GeForce FP16 with FP32 accumulation.
    Target(name="cpu", title="CPU", runtime="onnxruntime"),
    _gpu("t4", "T4", (7, 5), (16, 320), (8.1, 65, 130, None)),  # T4 data sheet, 2019
    _gpu("a100", "A100", (8, 0), (80, 2039), (19.5, 312, 624, None)),  # A100 data sheet, 80 GB SXM, 2021
    _gpu("a30", "A30", (8, 0), (24, 933), (10.3, 165, 330, None)),  # A30 data sheet, 2021
    _gpu("a10", "A10", (8, 6), (24, 600), (31.2, 125, 250, None)),  # A10 data sheet, 2021
    _gpu("l4", "L4", (8, 9), (24, 300), (30.3, 121, 242.5, 242.5)),  # L4 data sheet, 2023 (sparse figures halved)
    _gpu("l40s", "L40S", (8, 9), (48, 864), (91.6, 362, 733, 733)),  # L40S data sheet, 2023
    _gpu(
        "rtx4090", "RTX 4090", (8, 9), (24, 1008), (82.6, 165.2, 660.6, 330.3), "tensorrt-rtx"
    ),  # Ada white paper, table 2
    _gpu("h100", "H100", (9, 0), (80, 3350), (67, 989.4, 1978.9, 1978.9)),  # H100 data sheet, SXM, 2023 (sparse halved)
    _gpu("h200", "H200", (9, 0), (141, 4800), (67, 989.4, 1978.9, 1978.9)),  # H200 data sheet, SXM, 2024
    _gpu("b200", "B200", (10, 0), (180, 8000), (80, 2250, 4500, 4500)),  # DGX B200 data sheet / 8, 2024
    _gpu("rtx5090", "RTX 5090", (12, 0), (32, 1792), (104.8, 209.5, 838, 419), "tensorrt-rtx"),  # Blackwell white paper
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


def check_block(device: Target, block_size: int, where: str = "policy.block_size") -> None:
    """Refuse a block of INT4 weights that the device's runtime does not document; ``where`` is the recipe's key.

    Raises:
        RecipeError: TensorRT takes blocks of 64 and 128.
    """
    if device.runtime == "tensorrt" and block_size not in INT4_BLOCKS:
        raise RecipeError(
            f"TensorRT takes INT4 weights in blocks of {' and '.join(map(str, INT4_BLOCKS))}, not of {block_size}.",
            where=f"target {device.name}, {where}",
            fix="Use 64 or 128; 32 is for cpu and RTX targets.",
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
    elif precision not in NEEDS:
        reason = f"{device.title} has no {precision.upper()}, because TensorRT has none"
    else:
        least = NEEDS[precision]
        reason = f"{device.title} is {device.sm} and has no {precision.upper()} (needs SM{least[0]}{least[1]} or newer)"
    found = nearest(device, precision)
    raise RecipeError(
        f"{reason}; use {found}, or --fallback.",
        where=f"target {device.name}",
        fix=f"Write --precision {found}, or --fallback to give each target the nearest that it has.",
    )


_NEAREST = {
    # FP8's nearest is INT8 (the same size), FP16's is FP32 (the same accuracy), INT8's is FP16.
    Precision.FP8: (Precision.INT8, Precision.FP16),
    Precision.INT8: (Precision.FP16,),
    # Weight-only stays weight-only: it needs no calibration data.
    Precision.INT4: (Precision.W8A16, Precision.FP16),
    Precision.FP4: (Precision.INT4, Precision.W8A16, Precision.FP16),
    Precision.NF4: (Precision.INT4, Precision.W8A16, Precision.FP16),
    Precision.W8A16: (Precision.FP16,),
    Precision.BF16: (Precision.FP16,),
}


def nearest(device: Target, precision: Precision) -> Precision:
    """Return the precision that stands in for one that the device lacks; every device has FP32."""
    return next((p for p in _NEAREST.get(precision, ()) if p in device.precisions), Precision.FP32)
