"""Random small networks of matrix products, convolutions and what stands between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

BATCH = 4
Shape = tuple[int, ...]
"""Without the batch axis."""


@dataclass(kw_only=True)
class Builder:
    """A graph under construction; every value's first axis is the batch."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    values: list[tuple[str, Shape]] = field(default_factory=list)

    def weight(self, *shape: int, fan_in: int = 1) -> str:
        name = f"w{len(self.constants)}"
        self.constants[name] = (self.rng.normal(size=shape) / math.sqrt(fan_in)).astype(np.float32)
        return name

    def integers(self, *values: int) -> str:
        name = f"i{len(self.constants)}"
        self.constants[name] = np.array(values, np.int64)
        return name

    def add(self, op_type: str, inputs: list[str], shape: Shape, **attributes: Any) -> None:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"{op_type}-{len(self.nodes)}", **attributes))
        self.values.append((name, shape))

    def model(self, shape: Shape, outputs: list[tuple[str, Shape]]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *s]) for n, s in outputs],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(proto, full_check=True)
        return proto


@st.composite
def graphs(draw: st.DrawFn, *, most_nodes: int = 7) -> tuple[onnx.ModelProto, np.ndarray]:
    """Return a model of input ``x`` and a batch for it."""
    builder = Builder(rng=np.random.default_rng(draw(st.integers(0, 2**16))))
    shape = draw(st.sampled_from([(16,), (24,), (4, 16), (16, 5, 6), (17, 4, 4), (16, 9), (3, 8, 8)]))
    builder.values.append(("x", shape))
    for _ in range(draw(st.integers(1, most_nodes))):
        _step(builder, draw)
    read = {name for node in builder.nodes for name in node.input}
    ends = [(n, s) for n, s in builder.values[1:] if n not in read]
    extra = draw(st.sampled_from([*builder.values[1:], None]))  # an inner value that is an output as well
    if extra is not None and extra not in ends:
        ends.append(extra)
    x = builder.rng.normal(size=(BATCH, *shape)).astype(np.float32) * draw(st.sampled_from([0.3, 1.0, 50.0]))
    return builder.model(shape, ends), x


def _step(builder: Builder, draw: st.DrawFn) -> None:
    name, shape = draw(st.sampled_from(builder.values[-3:]))
    rank = len(shape)
    steps = [_relu, _scale_and_shift, _join, _residual, _reorder]
    if rank <= 2:
        steps += [_matmul, _matmul]
    if rank == 1:
        steps += [_gemm, _gemm, _split_heads]
    if rank == 2:
        steps += [_attention]
    if rank >= 2:
        steps += [_convolution, _convolution, _transposed, _flatten]
    if rank == 3:
        steps += [_pool]
    draw(st.sampled_from(steps))(builder, draw, name, shape)


def _matmul(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    n = draw(st.sampled_from([1, 5, 16, 32]))
    b.add("MatMul", [name, b.weight(shape[-1], n, fan_in=shape[-1])], (*shape[:-1], n))


def _gemm(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    n, k = draw(st.sampled_from([3, 16, 40])), shape[-1]
    flipped = draw(st.booleans())
    inputs = [name, b.weight(*((n, k) if flipped else (k, n)), fan_in=k)]
    bias = draw(st.sampled_from([None, (n,), (1, n), (1,), ()]))
    if bias is not None:
        inputs.append(b.weight(*bias))
    b.add("Gemm", inputs, (n,), transB=int(flipped), alpha=draw(st.sampled_from([1.0, 0.5])))


def _convolution(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    """Convolution over one or two axes, plain, grouped or depthwise, with or without a bias."""
    channels, space = shape[0], shape[1:]
    group = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = group * draw(st.sampled_from([1, 2])) if group > 1 else draw(st.sampled_from([7, 16, 20]))
    kernel = draw(st.sampled_from([1, 3]))
    inputs = [name, b.weight(out, channels // group, *[kernel] * len(space), fan_in=channels // group * kernel)]
    if draw(st.booleans()):
        inputs.append(b.weight(out))
    padding = draw(st.sampled_from([{"auto_pad": "SAME_UPPER"}, {"pads": [kernel // 2] * 2 * len(space)}]))
    b.add("Conv", inputs, (out, *space), group=group, kernel_shape=[kernel] * len(space), **padding)


def _transposed(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    channels, space = shape[0], shape[1:]
    group = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    out = 4 * group
    inputs = [name, b.weight(channels, out // group, *[2] * len(space), fan_in=channels)]
    b.add("ConvTranspose", inputs, (out, *(2 * s for s in space)), group=group, strides=[2] * len(space))


def _relu(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    b.add(draw(st.sampled_from(["Relu", "Tanh", "Identity", "Gelu"])), [name], shape)


def _scale_and_shift(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    b.add(draw(st.sampled_from(["Add", "Mul"])), [name, b.weight(*shape[-1:])], shape)


def _residual(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    other = draw(st.sampled_from([n for n, s in b.values if s == shape]))
    b.add("Add", [name, other], shape)


def _join(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    other, more = draw(st.sampled_from([(n, s) for n, s in b.values if s[1:] == shape[1:]]))
    b.add("Concat", [name, other], (shape[0] + more[0], *shape[1:]), axis=1)


def _split_heads(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    parts = draw(st.sampled_from([p for p in (1, 2, 4) if shape[0] % p == 0]))
    b.add("Reshape", [name, b.integers(0, parts, shape[0] // parts)], (parts, shape[0] // parts))


def _flatten(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    b.add("Reshape", [name, b.integers(0, -1)], (math.prod(shape),))


def _reorder(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    order = draw(st.permutations(range(len(shape))))
    b.add("Transpose", [name], tuple(shape[i] for i in order), perm=[0, *(i + 1 for i in order)])


def _attention(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    """Scores of a value with itself, and their softmax times it; normalized, as a steep softmax magnifies any error."""
    b.add("LayerNormalization", [name, b.weight(shape[1])], shape, axis=-1)
    name = b.values[-1][0]
    b.add("Transpose", [name], (shape[1], shape[0]), perm=[0, 2, 1])
    b.add("MatMul", [name, b.values[-1][0]], (shape[0], shape[0]))
    if draw(st.booleans()):
        b.constants.setdefault("quarter", np.array(0.25, np.float32))
        b.add("Mul", [b.values[-1][0], "quarter"], (shape[0], shape[0]))
        b.add("Softmax", [b.values[-1][0]], (shape[0], shape[0]), axis=-1)
        b.add("MatMul", [b.values[-1][0], name], shape)


def _pool(b: Builder, draw: st.DrawFn, name: str, shape: Shape) -> None:
    pool = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    b.add(pool, [name], shape, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
