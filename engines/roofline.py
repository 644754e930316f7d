"""A latency *estimate* from compiled layers: what a GPU's data sheet allows at best, never a measurement.

Each kernel takes the longer of moving its bytes at full memory bandwidth and of doing its matrix products at the full
rate of their type (roofline model: Williams, Waterman, Patterson, CACM 52(4), 2009). Caches, launch times and everything
that keeps a kernel from its peak are left out, so figures of two variants compare better than either is true.
"""

from __future__ import annotations

from collections.abc import Iterable

from engines.compiled_layers import CompiledLayer
from engines.target import Target
from pipeline.types import Precision

_RATE = {
    "Float": Precision.FP32,
    "Half": Precision.FP16,
    "BF16": Precision.FP16,
    "BFloat16": Precision.FP16,
    "Int8": Precision.INT8,
    "FP8": Precision.FP8,
    # INT4 and FP4 weights are widened in the kernel: the product is FP16.
    "Int4": Precision.FP16,
    "FP4": Precision.FP16,
    "FP4E2M1": Precision.FP16,
}


def estimate_ms(layers: Iterable[CompiledLayer], device: Target) -> float | None:
    """Return the least milliseconds that one run of these kernels can take; ``None`` where the table lacks a figure."""
    if device.bandwidth_gb_s is None:
        return None
    total = 0.0
    for layer in layers:
        moved_ms = layer.bytes_moved / (device.bandwidth_gb_s * 1e6)
        rate = device.tera_ops.get(_precision(layer))
        if layer.flops and rate is None:
            return None
        total += max(moved_ms, layer.flops / (rate * 1e9) if rate else 0.0)
    return total


def _precision(layer: CompiledLayer) -> Precision:
    if layer.is_attention:
        # Its operands may come in INT8 or leave in it; the products inside are FP16.
        return Precision.FP16
    read = {_RATE[t.dtype] for t in layer.inputs if t.dtype in _RATE and len(t.shape) > 1}
    stored = {_RATE[t.dtype] for t in layer.constants if t.dtype in _RATE and len(t.shape) > 1}
    # Weights that are narrow alone are widened in the kernel.
    found = read if read and stored and not read & stored and Precision.FP16 in read else read | stored
    return next((p for p in (Precision.INT8, Precision.FP8, Precision.FP16) if p in found), Precision.FP32)
