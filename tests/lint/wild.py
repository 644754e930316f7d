"""Graphs whose every parameter is drawn at random, right or wrong, to compare the lint as a whole with TensorRT for RTX."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto as T

from tests.lint.draft import CODES, Draft
from tests.lint.suites import TARGET, Case

_CODES = (T.INT8, T.INT8, T.INT8, T.UINT8, T.FLOAT8E4M3FN, T.INT4, T.FLOAT4E2M1, T.INT16, T.FLOAT8E5M2)


def wild(rng: np.random.Generator) -> Case:
    """Return a product of a quantized activation and a quantized weight, wrong in zero, one or several ways."""
    d = Draft(rng=rng, float_type=_rare(rng, T.FLOAT16, (T.FLOAT,)), opset=int(rng.choice([13, 19, 23])))
    k, n = int(rng.choice([16, 32])), int(rng.choice([15, 16, 32]))
    x = d.input((4, k))
    if rng.integers(4):
        x = _pair(d, x, (4, k))
    if rng.integers(4) == 0:
        x = d.node(str(rng.choice(["Relu", "Identity"])), [x])
    if rng.integers(5) == 0:
        made = d.node("Add", [x, _weight(d, (4, k))])
    else:
        made = d.node("MatMul", [x, _weight(d, (k, n))])
    capabilities = [sm for sm in TARGET if sm > (7, 5)]  # SM75 has no FP32 products in TensorRT for RTX
    return Case(model=d.model((made, None)), capability=capabilities[int(rng.integers(len(capabilities)))])


def _rare(rng: np.random.Generator, usual: int, others: tuple[int, ...], one_in: int = 4) -> int:
    return usual if rng.integers(one_in) else int(rng.choice(others))


def _scale(d: Draft, shape: tuple[int, ...], axis: int) -> str:
    rng = d.rng
    counts: list[tuple[int, ...]] = [(), (), (), (1,), (shape[axis % 2],), (shape[0], 1), (2, shape[1]), (shape[1],)]
    values = rng.uniform(0.01, 0.02, counts[int(rng.integers(len(counts)))])
    if rng.integers(10) == 0 and values.ndim:
        values.reshape(-1)[-1] = float(rng.choice([0, -1, np.inf, np.nan]))
    dtype = _rare(rng, d.float_type, (T.FLOAT, T.FLOAT16), one_in=8)
    return d.constant(values, dtype, via=str(rng.choice(["initializer", "initializer", "constant"])))


def _zero(d: Draft, dtype: int) -> str | None:
    kind = int(d.rng.integers(10))
    if kind == 0:
        return None
    if kind == 1:
        return d.constant(1, dtype)
    if kind == 2:
        return d.constant(np.zeros(3), dtype)
    return d.constant(0, dtype)


def _pair(d: Draft, value: str, shape: tuple[int, ...]) -> str:
    axis = int(d.rng.choice([0, 1, 1, -1, 2]))
    dtype = int(d.rng.choice(_CODES))
    scale, zero = _scale(d, shape, axis), _zero(d, dtype)
    codes = d.quantize(value, scale, zero, axis=axis)
    kind = int(d.rng.integers(8))
    if kind == 0:
        codes = d.node(str(d.rng.choice(["Relu", "Abs", "Neg"])), [codes])
    elif kind == 1:
        codes = d.node("Identity", [codes])
    return d.dequantize(codes, scale, zero, axis=axis)


def _weight(d: Draft, shape: tuple[int, ...]) -> str:
    axis = int(d.rng.choice([0, 1, 1, -1]))
    dtype = int(d.rng.choice([*_CODES, T.INT32]))
    assert dtype in CODES
    codes = d.constant(d.codes(shape, dtype), dtype)
    if d.rng.integers(12) == 0:
        codes = d.node("Identity", [codes])
    return d.dequantize(codes, _scale(d, shape, axis), axis=axis)
