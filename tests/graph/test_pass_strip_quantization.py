"""Quantized models: refused by default with count, node and fix; stripped on request, weights as numpy dequantizes them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from canonical_models import assert_same, canonical, ops, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError
from pipeline.graph.passes.strip_quantization import dequantize

QDQ = """g (float[N, 4] x) => (float[N, 3] y) <float s = {0.05}, int8 z = {0}> {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis = 1>(wq, ws, wz)
    y = MatMul(d, w)
}"""


def quantized() -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(4)
    weight = rng.integers(-128, 128, (4, 3)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, 3).astype(np.float32)
    zero = np.array([3, 0, -5], np.int8)
    model = parse(QDQ)
    for name, array in {"wq": weight, "ws": scale, "wz": zero}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model, (weight.astype(np.float32) - zero) * scale


def test_a_quantized_model_is_refused_by_name() -> None:
    model, _ = quantized()
    model.graph.node[0].name = "first"
    with pytest.raises(ModelError, match="3 Q/DQ nodes") as error:
        canonical(model)
    assert "first" in error.value.where
    assert "strip_quantization" in error.value.fix


@pytest.mark.parametrize("op", ["MatMulInteger(q, wq)", "ConvInteger(q, wq)"])
def test_integer_arithmetic_is_refused_even_when_stripping(op: str) -> None:
    model = parse(f"g (int8[2, 4] q, int8[4, 3] wq) => (int32[2, 3] y) {{ y = {op} }}")
    for strip in (False, True):
        with pytest.raises(ModelError):
            canonical(model, strip_quantization=strip)


def test_stripping_leaves_the_float_model() -> None:
    model, weight = quantized()
    stripped = canonical(model, strip_quantization=True)
    assert ops(stripped) == {"MatMul": 1}
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    plain = parse("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }")
    plain.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    assert_same(plain, stripped, {"x": x})


def test_a_pair_around_operators_that_move_values_is_stripped() -> None:
    body = """g (float[2, 4, 4] x) => (float[4, 2, 2] y) <float s = {0.05}, int8 z = {0}, int64[3] shape = {2, 4, 4}> {
        q = QuantizeLinear(x, s, z)
        p = MaxPool<kernel_shape = [2], strides = [2]>(q)
        t = Transpose<perm = [1, 0, 2]>(p)
        d = DequantizeLinear(t, s, z)
        y = Relu(d)
    }"""
    stripped = canonical(parse(body), strip_quantization=True)
    assert ops(stripped) == {"MaxPool": 1, "Transpose": 1, "Relu": 1}


def test_fake_quantized_weights_return_to_what_they_were() -> None:
    model = parse(
        """g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.03}, float s = {0.05}, int8 z = {0}> {
            q = QuantizeLinear(w, s, z)
            d = DequantizeLinear(q, s, z)
            y = MatMul(x, d)
        }"""
    )
    stripped = canonical(model, strip_quantization=True)
    weight = stripped.graph[0].inputs[1].const_value.numpy()
    np.testing.assert_array_equal(weight, np.array([[1, 2], [3, 4.03]], np.float32))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    blocks=st.integers(1, 4),
    block=st.integers(1, 5),
    axis=st.integers(0, 1),
    kind=st.sampled_from(["tensor", "axis", "block"]),
    seed=st.integers(0, 2**16),
)
def test_dequantize_is_the_reference_operator(
    rows: int, blocks: int, block: int, axis: int, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = [rows, rows]
    shape[axis] = blocks * block
    quantized_values = rng.integers(-128, 128, shape).astype(np.int8)
    scales = {"tensor": (), "axis": (shape[axis],), "block": tuple(blocks if i == axis else rows for i in (0, 1))}[kind]
    scale = np.asarray(rng.uniform(0.01, 1, scales)).astype(np.float32)
    zero = np.asarray(rng.integers(-5, 5, scales)).astype(np.int8)
    node = onnx.helper.make_node(
        "DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis, **({"block_size": block} if kind == "block" else {})
    )
    from onnx.reference import ReferenceEvaluator

    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info(n, t, None) for n, t in (("q", 3), ("s", 1), ("z", 3))],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    wanted = ReferenceEvaluator(model).run(None, {"q": quantized_values, "s": scale, "z": zero})[0]
    ours = dequantize(quantized_values, scale, zero, axis=axis, block_size=block if kind == "block" else 0)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)
