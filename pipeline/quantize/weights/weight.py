"""Quantized weights: stored as int8 or FP8 beside one scale per output channel, computed while the model is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline import model as models
from pipeline.errors import QuantizeError
from pipeline.quantize.weights.block_kernels import least_error
from pipeline.quantize.weights.cores import on_all_cores, tiles
from pipeline.quantize.weights.fake import nearest
from pipeline.quantize.weights.nf4 import SecondLevel, nearest_codes, second_level
from pipeline.types import BFLOAT16, Array, QuantDType, QuantSpec

IR_DTYPES = {
    QuantDType.INT8: ir.DataType.INT8,
    QuantDType.UINT8: ir.DataType.UINT8,
    QuantDType.FP8_E4M3: ir.DataType.FLOAT8E4M3FN,
    QuantDType.FP8_E5M2: ir.DataType.FLOAT8E5M2,
    QuantDType.INT4: ir.DataType.INT4,
    QuantDType.FP4_E2M1: ir.DataType.FLOAT4E2M1,
    QuantDType.NF4: ir.DataType.UINT8,
}
_TINY = 1e-30
SHARES = tuple(round(1.0 - 0.04 * step, 2) for step in range(14))
"""Shares of a block's largest magnitude that are tried as its range: 1, 0.96 … 0.48."""
CAUTIOUS = SHARES[:4]
"""Those tried without data: an outlier of a language model's weights often meets an input that makes it matter."""
_HALF_STEP = np.float32(127.5 / 127)
"""A scale may be this much too small: the largest value then still rounds to the last step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight ready to be an initializer.

    Attributes:
        tensor: int8, float8_e4m3fn or (NF4) the codes as uint8, the float weight's shape; evaluated lazily, so that only one weight is in memory at a time.
        scale: float32, ``[]`` per tensor, ``[channels]`` along ``axis``, or the weight's shape with ``axis`` divided by ``block``.
        axis: The output-channel axis, ``None`` per tensor; in blocks the axis that they divide.
        block: Elements along ``axis`` that share a scale, where the weight is quantized in blocks.
        second: The scales of blocks as they are stored where those are quantized too; ``scale`` then holds what was quantized.
        correction: What to add to the GEMM's bias, float32 ``[channels]``, so that the mean output stays; ``None`` is nothing.
    """

    tensor: ir.TensorProtocol
    scale: Array
    axis: int | None
    block: int | None = None
    second: SecondLevel | None = None
    correction: Array | None = None


def round_to_nearest(
    value: ir.Value,
    spec: QuantSpec,
    *,
    axis: int | None,
    scale_dtype: npt.DTypeLike,
    min_scale: Array | None = None,
    signed: bool = False,
) -> QuantizedWeight:
    """Quantize a constant weight symmetrically, ``scale = max|w| / 127`` (FP8: 448, INT4: 7, NF4: 1) per output channel or block.

    Args:
        value: A float initializer.
        spec: Its format.
        axis: The output-channel axis; ``None`` for one scale.
        scale_dtype: ``float16`` and ``bfloat16`` round scales first, so that weights are rounded with the scale that is stored.
        min_scale: float32, the scale's shape; smallest one allowed, which a channel of zeros then gets.
        signed: A block's scale may be negative.

    Raises:
        QuantizeError: The weight is not finite.
    """
    source = value.const_value
    assert source is not None
    assert value.name is not None
    if spec.block is not None:
        return _in_blocks(value, spec, axis=axis, scale_dtype=scale_dtype, signed=signed)
    scale = _scale(_absolute_maximum(source, axis, value.name), spec, scale_dtype, min_scale)
    divisor = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(len(source.shape))])
    lazy = _lazy(value, spec, lambda rows: divisor[rows] if axis == 0 else divisor)
    return QuantizedWeight(tensor=lazy, scale=scale, axis=axis)


def _in_blocks(
    value: ir.Value, spec: QuantSpec, *, axis: int | None, scale_dtype: npt.DTypeLike, signed: bool
) -> QuantizedWeight:
    """Quantize a matrix in blocks along the axis that is not the output channels'.

    Where an INT4 scale may be negative, the value of largest magnitude becomes -8 whatever its sign; elsewhere each
    block has the scale of least squared error among those that clip little.
    """
    assert value.const_value is not None
    assert spec.block is not None
    block, summed = spec.block, 1 - (axis or 0)
    weight = models.read(value.const_value)
    if not all(on_all_cores(lambda rows: bool(np.isfinite(weight[rows]).all()), tiles(weight.shape))):
        raise not_finite(value.name or "")
    by_rows = weight if summed == 0 else weight.T
    if signed and spec.dtype is QuantDType.INT4:
        found = _signed(_extremes(by_rows, block), spec, 1.0, scale_dtype)
    elif spec.dtype is QuantDType.NF4:
        found = block_candidates(by_rows, spec, (1.0,), scale_dtype, signed=False)[0]
    else:
        found = block_scales(by_rows, spec, np.ones(len(by_rows)), scale_dtype, shares=CAUTIOUS)
    scale = found if summed == 0 else np.ascontiguousarray(found.T)

    def divisor(rows: slice) -> Array:
        return np.repeat(scale[rows], block, axis=1) if summed else scale[np.arange(rows.start, rows.stop) // block]

    lazy = _lazy(value, spec, divisor)
    second = None
    if spec.double:
        low, high = _extremes(by_rows, block)  # of a block of zeros the maximum is 0, not the 1 that it is divided by
        second = second_level(np.ascontiguousarray(np.maximum(-low, high).T).reshape(-1))
    return QuantizedWeight(tensor=lazy, scale=scale, axis=summed, block=block, second=second)


def _lazy(value: ir.Value, spec: QuantSpec, divisor: Callable[[slice], Array]) -> ir.LazyTensor:
    """Return the stored weight, computed when it is saved; ``divisor`` gives the scales of some rows of the first axis."""
    source = value.const_value
    assert source is not None
    stored = IR_DTYPES[spec.dtype]

    def quantized() -> ir.TensorProtocol:
        weight = models.read(source)
        steps = np.empty(weight.shape, stored.numpy())

        def store(rows: slice) -> None:
            found = np.divide(weight[rows].astype(np.float32), divisor(rows))
            if spec.dtype is QuantDType.NF4:
                steps[rows] = nearest_codes(found)
                return
            np.clip(found, lowest(spec.dtype), spec.dtype.qmax, out=found)
            steps[rows] = nearest(found, spec.dtype)

        on_all_cores(store, tiles(weight.shape))
        return ir.tensor(steps)

    return ir.LazyTensor(quantized, dtype=stored, shape=ir.Shape(source.shape.numpy()), name=value.name)


def lowest(dtype: QuantDType) -> float:
    """Return the least value a symmetric weight takes: INT4 uses its -8, one of only sixteen; INT8 mirrors its 127."""
    return dtype.qmin if dtype is QuantDType.INT4 else -dtype.qmax


def channel_scales(value: ir.Value, spec: QuantSpec, axis: int | None, scale_dtype: npt.DTypeLike) -> Array:
    """Return the scales that :func:`round_to_nearest` gives a weight, float32 ``[channels]`` along ``axis``.

    Raises:
        QuantizeError: The weight is not finite.
    """
    assert value.const_value is not None
    return _scale(_absolute_maximum(value.const_value, axis, value.name or ""), spec, scale_dtype, None)


def block_scales(
    weight: Array,
    spec: QuantSpec,
    importance: Array,
    scale_dtype: npt.DTypeLike,
    *,
    shares: Sequence[float] = SHARES,
    signed: bool = False,
) -> Array:
    """Return the scales of blocks that cost the least weighted squared error, float32 ``[blocks, channels out]``.

    A block of few bits is better off if its largest values clip: tried are some shares of ``max|w| / qmax``.

    Args:
        weight: ``[channels in, channels out]``.
        spec: Its format, with a block.
        importance: ``[channels in]``, what an error of each row costs: its input's second moment.
        scale_dtype: What scales are stored in.
        shares: What to try.
        signed: Try negative scales too, with which INT4's -8 stands for the largest value whatever its sign.
    """
    assert spec.block is not None
    # A row whose input was always zero still gets a little, so that a block of such rows has a scale of its own.
    cost = importance + 1e-6 * max(float(np.mean(importance)), 1e-30)
    levels = (lowest(spec.dtype), spec.dtype.qmax, spec.dtype is QuantDType.FP4_E2M1)
    tried = block_candidates(weight, spec, shares, scale_dtype, signed=signed)
    return least_error(weight, spec.block, cost, tried, levels)


def block_candidates(
    weight: Array, spec: QuantSpec, shares: Sequence[float], scale_dtype: npt.DTypeLike, *, signed: bool
) -> Array:
    """Return the scales that are tried for blocks, float32 ``[candidates, blocks, channels out]``: see :func:`block_scales`."""
    assert spec.block is not None
    ends = _extremes(weight, spec.block)
    amax = np.maximum(-ends[0], ends[1])
    tried = [_scale(amax * np.float32(share), spec, scale_dtype, None) for share in shares]
    if signed and spec.dtype is QuantDType.INT4:
        tried += [_signed(ends, spec, share, scale_dtype) for share in shares]
    return np.stack(tried)


def _extremes(weight: Array, block: int) -> tuple[Array, Array]:
    """Return the smallest and largest value of every block, float32 ``[blocks, channels out]`` each."""
    low, high = (np.empty((len(weight) // block, weight.shape[1]), np.float32) for _ in range(2))

    def search(index: slice) -> None:
        values = weight[index.start * block : index.stop * block].astype(np.float32)
        low[index], high[index] = values.min(axis=0), values.max(axis=0)

    on_all_cores(search, [slice(i, i + 1) for i in range(len(low))])
    return low, high


def _signed(ends: tuple[Array, Array], spec: QuantSpec, share: float, scale_dtype: npt.DTypeLike) -> Array:
    """Return scales with which the lowest level stands for a share of the value of largest magnitude."""
    low, high = ends
    magnitude = np.maximum(-low, high) * np.float32(share * spec.dtype.qmax / -spec.dtype.qmin)
    scale = _scale(magnitude.astype(np.float32), spec, scale_dtype, None)
    found: Array = np.where(high > -low, -scale, scale).astype(np.float32)
    return found


def _absolute_maximum(source: ir.TensorProtocol, axis: int | None, name: str) -> Array:
    weight = models.read(source)
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)

    def largest(rows: slice) -> Array:
        values = weight[rows].astype(np.float32)  # exact where it is FP16, and much faster to compare
        found: Array = np.maximum(values.max(axis=others, initial=0.0), -values.min(axis=others, initial=0.0))
        return found

    parts = on_all_cores(largest, tiles(weight.shape))
    amax = np.concatenate(parts) if axis == 0 else np.maximum.reduce(parts)
    if not np.all(np.isfinite(amax)):
        raise not_finite(name)
    return np.asarray(amax, dtype=np.float32)


def not_finite(name: str) -> QuantizeError:
    """Return the error for a weight that holds NaN or infinity."""
    return QuantizeError(
        "A weight holds NaN or infinity.", where=name, fix="Check the trained weights; export them again."
    )


def _scale(amax: Array, spec: QuantSpec, scale_dtype: npt.DTypeLike, least: Array | None) -> Array:
    scale = (amax / np.float32(spec.dtype.qmax)).astype(np.float32)
    floor = np.maximum(np.float32(_TINY), np.float32(0) if least is None else least)
    # A channel of zeros needs some scale; its bias, stored in that scale, must not be rounded away by it. A block of zeros has a
    # small one, FP16's least normal number: MatMulNBits adds up its zeros with rounding errors, times the scale.
    some = np.float32(1.0 if spec.block is None else 2.0**-14)
    scale = np.where(amax > 0, np.maximum(scale, floor), np.where(floor > _TINY, floor, some))
    return stored_scale(scale.astype(np.float32), scale_dtype)


def stored_scale(scale: Array, dtype: npt.DTypeLike) -> Array:
    """Return float32 scales as ``dtype`` will hold them: finite, above 0, and never so much smaller that values clip.

    Among FP16's subnormals neighbours are far apart, and the nearest below would cut off up to half of the range.
    """
    if np.dtype(dtype) == BFLOAT16:
        rounded: Array = np.maximum(scale.astype(BFLOAT16), np.float32(2.0**-126)).astype(BFLOAT16)
        largest = ml_dtypes.finfo(BFLOAT16).max  # type: ignore[no-untyped-call]
    elif np.dtype(dtype) == np.float16:
        limits = np.finfo(np.float16)
        rounded = np.clip(scale, limits.smallest_subnormal, limits.max).astype(np.float16)
        largest = limits.max
    else:
        return scale
    short = rounded.astype(np.float32) * _HALF_STEP < scale
    return np.where(short, np.nextafter(rounded, largest), rounded).astype(np.float32)
