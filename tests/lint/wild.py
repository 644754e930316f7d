"""Graphs whose every parameter is drawn at random, right or wrong, to compare the lint as a whole with TensorRT for RTX."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto as T

from tests.lint.draft import CODES, Draft
from tests.lint.suites import TARGET, Case

_CODES = (*[T.INT8] * 8, *[T.FLOAT8E4M3FN] * 2, T.UINT8, T.INT4, T.FLOAT4E2M1, T.INT16, T.FLOAT8E5M2)
_SHARP = 12
"""One in so many choices is a wrong one, so that most faulty graphs have a single fault."""


def wild(rng: np.random.Generator) -> Case:
    """Return a product of a quantized activation and a quantized weight, wrong in zero, one or several ways."""
    d = Draft(rng=rng, float_type=_rare(rng, T.FLOAT16, (T.FLOAT,)), opset=int(rng.choice([13, 19, 23])))
    k, n = int(rng.choice([16, 32])), int(rng.choice([15, 16, 32]))
    x = d.input((4, k))
    if rng.integers(4):
        x = _pair(d, x, (4, k))
    if rng.integers(4) == 0:
        x = d.node(str(rng.choice(["Relu", "Identity"])), [x])
    adds = rng.integers(5) == 0
    made = d.node("Add" if adds else "MatMul", [x, _weight(d, (4, k) if adds else (k, n))])
    capabilities = [sm for sm in TARGET if sm > (7, 5)]  # SM75 has no FP32 products in TensorRT for RTX
    return Case(model=d.model((made, None)), capability=capabilities[int(rng.integers(len(capabilities)))])


def _rare(rng: np.random.Generator, usual: int, others: tuple[int, ...], one_in: int = 4) -> int:
    return usual if rng.integers(one_in) else int(rng.choice(others))


def _scale(d: Draft, shape: tuple[int, ...], axis: int) -> str:
    rng = d.rng
    usual: list[tuple[int, ...]] = [(), (), (1,), (shape[axis % 2],)]
    rare: list[tuple[int, ...]] = [(shape[0], 1), (2, shape[1]), (shape[1],), (1, 1)]
    counts = usual if rng.integers(_SHARP // 2) else rare
    values = np.asarray(rng.uniform(0.01, 0.02, counts[int(rng.integers(4))]))
    if rng.integers(_SHARP) == 0 and values.ndim:
        values.reshape(-1)[-1] = float(rng.choice([0, -1, np.inf, np.nan]))
    dtype = _rare(rng, d.float_type, (T.FLOAT, T.FLOAT16), one_in=_SHARP)
    return d.constant(values, dtype, via=str(rng.choice(["initializer", "initializer", "constant"])))


def _zero(d: Draft, dtype: int) -> str | None:
    kind = int(d.rng.integers(2 * _SHARP))
    if kind == 0:
        return None
    if kind == 1:
        return d.constant(1, dtype)
    if kind == 2:
        return d.constant(np.zeros(3), dtype)
    return d.constant(0, dtype)


def _pair(d: Draft, value: str, shape: tuple[int, ...]) -> str:
    axis = int(d.rng.choice([0, 0, 1, 1, 1, -1, -1, 2]))
    dtype = int(d.rng.choice(_CODES))
    scale, zero = _scale(d, shape, axis), _zero(d, dtype)
    codes = d.quantize(value, scale, zero, axis=axis)
    kind = int(d.rng.integers(_SHARP))
    if kind == 0:
        codes = d.node(str(d.rng.choice(["Relu", "Abs", "Neg"])), [codes])
    elif kind == 1:
        codes = d.node("Identity", [codes])
    return d.dequantize(codes, scale, zero, axis=axis)


def _weight(d: Draft, shape: tuple[int, ...]) -> str:
    axis = int(d.rng.choice([0, 1, 1, -1]))
    dtype = int(d.rng.choice([*_CODES, *_CODES, T.INT32]))
    assert dtype in CODES
    codes = d.constant(d.codes(shape, dtype), dtype)
    if d.rng.integers(_SHARP) == 0:
        codes = d.node("Identity", [codes])
    return d.dequantize(codes, _scale(d, shape, axis), axis=axis)
