"""Quantized weights: stored as int8 or FP8 beside one scale per output channel, computed while the model is saved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.errors import QuantizeError
from pipeline.types import Array, QuantDType, QuantSpec

IR_DTYPES = {
    QuantDType.INT8: ir.DataType.INT8,
    QuantDType.UINT8: ir.DataType.UINT8,
    QuantDType.FP8_E4M3: ir.DataType.FLOAT8E4M3FN,
}
_TINY = 1e-30
_HALF_STEP = np.float32(127.5 / 127)
"""A scale may be this much too small: the largest value then still rounds to the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight ready to be an initializer.

    Attributes:
        tensor: int8 or float8_e4m3fn, the float weight's shape; evaluated lazily, so that only one weight is in memory at a time.
        scale: float32, ``[]`` per tensor or ``[channels]`` along ``axis``.
        axis: The output-channel axis, ``None`` per tensor.
        correction: What to add to the GEMM's bias, float32 ``[channels]``, so that the mean output stays; ``None`` is nothing.
    """

    tensor: ir.TensorProtocol
    scale: Array
    axis: int | None
    correction: Array | None = None


def round_to_nearest(
    value: ir.Value,
    spec: QuantSpec,
    *,
    axis: int | None,
    scale_dtype: type[np.floating],
    min_scale: Array | None = None,
) -> QuantizedWeight:
    """Quantize a constant weight symmetrically, ``scale = max|w| / 127`` (FP8: 448) per output channel.

    Args:
        value: A float initializer.
        spec: Its format.
        axis: The output-channel axis; ``None`` for one scale.
        scale_dtype: ``float16`` rounds scales to FP16 first, so that weights are rounded with the scale that is stored.
        min_scale: float32, the scale's shape; smallest one allowed, which a channel of zeros then gets.

    Raises:
        QuantizeError: The weight is not finite.
    """
    source = value.const_value
    assert source is not None
    assert value.name is not None
    scale = _scale(_absolute_maximum(source, axis, value.name), spec, scale_dtype, min_scale)

    def quantized() -> ir.TensorProtocol:
        weight = models.read(source)
        divisor = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        weight = np.divide(weight, divisor, dtype=np.float32)
        np.clip(weight, -spec.dtype.qmax, spec.dtype.qmax, out=weight)
        if spec.dtype is QuantDType.FP8_E4M3:
            return ir.tensor(weight.astype(stored.numpy()))  # rounds half to even
        return ir.tensor(np.rint(weight, out=weight).astype(np.int8))

    stored = IR_DTYPES[spec.dtype]
    lazy = ir.LazyTensor(quantized, dtype=stored, shape=ir.Shape(source.shape.numpy()), name=value.name)
    return QuantizedWeight(tensor=lazy, scale=scale, axis=axis)


def channel_scales(value: ir.Value, spec: QuantSpec, axis: int | None, scale_dtype: type[np.floating]) -> Array:
    """Return the scales that :func:`round_to_nearest` gives a weight, float32 ``[channels]`` along ``axis``.

    Raises:
        QuantizeError: The weight is not finite.
    """
    assert value.const_value is not None
    return _scale(_absolute_maximum(value.const_value, axis, value.name or ""), spec, scale_dtype, None)


def _absolute_maximum(source: ir.TensorProtocol, axis: int | None, name: str) -> Array:
    weight = models.read(source)
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    amax = np.maximum(weight.max(axis=others, initial=0.0), -weight.min(axis=others, initial=0.0))
    if not np.all(np.isfinite(amax)):
        raise QuantizeError(
            "A weight holds NaN or infinity.", where=name, fix="Check the trained weights; export them again."
        )
    return np.asarray(amax, dtype=np.float32)


def _scale(amax: Array, spec: QuantSpec, scale_dtype: type[np.floating], least: Array | None) -> Array:
    scale = (amax / np.float32(spec.dtype.qmax)).astype(np.float32)
    floor = np.maximum(np.float32(_TINY), np.float32(0) if least is None else least)
    # A channel of zeros needs some scale; its bias, stored in that scale, must not be rounded away by it.
    scale = np.where(amax > 0, np.maximum(scale, floor), np.where(floor > _TINY, floor, np.float32(1.0)))
    return stored_scale(scale.astype(np.float32), scale_dtype)


def stored_scale(scale: Array, dtype: type[np.floating]) -> Array:
    """Return float32 scales as ``dtype`` will hold them: finite, above 0, and never so much smaller that values clip.

    Among FP16's subnormals neighbours are far apart, and the nearest below would cut off up to half of the range.
    """
    if dtype is not np.float16:
        return scale
    limits = np.finfo(np.float16)
    rounded = np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16)
    short = rounded.astype(np.float32) * _HALF_STEP < scale
    return np.where(short, np.nextafter(rounded, limits.max), rounded).astype(np.float32)
