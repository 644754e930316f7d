"""Small graphs for the rules about speed: compiled with and without what a rule advises against."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from onnx import TensorProto as T

from tests.lint.draft import Draft
from tests.lint.suites import SM80

PLACES = ("query", "key", "scores", "masked", "probabilities", "value", "context")
"""Where a pair may stand in an attention core; ``masked`` is the Softmax's input."""
ATTENTION = [c for many in range(len(PLACES) + 1) for c in itertools.combinations(PLACES, many)]
Make = Callable[[], bytes]


def _draft() -> Draft:
    return Draft(rng=np.random.default_rng(0), opset=21)


def attention(places: tuple[str, ...], *, narrow: bool = False, float_type: int = T.FLOAT16) -> bytes:
    """Return an attention block (4 heads of 32, 2 x 64 tokens) with pairs at ``places``."""
    d = Draft(rng=np.random.default_rng(0), float_type=float_type, opset=21)
    batch, tokens, heads, width = 2, 64, 4, 32
    hidden, dtype = heads * width, T.FLOAT8E4M3FN if narrow else T.INT8
    x, mask = d.input((batch, tokens, hidden)), d.input((batch, 1, 1, tokens))
    split, joined = d.ints(batch, tokens, heads, width), d.ints(batch, tokens, hidden)

    def project(order: list[int]) -> str:
        made = d.node("MatMul", [x, d.constant(d.rng.standard_normal((hidden, hidden)) * 0.1)])
        return d.node("Transpose", [d.node("Reshape", [made, split])], perm=order)

    def at(place: str, value: str) -> str:
        return d.pair(value, 0.02, dtype) if place in places else value

    query, key, value = project([0, 2, 1, 3]), project([0, 2, 3, 1]), project([0, 2, 1, 3])
    query = d.node("Mul", [query, d.constant(width**-0.5)])
    scores = at("scores", d.node("MatMul", [at("query", query), at("key", key)]))
    masked = at("masked", d.node("Add", [scores, mask]))
    probabilities = at("probabilities", d.node("Softmax", [masked], axis=-1))
    context = at("context", d.node("MatMul", [probabilities, at("value", value)]))
    context = d.node("Reshape", [d.node("Transpose", [context], perm=[0, 2, 1, 3]), joined])
    out = d.node("MatMul", [context, d.constant(d.rng.standard_normal((hidden, hidden)))])
    return d.model((out, None))


def attention_fuses(places: tuple[str, ...], *, narrow: bool) -> bool:
    """Return whether the core is one kernel, by the rule."""
    first = {"query", "key"} <= set(places)
    second = {"probabilities", "value"} <= set(places)
    if not first and not second:
        return True
    return first and second and "scores" not in places and (narrow or "context" in places)


def convolution(*, quantize_input: bool = True, quantize_weight: bool = True, per_channel_input: bool = False) -> bytes:
    d = _draft()
    value = d.input((2, 32, 16, 16))
    if quantize_input:
        scale = np.linspace(0.01, 0.03, 32) if per_channel_input else 0.02
        value = d.pair(value, scale, **({"axis": 1} if per_channel_input else {}))
    weight = d.weight((32, 32, 3, 3)) if quantize_weight else d.constant(d.rng.standard_normal((32, 32, 3, 3)))
    return d.model((d.node("Conv", [value, weight], pads=[1] * 4), None))


def product(rows: int, summed: int, columns: int, *, quantized: bool = True, weight_quantized: bool = True) -> bytes:
    """Return Relu, product, bias, Relu."""
    d = _draft()
    value = d.node("Relu", [d.input((rows, summed))])
    if quantized:
        value = d.pair(value)
    shape = (summed, columns)
    weight = d.weight(shape) if quantized and weight_quantized else d.constant(d.rng.standard_normal(shape))
    made = d.node("Add", [d.node("MatMul", [value, weight]), d.constant(np.ones(columns))])
    return d.model((d.node("Relu", [made]), None))


def per_channel_product(axis: int | None) -> bytes:
    d = _draft()
    x = d.input((64, 64))
    value = d.pair(x) if axis is None else d.pair(x, np.linspace(0.01, 0.03, 64), axis=axis)
    return d.model((d.node("MatMul", [value, d.weight((64, 64))]), None))


def concatenated(*, shared: bool, again: bool = False, convolve: bool = True) -> bytes:
    """Return two branches that are quantized, concatenated, (quantized again and) multiplied."""
    d = _draft()
    shape = (2, 32, 16, 16) if convolve else (64, 64)
    first, second = d.pair(d.input(shape), 0.02), d.pair(d.input(shape), 0.02 if shared else 0.03)
    both = d.node("Concat", [first, second], axis=1)
    if again:
        both = d.pair(both, 0.03)
    if convolve:
        return d.model((d.node("Conv", [both, d.weight((32, 64, 3, 3))], pads=[1] * 4), None))
    return d.model((d.node("MatMul", [both, d.weight((128, 64))]), None))


def residual(*, both: bool, convolve: bool = True) -> bytes:
    """Return a residual block whose skip branch (and also whose product branch) is quantized at the Add."""
    d = _draft()
    x = d.input((2, 32, 16, 16) if convolve else (64, 64))
    skip = d.pair(x)
    if convolve:
        made = d.node("Conv", [skip, d.weight((32, 32, 3, 3))], pads=[1] * 4)
    else:
        made = d.node("MatMul", [skip, d.weight((64, 64))])
    added = d.node("Relu", [d.node("Add", [d.pair(made, 0.05) if both else made, skip])])
    last = d.pair(added, 0.04)
    if convolve:
        return d.model((d.node("Conv", [last, d.weight((32, 32, 3, 3))], pads=[1] * 4), None))
    return d.model((d.node("MatMul", [last, d.weight((64, 64))]), None))


def blocked(block: int, dtype: int = T.INT4, summed: int = 256) -> bytes:
    d = _draft()
    codes = d.constant(d.codes((summed, 128), dtype), dtype)
    weight = d.dequantize(codes, d.constant(np.full((summed // block, 128), 0.02)), axis=0, block_size=block)
    return d.model((d.node("MatMul", [d.input((16, summed)), weight]), None))


def bias(*, quantized: bool) -> bytes:
    d = _draft()
    value = d.pair(d.input((2, 32, 16, 16)))
    codes = d.rng.integers(-100, 100, 32)
    added = d.dequantize(d.constant(codes, T.INT8), d.constant(1e-2)) if quantized else d.constant(codes * 1e-2)
    return d.model((d.node("Conv", [value, d.weight((32, 32, 3, 3)), added], pads=[1] * 4), None))


INT8_CORE = ("query", "key", "probabilities", "value", "context")

MEASURED: tuple[tuple[str, str, Make, Make, tuple[int, int]], ...] = (
    ("QDQ107", "Conv with a float bias → INT8 bias", lambda: bias(quantized=False), lambda: bias(quantized=True), SM80),
    ("QDQ115", "INT4 weight in blocks of 128 → 32 (K = 256)", lambda: blocked(128), lambda: blocked(32), SM80),
    ("QDQ115", "INT4 weight in blocks of 128 → 256 = K", lambda: blocked(128), lambda: blocked(256), SM80),
    ("QDQ115", "INT4 in blocks of 64 → INT8 in blocks of 64", lambda: blocked(64), lambda: blocked(64, T.INT8), SM80),
    ("QDQ204", "Conv, one activation scale → one per channel", convolution,
     lambda: convolution(per_channel_input=True), SM80),
    ("QDQ204", "MatMul, one activation scale → one per row", lambda: per_channel_product(None),
     lambda: per_channel_product(0), SM80),
    ("QDQ204", "MatMul, one activation scale → one per summed element", lambda: per_channel_product(None),
     lambda: per_channel_product(1), SM80),
    ("QDQ205", "Concat, shared → different scales, into Conv", lambda: concatenated(shared=True),
     lambda: concatenated(shared=False), SM80),
    ("QDQ205", "Concat, shared → different scales, into MatMul", lambda: concatenated(shared=True, convolve=False),
     lambda: concatenated(shared=False, convolve=False), SM80),
    ("QDQ205", "the same, quantized again behind the Concat (no finding)",
     lambda: concatenated(shared=True, again=True), lambda: concatenated(shared=False, again=True), SM80),
    ("QDQ206", "Add after Conv, one branch quantized → both", lambda: residual(both=False),
     lambda: residual(both=True), SM80),
    ("QDQ206", "Add after MatMul, one branch quantized → both", lambda: residual(both=False, convolve=False),
     lambda: residual(both=True, convolve=False), SM80),
    ("QDQ207", "1 x 512 times 512 x 512, FP16 → INT8", lambda: product(1, 512, 512, quantized=False),
     lambda: product(1, 512, 512), SM80),
    ("QDQ207", "1024 x 512 times 512 x 1, FP16 → INT8", lambda: product(1024, 512, 1, quantized=False),
     lambda: product(1024, 512, 1), SM80),
    ("QDQ208", "K = 8: 1024 x 8 times 8 x 512, FP16 → INT8", lambda: product(1024, 8, 512, quantized=False),
     lambda: product(1024, 8, 512), SM80),
    ("QDQ208", "N = 8: 1024 x 512 times 512 x 8, FP16 → INT8", lambda: product(1024, 512, 8, quantized=False),
     lambda: product(1024, 512, 8), SM80),
    ("QDQ208", "no finding: 1024 x 512 times 512 x 128, FP16 → INT8",
     lambda: product(1024, 512, 128, quantized=False), lambda: product(1024, 512, 128), SM80),
    ("QDQ209", "FP16 core → only query and key quantized", lambda: attention(()),
     lambda: attention(("query", "key")), SM80),
    ("QDQ209", "FP16 core → both products in INT8, output not", lambda: attention(()),
     lambda: attention(INT8_CORE[:4]), SM80),
    ("QDQ209", "FP16 core → only the query quantized", lambda: attention(()), lambda: attention(("query",)), SM80),
    ("QDQ209", "FP16 core → both products and the output in INT8 (no finding)", lambda: attention(()),
     lambda: attention(INT8_CORE), SM80),
    ("QDQ210", "Conv, input and weight quantized → weight only", convolution,
     lambda: convolution(quantize_input=False), SM80),
    ("QDQ210", "Conv, input and weight quantized → input only", convolution,
     lambda: convolution(quantize_weight=False), SM80),
    ("QDQ210", "MatMul 64 x 256 times 256 x 256, both → activation only", lambda: product(64, 256, 256),
     lambda: product(64, 256, 256, weight_quantized=False), SM80),
)  # fmt: skip
"""(rule, what, as advised, as advised against, GPU)."""
