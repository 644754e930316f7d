"""Requested against actual precision: what the compiled layers made of every quantized node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engines.compiled_layers import CompiledLayer, CompiledLayers
from pipeline.policy.plan import PrecisionPlan
from pipeline.types import Precision

MATRIX_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActualPrecision:
    """One quantized node after compilation.

    Attributes:
        node: Its name.
        requested: The plan's precision.
        actual: Operand types of the kernel that computes it (``Int8 x Int8``); ``None`` if no kernel names the node.
        kernel: That kernel.
        met: Whether it computes in the requested precision; ``None`` if that cannot be seen.
    """

    node: str
    requested: Precision
    actual: str | None
    kernel: str | None
    met: bool | None


def actual_precisions(plan: PrecisionPlan, layers: CompiledLayers) -> tuple[ActualPrecision, ...]:
    """Return what became of every quantized matrix product of ``plan``, in its order."""
    return tuple(
        _actual(entry.node, entry.precision, layers.of_node(entry.node))
        for entry in plan.quantized()
        if entry.op_type in MATRIX_PRODUCTS
    )


def _actual(node: str, requested: Precision, kernels: Iterable[CompiledLayer]) -> ActualPrecision:
    # Neighbours that a node was fused into name it too; the kernel that multiplies is the one that decides.
    computing = [k for k in kernels if k.flops > 0]
    if not computing:
        return ActualPrecision(node=node, requested=requested, actual=None, kernel=None, met=None)
    kernel = next((k for k in computing if k.is_low_precision), computing[0])
    operands = [t.dtype for t in (*kernel.inputs, *kernel.constants) if len(t.shape) > 1]
    return ActualPrecision(
        node=node,
        requested=requested,
        actual=" x ".join(dict.fromkeys(operands)) if len(set(operands)) > 1 else " x ".join(operands[:2]),
        kernel=kernel.name,
        met=kernel.is_low_precision,
    )
