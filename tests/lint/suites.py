"""Small generated graphs for every rule about validity: faulty ones and clean ones that come close.

What TensorRT for RTX does with them is the truth that the lint is compared with; nothing here calls the lint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import TensorProto as T

from tests.lint.draft import Draft

SM80, SM89, SM120 = (8, 0), (8, 9), (12, 0)
TARGET = {(7, 5): "t4", SM80: "a100", (8, 6): "a10", SM89: "l40s", SM120: "rtx5090"}
NARROW = {T.FLOAT8E4M3FN: SM89, T.INT4: SM80, T.FLOAT4E2M1: SM120}
"""A GPU that has each narrow type."""
VIA = ("initializer", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A serialized model and the GPU to judge it for."""

    model: bytes
    capability: tuple[int, int] = SM80

    @property
    def target(self) -> str:
        return TARGET[self.capability]


Make = Callable[[np.random.Generator], Case]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Graphs for one rule.

    Attributes:
        rule: Its id.
        what: What is wrong with the faulty ones.
        expect: ``refused`` by the parser or the builder; ``silent``: accepted, but not computed as the graph says;
            ``accepted`` as it is: a rule of the literature, or about speed.
        faulty: Makes a graph that the rule is about.
        clean: Makes a graph that it is not about.
        judge: ``tensorrt-rtx``, or ``onnx`` for ONNX's own checker.
    """

    rule: str
    what: str
    expect: Literal["refused", "silent", "accepted"]
    faulty: Make
    clean: Make
    judge: Literal["tensorrt-rtx", "onnx"] = "tensorrt-rtx"


def generate(make: Make, count: int, seed: int) -> list[Case]:
    """Return ``count`` cases; the same for the same seed."""
    return [make(np.random.default_rng([seed, index])) for index in range(count)]


def _size(rng: np.random.Generator) -> int:
    return int(rng.choice([16, 32, 48, 64]))


def _pick(rng: np.random.Generator, *items: object) -> object:
    return items[int(rng.integers(len(items)))]


def _draft(rng: np.random.Generator, opset: int = 23) -> Draft:
    return Draft(rng=rng, float_type=int(rng.choice([T.FLOAT, T.FLOAT16])), opset=opset)


def product(d: Draft, value: str, rows: int, columns: int, dtype: int = T.INT8, per_channel: bool | None = None) -> str:
    """Multiply ``value`` [m, rows] by a quantized weight."""
    fine = bool(d.rng.integers(2)) if per_channel is None else per_channel
    if d.rng.integers(2):
        return d.node("MatMul", [value, d.weight((rows, columns), dtype, 1 if fine else None)])
    return d.node("Gemm", [value, d.weight((columns, rows), dtype, 0 if fine else None)], transB=1)


def sound(rng: np.random.Generator) -> Case:
    """A quantized product or convolution as it should be, with the ways of writing it that are all right."""
    d = _draft(rng, opset=int(rng.choice([19, 20, 21, 23])))
    how, m, k, n = str(rng.choice(["initializer", "constant", "identity", "cast"])), 8, _size(rng), _size(rng)
    convolution = bool(rng.integers(3) == 0)
    x = d.input((2, k, 8, 8) if convolution else (m, k))
    scale = d.constant(rng.uniform(1e-3, 1e-1, () if rng.integers(2) else (1,)), via=str(rng.choice(VIA)))
    zero = d.constant(np.zeros(() if rng.integers(2) else (1,)), T.INT8, via=how)
    value = d.dequantize(d.quantize(x, scale, zero), scale, zero if rng.integers(2) else None)
    if convolution:
        made = d.node("Conv", [value, d.weight((n, k, 3, 3), axis=0 if rng.integers(2) else None)], pads=[1] * 4)
    else:
        made = product(d, value, k, n)
    if rng.integers(2):
        made = d.node("Relu", [made])
    if rng.integers(3) == 0:
        made = d.pair(made, float(rng.uniform(1e-3, 1e-1)))
    return Case(model=d.model((made, None)))


# ---- zero points ---------------------------------------------------------------------------------------------------


def shifted(rng: np.random.Generator) -> Case:
    d, k, n = _draft(rng), _size(rng), _size(rng)
    dtype = int(rng.choice([T.INT8, T.INT8, T.UINT8]))
    shift = int(rng.integers(1, 128)) * (1 if dtype == T.UINT8 or rng.integers(2) else -1)
    how = str(rng.choice(["initializer", "constant", "identity", "cast"]))
    where = int(rng.integers(4))  # both, Q only, DQ only, the weight
    x, scale = d.input((8, k)), d.constant(0.02)
    bad, good = d.constant(shift, dtype, via=how), d.constant(0, dtype)
    made = d.quantize(x, scale, bad if where in (0, 1) else good)
    made = d.dequantize(made, scale, bad if where in (0, 2) else good)
    if where == 3:
        zeros = d.constant(rng.integers(1, 9, n), T.INT8)
        scales = d.constant(rng.uniform(0.01, 0.02, n))
        weight = d.dequantize(d.constant(d.codes((k, n)), T.INT8), scales, zeros, axis=1)
        return Case(model=d.model((d.node("MatMul", [made, weight]), None)))
    return Case(model=d.model((product(d, made, k, n), None)))


def shifted_fp8(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    made = d.pair(d.input((8, k)), 0.02, T.FLOAT8E4M3FN, zero=float(rng.choice([1, 2, -1, -4])))
    return Case(model=d.model((product(d, made, k, _size(rng), T.FLOAT8E4M3FN), None)), capability=SM89)


def sound_fp8(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    made = d.pair(d.input((8, k)), float(rng.uniform(1e-3, 1e-1)), T.FLOAT8E4M3FN)
    return Case(
        model=d.model((product(d, made, k, _size(rng), T.FLOAT8E4M3FN), None)),
        capability=SM89 if rng.integers(2) else SM120,
    )


def runtime_zero(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    x, scale, good = d.input((8, k)), d.constant(0.02), d.constant(0, T.INT8)
    how = int(rng.integers(3))
    if how == 0:
        zero = d.input((), T.INT8)
    elif how == 1:
        zero = d.node("Cast", [d.node("ReduceMax", [x], keepdims=0)], to=T.INT8)
    else:
        zero = d.node("Cast", [d.input((), T.INT32)], to=T.INT8)
    where = int(rng.integers(3))
    made = d.dequantize(d.quantize(x, scale, good if where == 2 else zero), scale, good if where == 1 else zero)
    return Case(model=d.model((product(d, made, k, _size(rng)), None)))


# ---- scales --------------------------------------------------------------------------------------------------------


def _with_scale(rng: np.random.Generator, bad: float, how: str) -> Case:
    d, k, n = _draft(rng), _size(rng), _size(rng)
    if bad == 0 and rng.integers(2):
        d.float_type, bad = T.FLOAT16, 1e-9  # 0 in FP16
    x, good = d.input((8, k)), d.constant(0.02)
    if rng.integers(2):
        scales = rng.uniform(0.01, 0.02, n)
        scales[rng.integers(n)] = bad
        weight = d.dequantize(d.constant(d.codes((k, n)), T.INT8), d.constant(scales, via=how), axis=1)
        return Case(model=d.model((d.node("MatMul", [d.pair(x), weight]), None)))
    scale, zero = d.constant(bad, via=how), d.constant(0, T.INT8)
    where = int(rng.integers(3))
    made = d.dequantize(d.quantize(x, good if where == 1 else scale, zero), good if where == 2 else scale, zero)
    return Case(model=d.model((product(d, made, k, n), None)))


def bad_scale(rng: np.random.Generator) -> Case:
    return _with_scale(rng, float(rng.choice([0.0, -0.02, -1e-3, np.nan])), str(rng.choice(VIA)))


def unseen_scale(rng: np.random.Generator) -> Case:
    if rng.integers(2):
        return _with_scale(rng, np.inf, str(rng.choice(VIA)))
    return _with_scale(rng, float(rng.choice([0.0, -0.02])), str(rng.choice(["identity", "cast"])))


def small_scale(rng: np.random.Generator) -> Case:
    """Tiny but positive scales, as many as channels."""
    d, k, n = _draft(rng), _size(rng), _size(rng)
    least = 1e-4 if d.float_type == T.FLOAT16 else 1e-30
    scales = d.constant(rng.uniform(least, 2 * least, n), via=str(rng.choice(VIA)))
    weight = d.dequantize(d.constant(d.codes((k, n)), T.INT8), scales, axis=1)
    made = d.pair(d.input((8, k)), least * float(rng.uniform(1, 100)))
    return Case(model=d.model((d.node("MatMul", [made, weight]), None)))


def runtime_scale(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    x, zero = d.input((8, k)), d.constant(0, T.INT8)
    scale = d.input(()) if rng.integers(2) else d.node("ReduceMax", [d.node("Abs", [x])], keepdims=0)
    return Case(model=d.model((product(d, d.dequantize(d.quantize(x, scale, zero), scale, zero), k, _size(rng)), None)))


def subnormal_scale(rng: np.random.Generator) -> Case:
    d, k = Draft(rng=rng), _size(rng)
    made = d.pair(d.input((8, k)), float(rng.uniform(1e-7, 6e-5)))
    return Case(model=d.model((product(d, made, k, _size(rng)), None)))


def miscounted(rng: np.random.Generator) -> Case:
    d, k, n = _draft(rng), _size(rng), _size(rng)
    made, codes = d.pair(d.input((8, k))), d.constant(d.codes((k, n)), T.INT8)
    kind, off = int(rng.integers(6)), int(rng.choice([-3, -1, 1, 5]))
    if kind == 0:
        weight = d.dequantize(codes, d.constant(np.full(n + off, 0.01)), axis=1)
    elif kind == 1:
        zeros = d.constant(np.zeros(n + off), T.INT8)
        weight = d.dequantize(codes, d.constant(np.full(n, 0.01)), zeros, axis=1)
    elif kind == 2:
        weight = d.dequantize(codes, d.constant(np.full(n, 0.01)), axis=int(rng.choice([2, 3, -3])))
    elif kind == 3:
        shape = (1, 1) if rng.integers(2) else (1, n, 1)
        weight = d.dequantize(codes, d.constant(np.full(shape, 0.01)), axis=1)
    elif kind == 4:
        weight = d.dequantize(codes, d.constant(np.full((2, n // 2), 0.01)), axis=0, block_size=k // 2)
    else:
        weight = d.dequantize(codes, d.constant(np.full((5, n), 0.01)), axis=0, block_size=k // 5)
    return Case(model=d.model((d.node("MatMul", [made, weight]), None)))


def counted(rng: np.random.Generator) -> Case:
    d, k, n = _draft(rng), _size(rng), _size(rng)
    made, codes = d.pair(d.input((8, k)), axis=int(rng.choice([0, 1, -1, 3]))), d.constant(d.codes((k, n)), T.INT8)
    kind = int(rng.integers(4))
    if kind == 0:
        axis = int(rng.choice([0, 1, -1, -2]))
        weight = d.dequantize(codes, d.constant(np.full((k, n)[axis], 0.01)), axis=axis)
    elif kind == 1:
        zeros = d.constant(np.zeros(n), T.INT8)
        weight = d.dequantize(codes, d.constant(np.full(n, 0.01)), zeros, axis=1)
    elif kind == 2:
        weight = d.dequantize(codes, d.constant(np.full((), 0.01)), d.constant([0], T.INT8))
    else:
        block = int(rng.choice([8, 16]))
        weight = d.dequantize(codes, d.constant(np.full((k // block, n), 0.01)), axis=0, block_size=block)
    return Case(model=d.model((d.node("MatMul", [made, weight]), None)))


# ---- types ---------------------------------------------------------------------------------------------------------

_FOREIGN = (T.INT16, T.UINT16, T.UINT4, T.FLOAT8E5M2, T.FLOAT8E4M3FNUZ, T.FLOAT8E5M2FNUZ)


def foreign_type(rng: np.random.Generator) -> Case:
    d, k, n = _draft(rng), _size(rng), _size(rng)
    kind, other = int(rng.integers(7)), int(rng.choice(_FOREIGN))
    x, scale = d.input((8, k)), d.constant(0.02)
    if kind == 0:
        made = d.pair(x, 0.02, other)
    elif kind == 1:
        made = d.node("MatMul", [d.pair(x), d.weight((k, n), other)])
    elif kind == 2:
        zero = d.constant(0, T.UINT8) if rng.integers(2) else None
        weight = d.dequantize(d.constant(d.codes((k, n), T.UINT8), T.UINT8), scale, zero)
        made = d.node("MatMul", [d.pair(x), weight])
    elif kind == 3:
        made = d.dequantize(d.input((8, k), int(rng.choice([T.UINT8, T.INT32]))), scale)
    elif kind == 4:
        made = d.pair(d.input((8, k), int(rng.choice([T.INT32, T.INT8, T.INT64]))))
    elif kind == 5:
        made = d.dequantize(d.quantize(x, scale, output_dtype=int(rng.choice([T.UINT8, other]))), scale)
    else:
        codes = d.constant(d.codes((k, n), T.FLOAT8E4M3FN), T.FLOAT8E4M3FN)
        e8m0 = d.constant(np.full((k // 8, n), 0.5), T.FLOAT8E8M0)
        weight = d.dequantize(codes, e8m0, axis=0, block_size=8, output_dtype=d.float_type)
        return Case(model=d.model((d.node("MatMul", [x, weight]), None)), capability=SM120)
    return Case(model=d.model((made, None)))


def known_type(rng: np.random.Generator) -> Case:
    dtype = int(rng.choice([T.INT8, T.FLOAT8E4M3FN, T.INT4, T.FLOAT4E2M1]))
    d, k = _draft(rng), _size(rng)
    x = d.input((8, k))
    if dtype in (T.INT8, T.FLOAT8E4M3FN) and rng.integers(2):
        x = d.pair(x, 0.02, dtype)
    return Case(model=d.model((product(d, x, k, _size(rng), dtype), None)), capability=NARROW.get(dtype, SM80))


def read_as_int8(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    x, scale = d.input((8, k)), d.constant(0.02)
    kind = int(rng.integers(3))
    zero = (d.constant(0, T.UINT8), None, d.constant(0, T.INT32))[kind]
    codes = d.quantize(x, scale, zero)
    return Case(model=d.model((d.dequantize(codes, scale, zero), None), (codes, T.INT32 if kind == 2 else T.UINT8)))


def written_int8(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    x, scale = d.input((8, k)), d.constant(0.02)
    if rng.integers(2):
        codes = d.quantize(x, scale, output_dtype=T.INT8)
    else:
        codes = d.quantize(x, scale, d.constant(0, T.INT8, via=str(rng.choice(VIA))))
    return Case(model=d.model((d.dequantize(codes, scale), None), (codes, T.INT8)))


def on_target(rng: np.random.Generator, *, right: bool) -> Case:
    """A type on a GPU that has it, or on one that has not."""
    least = {T.FLOAT8E4M3FN: (8, 9), T.INT4: (8, 0), T.FLOAT4E2M1: (12, 0), T.INT8: (0, 0)}
    pairs = [(t, sm) for t, needed in least.items() for sm in TARGET if (sm >= needed) is right]
    dtype, capability = pairs[int(rng.integers(len(pairs)))]
    d, k = Draft(rng=rng), _size(rng)  # FP16: SM75 has no FP32 products in TensorRT for RTX
    x = d.input((8, k))
    if dtype in (T.INT8, T.FLOAT8E4M3FN) and rng.integers(2):
        x = d.pair(x, 0.02, dtype)
    return Case(model=d.model((product(d, x, k, _size(rng), dtype, per_channel=False), None)), capability=capability)


def four_bits(rng: np.random.Generator, *, odd: bool) -> Case:
    dtype = int(rng.choice([T.INT4, T.FLOAT4E2M1]))
    d, rows, columns = _draft(rng), int(rng.choice([3, 5, 9])), int(rng.choice([3, 7, 11]))
    if not odd:
        rows, columns = (rows + 1, columns) if rng.integers(2) else (rows, columns + 1)
    x = d.input((rows, columns))
    made = d.node("Add", [x, d.weight((rows, columns), dtype)]) if rng.integers(2) else d.pair(x, 0.02, dtype)
    return Case(model=d.model((made, None)), capability=NARROW[dtype])


def mixed_floats(rng: np.random.Generator) -> Case:
    d, k = Draft(rng=rng), _size(rng)
    if rng.integers(2):
        d.float_type = T.FLOAT
    other = T.FLOAT if d.float_type == T.FLOAT16 else T.FLOAT16
    x, scale, zero = d.input((8, k)), d.constant(0.02, other), d.constant(0, T.INT8)
    made = d.dequantize(d.quantize(x, d.constant(0.02), zero), scale, zero)
    if rng.integers(2):
        made = d.node(str(rng.choice(["Relu", "Sigmoid", "Identity"])), [made])
    kind = int(rng.integers(7))
    ways: dict[int, Callable[[], str]] = {
        0: lambda: d.node(str(rng.choice(["Add", "Mul", "Sub", "Div", "Max"])), [made, x]),
        1: lambda: product(d, made, k, 16),
        2: lambda: d.node("Concat", [made, x], axis=1),
        3: lambda: d.node("Where", [d.constant(np.ones((8, k)), T.BOOL), made, x]),
        4: lambda: d.node("LayerNormalization", [made, d.constant(np.ones(k)), d.constant(np.zeros(k))]),
        5: lambda: d.node("Gemm", [d.pair(x), d.weight((k, 16)), d.constant(np.ones(16), other)]),
        6: lambda: d.node("Mul", [made, d.constant(2.0)]),
    }
    return Case(model=d.model((ways[kind](), None)))


def one_float(rng: np.random.Generator) -> Case:
    """The same nodes, the scale's type right, or cast to it."""
    d, k = _draft(rng), _size(rng)
    other = T.FLOAT if d.float_type == T.FLOAT16 else T.FLOAT16
    x, zero = d.input((8, k)), d.constant(0, T.INT8)
    kind = int(rng.integers(4))
    if kind == 1 or rng.integers(2):
        made = d.pair(x)
    else:
        made = d.dequantize(d.quantize(x, d.constant(0.02), zero), d.constant(0.02, other), zero)
        made = d.node("Cast", [made], to=d.float_type)
    if kind == 0:
        made = d.node(str(rng.choice(["Add", "Mul", "Max"])), [made, x])
    elif kind == 1:
        made = product(d, made, k, 16)
    elif kind == 2:
        made = d.node("Concat", [made, x], axis=1)
    else:
        made = d.node("Pow", [made, d.constant(2.0, other)])
    return Case(model=d.model((made, None)))


def bare_constant(rng: np.random.Generator) -> Case:
    dtype = int(rng.choice([T.INT8, T.INT8, T.FLOAT8E4M3FN, T.INT4, T.FLOAT4E2M1]))
    d, k = _draft(rng), _size(rng)
    codes = d.constant(d.codes((k, k), dtype), dtype, via=str(rng.choice(VIA)))
    kind = int(rng.integers(5))
    if kind == 0:
        moved = d.node("Transpose", [codes], perm=[1, 0])
    elif kind == 1:
        moved = d.node("Reshape", [codes, d.ints(k, k)])
    elif kind == 2:
        moved = d.node("Gather", [codes, d.ints(*range(k))])
    elif kind == 3:
        moved = d.node("Identity", [codes])
    else:
        weight = d.node("Cast", [codes], to=d.float_type)
        return Case(
            model=d.model((d.node("MatMul", [d.input((8, k)), weight]), None)), capability=NARROW.get(dtype, SM80)
        )
    weight = d.dequantize(moved, d.constant(0.02))
    return Case(model=d.model((d.node("MatMul", [d.input((8, k)), weight]), None)), capability=NARROW.get(dtype, SM80))


def dressed_constant(rng: np.random.Generator) -> Case:
    """The same movements behind the DQ."""
    dtype = int(rng.choice([T.INT8, T.INT8, T.FLOAT8E4M3FN, T.INT4, T.FLOAT4E2M1]))
    d, k = _draft(rng), _size(rng)
    codes = d.constant(d.codes((k, k), dtype), dtype, via=str(rng.choice(VIA)))
    weight = d.dequantize(codes, d.constant(0.02))
    kind = int(rng.integers(4))
    if kind == 0:
        weight = d.node("Transpose", [weight], perm=[1, 0])
    elif kind == 1:
        weight = d.node("Reshape", [weight, d.ints(k, k)])
    elif kind == 2:
        weight = d.node("Gather", [weight, d.ints(*range(k))])
    return Case(model=d.model((d.node("MatMul", [d.input((8, k)), weight]), None)), capability=NARROW.get(dtype, SM80))


def two_types(rng: np.random.Generator, *, same: bool) -> Case:
    first, second = (int(t) for t in rng.choice([T.INT8, T.FLOAT8E4M3FN], 2, replace=False))
    if rng.integers(3) == 0 and not same:
        second = T.INT4
    if same:
        second = first
    d, k, n = _draft(rng), _size(rng), _size(rng)
    kind = int(rng.integers(3))
    capability = SM89 if rng.integers(2) else SM120
    if kind == 0 and second != T.INT4:
        left, right = d.pair(d.input((8, k)), 0.02, first), d.pair(d.input((k, n)), 0.02, second)
        return Case(model=d.model((d.node("MatMul", [left, right]), None)), capability=capability)
    if kind == 1 and second != T.INT4:
        value = d.pair(d.input((2, k, 8, 8)), 0.02, first)
        made = d.node("Conv", [value, d.weight((n, k, 3, 3), second)], pads=[1] * 4)
        return Case(model=d.model((made, None)), capability=capability)
    made = product(d, d.pair(d.input((8, k)), 0.02, first), k, n, second, per_channel=False)
    return Case(model=d.model((made, None)), capability=capability)


def four_bit_product(rng: np.random.Generator) -> Case:
    """Two 4-bit operands: what the builder refuses, and (one in five) what it crashes on."""
    d, k, n = _draft(rng), _size(rng), _size(rng)
    if rng.integers(5):
        dtype = int(rng.choice([T.INT4, T.FLOAT4E2M1]))
        value = d.pair(d.input((2, k, 8, 8)), 0.02, dtype)
        made = d.node("Conv", [value, d.weight((n, k, 3, 3), dtype, 0 if rng.integers(2) else None)], pads=[1] * 4)
    else:
        made = product(d, d.pair(d.input((8, k)), 0.02, T.FLOAT4E2M1), k, n, T.FLOAT4E2M1)
    return Case(model=d.model((made, None)), capability=SM120)


def four_bit_blocks(rng: np.random.Generator) -> Case:
    """FP4 in blocks of 16 on both sides, or a 4-bit weight alone."""
    d, k, n = _draft(rng), _size(rng), _size(rng)
    if rng.integers(2):
        dtype = int(rng.choice([T.INT4, T.FLOAT4E2M1]))
        return Case(model=d.model((product(d, d.input((8, k)), k, n, dtype), None)), capability=SM120)
    k = max(k, 32)
    value = d.pair(d.input((8, k)), rng.uniform(0.01, 0.02, (8, k // 16)), T.FLOAT4E2M1, axis=1, block_size=16)
    codes, scales = d.constant(d.codes((k, n), T.FLOAT4E2M1), T.FLOAT4E2M1), d.constant(np.full((k // 16, n), 0.01))
    made = d.node("MatMul", [value, d.dequantize(codes, scales, axis=0, block_size=16)])
    return Case(model=d.model((made, None)), capability=SM120)


# ---- biases, operators, opsets, blocks -----------------------------------------------------------------------------


def biased(rng: np.random.Generator, *, dtype: int | None) -> Case:
    """A product with a bias stored in ``dtype``, or in floating point."""
    d, k, n = _draft(rng), _size(rng), _size(rng)
    if dtype is None:
        bias = d.constant(rng.standard_normal(n))
    else:
        codes = d.constant(rng.integers(-100, 100, n), dtype)
        fine = bool(rng.integers(2))
        bias = d.dequantize(codes, d.constant(np.full(n, 1e-3) if fine else 1e-3), **({"axis": 0} if fine else {}))
    kind = int(rng.integers(3))
    if kind == 0:
        made = d.node("Gemm", [d.pair(d.input((8, k))), d.weight((k, n)), bias])
    elif kind == 1:
        made = d.node("Conv", [d.pair(d.input((2, k, 8, 8))), d.weight((n, k, 3, 3)), bias], pads=[1] * 4)
    else:
        made = d.node("MatMul", [d.pair(d.input((8, k))), d.weight((k, n))])
        made = d.node("Add", [made, bias] if rng.integers(2) else [bias, made])
    return Case(model=d.model((made, None)))


def integer_operator(rng: np.random.Generator) -> Case:
    d, k, n = Draft(rng=rng, float_type=T.FLOAT), _size(rng), _size(rng)
    x, s, z = d.input((8, k)), d.constant(0.02), d.constant(0, T.INT8)
    q, w = d.quantize(x, s, z), d.constant(d.codes((k, n)), T.INT8)
    image = d.input((1, k, 8, 8))
    kind = int(rng.integers(7))
    if kind == 0:
        made = d.dequantize(d.node("QLinearMatMul", [q, s, z, w, s, z, s, z]), s, z)
    elif kind == 1:
        made = d.node("Cast", [d.node("MatMulInteger", [q, w])], to=T.FLOAT)
    elif kind == 2:
        kernel = d.constant(d.codes((n, k, 3, 3)), T.INT8)
        made = d.node("Cast", [d.node("ConvInteger", [d.quantize(image, s, z), kernel])], to=T.FLOAT)
    elif kind == 3:
        kernel = d.constant(d.codes((n, k, 3, 3)), T.INT8)
        made = d.dequantize(d.node("QLinearConv", [d.quantize(image, s, z), s, z, kernel, s, z, s, z]), s, z)
    elif kind == 4:
        made = d.node("Cast", [d.node("DynamicQuantizeLinear", [x], outputs=3)], to=T.FLOAT)
    elif kind == 5:
        made = d.dequantize(d.node("QLinearAdd", [q, s, z, q, s, z, s, z], domain="com.microsoft"), s, z)
    else:
        made = d.node("MatMulIntegerToFloat", [q, w, s, s], domain="com.microsoft")
    return Case(model=d.model((made, T.FLOAT)))


def in_opset(rng: np.random.Generator, *, enough: bool) -> Case:
    """A pair whose type needs an opset, which the file has or has not."""
    kinds = [(T.INT8, True, 13, False), (T.INT8, False, 19, True), (T.FLOAT8E4M3FN, False, 19, False),
             (T.INT4, False, 21, False), (T.FLOAT4E2M1, False, 23, False)]  # fmt: skip
    dtype, fine, needed, half = kinds[int(rng.integers(len(kinds)))]
    opset = int(rng.integers(needed, 24)) if enough else int(rng.integers(10, needed))
    d, k = Draft(rng=rng, float_type=T.FLOAT16 if half else T.FLOAT, opset=opset), _size(rng)
    scale = np.full(k, 0.02) if fine else 0.02
    made = d.pair(d.input((8, k)), scale, dtype, **({"axis": 1} if fine else {}))
    # ONNX's checker wants the shape of every output.
    return Case(model=d.model((made, None), shape=(8, k)), capability=NARROW.get(dtype, SM80))


def blocked(rng: np.random.Generator, *, documented: bool) -> Case:
    """A weight in blocks, of a size that the documentation names or not."""
    if documented:
        dtype, block = ((T.INT4, 64), (T.INT4, 128), (T.FLOAT4E2M1, 16))[int(rng.integers(3))]
    else:
        choices = ((T.INT4, 16), (T.INT4, 32), (T.FLOAT4E2M1, 32), (T.INT8, 32), (T.INT8, 128), (T.FLOAT8E4M3FN, 64))
        dtype, block = choices[int(rng.integers(len(choices)))]
    d, k, n = _draft(rng), 256, _size(rng)
    codes, scales = d.constant(d.codes((k, n), dtype), dtype), d.constant(rng.uniform(0.01, 0.02, (k // block, n)))
    weight = d.dequantize(codes, scales, axis=0, block_size=block)
    return Case(model=d.model((d.node("MatMul", [d.input((8, k)), weight]), None)), capability=NARROW.get(dtype, SM80))


# ---- pairs ---------------------------------------------------------------------------------------------------------


def _moved(d: Draft, value: str, kind: int, k: int) -> str:
    if kind == 0:
        return d.node("Transpose", [value], perm=[1, 0])
    if kind == 1:
        return d.node("Reshape", [value, d.ints(k, 8)])
    if kind == 2:
        return d.node("Concat", [value, value], axis=0)
    return d.node("Identity", [value])


def narrow_dangling(rng: np.random.Generator) -> Case:
    dtype = int(rng.choice(list(NARROW)))
    d, k = _draft(rng), _size(rng)
    scale, zero = d.constant(0.02), d.constant(0, dtype)
    codes = d.quantize(d.input((8, k)), scale, zero)
    if rng.integers(2):
        codes = _moved(d, codes, int(rng.integers(4)), k)
    kind = int(rng.integers(4))
    if kind == 0:
        return Case(model=d.model((d.node("Cast", [codes], to=d.float_type), None)), capability=NARROW[dtype])
    op = ("Add", "Mul", "Max")[kind - 1]
    made = d.dequantize(d.node(op, [codes, codes]), scale, zero)
    return Case(model=d.model((made, None)), capability=NARROW[dtype])


def narrow_moved(rng: np.random.Generator) -> Case:
    dtype = int(rng.choice(list(NARROW)))
    d, k = _draft(rng), _size(rng)
    scale, zero = d.constant(0.02), d.constant(0, dtype)
    codes = _moved(d, d.quantize(d.input((8, k)), scale, zero), int(rng.integers(4)), k)
    return Case(model=d.model((d.dequantize(codes, scale, zero), None)), capability=NARROW[dtype])


def dangling(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    x, scale, zero = d.input((8, k)), d.constant(0.02), d.constant(0, T.INT8)
    codes = d.quantize(x, scale, zero)
    kind = int(rng.integers(4))
    if kind == 0:
        return Case(model=d.model((codes, T.INT8)))
    if kind == 1:
        return Case(model=d.model((d.node("Cast", [codes], to=d.float_type), None)))
    if kind == 2:
        return Case(model=d.model((d.node("Relu", [x]), None)))
    return Case(model=d.model((d.dequantize(d.node("Add", [codes, codes]), scale, zero), None)))


def undone(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    scale, kind = d.constant(0.02), int(rng.integers(3))
    if kind == 0:
        made = d.dequantize(d.input((8, k), T.INT8), scale)
    elif kind == 1:
        made = d.dequantize(d.node("Cast", [d.input((8, k))], to=T.INT8), scale)
    else:
        x = d.input((8, k))
        d.dequantize(d.quantize(x, scale, d.constant(0, T.INT8)), scale)
        made = d.node("Relu", [x])
    return Case(model=d.model((made, None)))


def mismatched(rng: np.random.Generator) -> Case:
    d, k = _draft(rng), _size(rng)
    codes = d.quantize(d.input((8, k)), d.constant(0.02), d.constant(0, T.INT8))
    if rng.integers(2):
        codes = d.node("Identity", [codes])
    made = d.dequantize(codes, d.constant(0.02 * float(rng.choice([0.5, 1.1, 2.0]))))
    return Case(model=d.model((product(d, made, k, _size(rng)), None)))


def per_channel_activation(rng: np.random.Generator) -> Case:
    d, k, axis = _draft(rng), _size(rng), int(rng.integers(2))
    made = d.pair(d.input((8, k)), rng.uniform(0.01, 0.02, (8, k)[axis]), axis=axis)
    return Case(model=d.model((product(d, made, k, _size(rng)), None)))


def _suite(rule: str, what: str, expect: str, faulty: Make, clean: Make, judge: str = "tensorrt-rtx") -> Suite:
    return Suite(rule=rule, what=what, expect=expect, faulty=faulty, clean=clean, judge=judge)  # type: ignore[arg-type]


SUITES: tuple[Suite, ...] = (
    _suite("QDQ101", "zero point not zero", "refused", shifted, sound),
    _suite("QDQ101", "FP8 zero point not zero", "silent", shifted_fp8, sound_fp8),
    _suite("QDQ102", "zero point known at run time only", "refused", runtime_zero, sound),
    _suite("QDQ103", "number of scales or zero points, axis, block shape", "refused", miscounted, counted),
    _suite("QDQ104", "scale zero, negative or NaN", "refused", bad_scale, small_scale),
    _suite("QDQ104", "infinite, or behind Identity or Cast", "silent", unseen_scale, small_scale),
    _suite("QDQ105", "type that TensorRT has not", "refused", foreign_type, known_type),
    _suite("QDQ106", "UINT8 or INT32 read as INT8", "silent", read_as_int8, written_int8),
    _suite("QDQ107", "INT32 bias", "refused", lambda r: biased(r, dtype=T.INT32), lambda r: biased(r, dtype=None)),
    _suite("QDQ107", "INT8 bias", "accepted", lambda r: biased(r, dtype=T.INT8), lambda r: biased(r, dtype=None)),
    _suite("QDQ108", "type that the GPU has not", "refused",
           lambda r: on_target(r, right=False), lambda r: on_target(r, right=True)),
    _suite("QDQ109", "odd number of 4-bit values", "refused",
           lambda r: four_bits(r, odd=True), lambda r: four_bits(r, odd=False)),
    _suite("QDQ110", "operator on integers", "refused", integer_operator, sound),
    _suite("QDQ111", "float types meet", "refused", mixed_floats, one_float),
    _suite("QDQ112", "quantized constant without DQ", "refused", bare_constant, dressed_constant),
    _suite("QDQ113", "two quantized types in one product", "refused",
           lambda r: two_types(r, same=False), lambda r: two_types(r, same=True)),
    _suite("QDQ114", "opset too low", "refused",
           lambda r: in_opset(r, enough=False), lambda r: in_opset(r, enough=True), "onnx"),
    _suite("QDQ115", "block size not documented", "accepted",
           lambda r: blocked(r, documented=False), lambda r: blocked(r, documented=True)),
    _suite("QDQ116", "scale known at run time only", "accepted", runtime_scale, sound),
    _suite("QDQ117", "FP16 scale subnormal", "accepted", subnormal_scale, small_scale),
    _suite("QDQ118", "two 4-bit operands", "refused", four_bit_product, four_bit_blocks),
    _suite("QDQ201", "FP8, INT4 or FP4 read by something else", "refused", narrow_dangling, narrow_moved),
    _suite("QDQ201", "INT8 read by something else", "accepted", dangling, sound),
    _suite("QDQ202", "DQ without a Q", "accepted", undone, sound),
    _suite("QDQ203", "DQ with another scale than its Q", "accepted", mismatched, sound),
    _suite("QDQ204", "per-channel activation", "accepted", per_channel_activation, sound),
)  # fmt: skip
