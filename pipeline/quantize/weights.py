"""Quantized weights: stored as int8 beside one scale per output channel, computed while the model is saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.errors import QuantizeError
from pipeline.types import Array, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight ready to be an initializer.

    Attributes:
        tensor: int8, the float weight's shape; evaluated lazily, so that only one weight is in memory at a time.
        scale: float32, ``[]`` per tensor or ``[channels]`` along ``axis``.
        axis: The output-channel axis, ``None`` per tensor.
    """

    tensor: ir.TensorProtocol
    scale: Array
    axis: int | None


def round_to_nearest(
    value: ir.Value,
    spec: QuantSpec,
    *,
    axis: int | None,
    scale_dtype: type[np.floating],
    min_scale: Array | None = None,
) -> QuantizedWeight:
    """Quantize a constant weight symmetrically, ``scale = max|w| / 127`` per output channel.

    Args:
        value: A float initializer.
        spec: Its format.
        axis: The output-channel axis; ``None`` for one scale.
        scale_dtype: ``float16`` rounds scales to FP16 first, so that weights are rounded with the scale that is stored.
        min_scale: float32 ``[channels]``; smallest scale allowed for each channel.

    Raises:
        QuantizeError: The weight is not finite.
    """
    source = value.const_value
    assert source is not None
    assert value.name is not None
    scale = _scale(_absolute_maximum(source, axis, value.name), spec, scale_dtype)
    if min_scale is not None:
        scale = np.maximum(scale, min_scale).astype(np.float32)

    def quantized() -> ir.TensorProtocol:
        weight = source.numpy().astype(np.float32)
        divisor = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        np.divide(weight, divisor, out=weight)
        np.rint(weight, out=weight)
        np.clip(weight, -spec.dtype.qmax, spec.dtype.qmax, out=weight)
        return ir.tensor(weight.astype(np.int8))

    lazy = ir.LazyTensor(quantized, dtype=ir.DataType.INT8, shape=ir.Shape(source.shape.numpy()), name=value.name)
    return QuantizedWeight(tensor=lazy, scale=scale, axis=axis)


def _absolute_maximum(source: ir.TensorProtocol, axis: int | None, name: str) -> Array:
    weight = np.abs(source.numpy().astype(np.float32, copy=False))
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    amax = weight.max(axis=others, initial=0.0)
    if not np.all(np.isfinite(amax)):
        raise QuantizeError(
            "A weight holds NaN or infinity.", where=name, fix="Check the trained weights; export them again."
        )
    return np.asarray(amax, dtype=np.float32)


def _scale(amax: Array, spec: QuantSpec, scale_dtype: type[np.floating]) -> Array:
    scale = (amax / np.float32(spec.dtype.qmax)).astype(np.float32)
    # A channel of zeros needs some scale; and none may be so small that FP16 (or the division) loses it.
    tiny = np.float32(np.finfo(scale_dtype).smallest_subnormal if scale_dtype is np.float16 else 1e-30)
    scale = np.where(amax > 0, np.maximum(scale, tiny), np.float32(1.0))
    return scale.astype(scale_dtype).astype(np.float32)
