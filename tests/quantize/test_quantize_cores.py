"""Compiled loops and tiles on all cores give bit for bit what plain numpy gives on the whole weight."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import QuantizeError
from pipeline.quantize.weights import cores
from pipeline.quantize.weights.block_kernels import least_error
from pipeline.quantize.weights.weight import SHARES, _scale, block_scales, round_to_nearest
from pipeline.types import QuantDType, QuantSpec

LIMITS = {QuantDType.INT4: (-8, 7), QuantDType.INT8: (-127, 127), QuantDType.FP4_E2M1: (-6, 6)}


def nearest(steps: np.ndarray, dtype: QuantDType) -> np.ndarray:
    if dtype is QuantDType.FP4_E2M1:
        return steps.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return np.rint(steps)


def by_numpy(weight: np.ndarray, spec: QuantSpec, importance: np.ndarray, scale_dtype: object) -> np.ndarray:
    """The search over whole arrays, one candidate after the other."""
    rows, columns = weight.shape
    blocks = weight.astype(np.float32).reshape(rows // spec.block, spec.block, columns)
    cost = (importance + 1e-6 * max(float(np.mean(importance)), 1e-30)).reshape(-1, spec.block, 1)
    amax = np.abs(blocks).max(axis=1)
    best, chosen = np.full(amax.shape, np.inf), np.ones(amax.shape, np.float32)
    for share in SHARES:
        scale = _scale(amax * np.float32(share), spec, scale_dtype, None)
        steps = np.clip(blocks / scale[:, None], *LIMITS[spec.dtype])
        error = (np.square(nearest(steps, spec.dtype) * scale[:, None] - blocks) * cost).sum(axis=1)
        chosen, best = np.where(error < best, scale, chosen), np.minimum(error, best)
    return chosen.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(list(LIMITS)),
    block=st.sampled_from([16, 32, 64, 128]),
    blocks=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 7, 8, 255, 256, 300]),
    stored=st.sampled_from([np.float16, np.float32]),
    transposed=st.booleans(),
    weighted=st.booleans(),
)
def test_scales_of_blocks_are_those_of_numpy(seed, dtype, block, blocks, columns, stored, transposed, weighted) -> None:
    draw = np.random.default_rng(seed)
    shape = (columns, blocks * block) if transposed else (blocks * block, columns)
    # A coarse grid makes errors that are equal, or nearly, so that the order of adding up decides.
    values = np.round(draw.normal(size=shape) * 8) / 8 if seed % 2 else draw.normal(size=shape)
    weight = values.astype(stored)
    weight[draw.random(shape) < 0.1] = 0
    by_rows = weight.T if transposed else weight
    importance = draw.random(blocks * block) ** 4 if weighted else np.ones(blocks * block)
    spec = QuantSpec(dtype=dtype, block=block)
    for scale_dtype in (np.float16, np.float32):
        found = block_scales(by_rows, spec, importance, scale_dtype)
        assert found.tobytes() == by_numpy(by_rows, spec, importance, scale_dtype).tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_errors_are_added_up_in_the_order_of_numpy(transposed: bool) -> None:
    """One row's error is so large that those of the others count only in the order in which they are added."""
    draw = np.random.default_rng(0)
    columns, block = 500, 32
    weight = np.asarray(draw.uniform(-6, 6, (block, columns)), np.float32, order="F" if transposed else "C")
    weight[3] = 0.5  # rounds to 0 with both scales
    cost = np.where(np.arange(block) == 3, 2.0**55, draw.random(block))
    scales = np.ones((2, 1, columns), np.float32) * np.array([1.5, 1], np.float32).reshape(2, 1, 1)
    coarse, fine = (
        (np.square(np.rint(np.clip(weight[None] / s, -8, 7)) * s - weight[None]) * cost[:, None]).sum(axis=1)
        for s in scales[:, None]
    )
    expected = np.where(fine < coarse, scales[1], scales[0])
    # One after the other all of them are lost; partial sums of eight lanes are not.
    assert (expected == 1.5).all() != transposed
    assert np.array_equal(least_error(weight, block, cost, scales, (-8, 7, False)), expected)


def quantized(weight: np.ndarray, spec: QuantSpec, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    value = ir.Value(name="w", const_value=ir.tensor(weight), shape=ir.Shape(weight.shape))
    made = round_to_nearest(value, spec, axis=axis, scale_dtype=np.float32)
    return made.tensor.numpy(), made.scale


@pytest.mark.parametrize("tile", [1, 100, 1 << 18])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_channels_are_those_of_numpy_however_the_weight_is_cut(monkeypatch, tile: int, axis, stored) -> None:
    monkeypatch.setattr(cores, "TILE_VALUES", tile)
    weight = np.random.default_rng(0).normal(size=(11, 5, 3, 4)).astype(stored)
    steps, scale = quantized(weight, QuantSpec(dtype=QuantDType.INT8), axis)
    others = None if axis is None else tuple(i for i in range(4) if i != axis)
    expected = (np.abs(weight).max(axis=others).astype(np.float32) / np.float32(127)).astype(np.float32)
    assert scale.tobytes() == expected.tobytes()
    divisor = np.abs(weight).max(axis=others, keepdims=axis is not None).astype(np.float32) / np.float32(127)
    assert np.array_equal(steps, np.rint(weight.astype(np.float32) / divisor).astype(np.int8))


@pytest.mark.parametrize("tile", [1, 1 << 18])
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_wherever_it_stands(monkeypatch, tile: int, block, bad: float) -> None:
    monkeypatch.setattr(cores, "TILE_VALUES", tile)
    weight = np.ones((64, 8), np.float16)
    weight[63, 7] = bad
    with pytest.raises(QuantizeError, match="NaN or infinity"):
        quantized(weight, QuantSpec(dtype=QuantDType.INT8 if block is None else QuantDType.INT4, block=block), 1)
