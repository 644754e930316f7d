"""Stored weights, biases and tables against formulas written out in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pipeline.quantize.weights.weight import round_to_nearest, stored_scale
from pipeline.running.session import session
from pipeline.types import QuantDType, QuantSpec
from tests.quantize.graphs import fake_quantize, save
from tests.quantize.planning import plan_for, run, write

INT8 = QuantSpec(dtype=QuantDType.INT8)


def value(array: np.ndarray) -> ir.Value:
    made = ir.Value(name="w", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    made.const_value = ir.tensor(array)
    return made


@given(exponent=st.integers(-40, 10), seed=st.integers(0, 99), half=st.booleans(), axis=st.sampled_from([0, 1, None]))
@settings(max_examples=60, deadline=None)
def test_weights_are_off_by_half_a_step_of_the_stored_scale(exponent: int, seed: int, half: bool, axis) -> None:
    w = (np.random.default_rng(seed).normal(size=(7, 5)) * 2.0**exponent).astype(np.float32)
    made = round_to_nearest(value(w), INT8, axis=axis, scale_dtype=np.float16 if half else np.float32)
    q, scale = made.tensor.numpy().astype(np.float64), made.scale.astype(np.float64)
    if half:
        np.testing.assert_array_equal(made.scale.astype(np.float16), made.scale)
    assert q.dtype == np.float64
    assert np.abs(q).max() <= 127
    step = scale if axis is None else np.expand_dims(scale, 1 - axis)
    assert np.all(step > 0)
    assert np.all(np.abs(q * step - w) <= step * 0.501 + 1e-45)
    if exponent >= -4:  # far from FP16's subnormals the step is the textbook's
        amax = np.abs(w).max() if axis is None else np.abs(w).max(axis=1 - axis, keepdims=True)
        np.testing.assert_allclose(step, np.broadcast_to(amax / 127, step.shape), rtol=1e-3 if half else 1e-6)


@given(st.floats(2.0**-40, 2.0**23, width=32))
def test_a_stored_fp16_scale_is_finite_positive_and_does_not_clip(scale: float) -> None:
    got = stored_scale(np.array(scale, np.float32), np.float16)
    assert np.float16(got) == got
    assert 0 < got < np.inf
    assert got * 127.5 >= min(scale, 65504.0) * 127 * (1 - 1e-6)


def test_source_weights_are_not_changed() -> None:
    w = np.ones((3, 4), np.float32)
    round_to_nearest(value(w), INT8, axis=1, scale_dtype=np.float32).tensor.numpy()
    np.testing.assert_array_equal(w, np.ones((3, 4)))


def gemm(path: Path, bias: np.ndarray | None, *, trans: bool = False, w: np.ndarray | None = None, **attributes):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(24, 32) if trans else (32, 24)).astype(np.float32) if w is None else w
    inputs = ["x", "w"] + ([] if bias is None else ["c"])
    node = helper.make_node("Gemm", inputs, ["y"], name="gemm", transB=int(trans), **attributes)
    weights = {"w": w} | ({} if bias is None else {"c": bias.astype(np.float32)})
    return save(path, [node], [("x", [6, 32])], [("y", [6, 24])], weights), w


@pytest.mark.exact_products
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize(
    ("shape", "beta", "stored_int32"),
    [
        ((24,), 1.0, True),
        ((), 1.0, False),
        ((1,), 1.0, False),
        ((6, 1), 1.0, False),
        ((6, 24), 1.0, False),
        ((24,), 2.0, False),
        (None, 1.0, False),
    ],
)
def test_gemm_equals_the_formula_for_every_shape_of_bias(tmp_path: Path, trans, shape, beta, stored_int32) -> None:
    bias = None if shape is None else np.random.default_rng(1).normal(size=shape)
    path, w = gemm(tmp_path / "g.onnx", bias, trans=trans, beta=beta)
    made = write(path, plan_for(path, "cpu", {"gemm"}), {"x": (-3, 3)}, tmp_path / "q.onnx")
    types = {i.data_type for i in onnx.load(made.path).graph.initializer}
    assert (onnx.TensorProto.INT32 in types) is stored_int32
    x = np.random.default_rng(5).normal(size=(6, 32)).astype(np.float32)
    columns = w.T if trans else w
    scale = (np.abs(columns).max(axis=0) / 127).astype(np.float32)
    product = fake_quantize(x, -3, 3, symmetric=False) @ (np.rint(columns / scale) * scale.astype(np.float64))
    want = product + (0 if bias is None else beta * bias.astype(np.float32))
    # A bias is rounded to a step of the integer accumulator.
    step = scale * np.float32(6 / 255) if stored_int32 else 0.0
    assert np.all(np.abs(run(made.path, {"x": x})["y"] - want) <= 0.5 * step + 2e-5)
    np.testing.assert_allclose(run(made.path, {"x": x}, optimize=True)["y"], want, atol=0.05)


def test_a_channel_of_zeros_keeps_its_bias_and_a_large_bias_does_not_overflow(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)
    w[:, 0] = 0.0
    w[:, 1] = 1e-9
    bias = np.random.default_rng(1).normal(size=24)
    bias[:2] = 0.0123, 5.0
    path, _ = gemm(tmp_path / "g.onnx", bias, w=w)
    made = write(path, plan_for(path, "cpu", {"gemm"}), {"x": (-3, 3)}, tmp_path / "q.onnx")
    x = {"x": np.random.default_rng(5).normal(size=(6, 32)).astype(np.float32)}
    for optimize in (False, True):
        got = run(made.path, x, optimize=optimize)["y"][:, :2]
        np.testing.assert_allclose(got, np.broadcast_to(bias[:2], (6, 2)), rtol=1e-4)


@pytest.mark.exact_products
@pytest.mark.parametrize(
    ("op", "group", "shape"),
    [
        ("Conv", 1, (8, 16, 3, 3)),
        ("Conv", 4, (8, 4, 3, 3)),
        ("Conv", 16, (16, 1, 3, 3)),
        ("ConvTranspose", 1, (16, 8, 3, 3)),
        ("ConvTranspose", 2, (16, 4, 3, 3)),
    ],
)
@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_convolutions_have_one_scale_per_output_channel_where_that_is_exact(
    tmp_path: Path, op, group, shape, family
) -> None:
    rng = np.random.default_rng(0)
    channels = shape[0] if op == "Conv" else shape[1] * group
    weights = {"w": rng.normal(size=shape).astype(np.float32), "c": rng.normal(size=channels).astype(np.float32)}
    node = helper.make_node(op, ["x", "w", "c"], ["y"], name="node", group=group)
    size = 6 if op == "Conv" else 10
    path = save(tmp_path / "c.onnx", [node], [("x", ["b", 16, 8, 8])], [("y", ["b", channels, size, size])], weights)
    made = write(path, plan_for(path, family, {"node"}), {"x": (-4, 4), "y": (-60, 60)}, tmp_path / "q.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(made.path).graph.initializer}
    axis = 0 if op == "Conv" else 1
    others = tuple(i for i in range(4) if i != axis) if group == 1 or op == "Conv" else None
    want = np.abs(weights["w"]).max(axis=others) / 127
    np.testing.assert_allclose(stored["w_scale"], want, rtol=1e-6 if family == "cpu" else 1e-3)
    x = {"x": rng.normal(size=(2, 16, 8, 8)).astype(np.float32)}
    reference = run(path, x)["y"]
    for optimize in (False, True):
        got = run(made.path, x, optimize=optimize)["y"]
        assert np.abs(got - reference).max() / np.abs(reference).max() < 0.05


def embedding(path: Path, ids: list[int | str]) -> tuple[Path, np.ndarray]:
    table = (np.random.default_rng(0).normal(size=(50, 32)) * np.geomspace(0.01, 10, 32)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="lookup"),
        helper.make_node("MatMul", ["e", "w"], ["y"], name="project"),
    ]
    return save(path, nodes, [("ids", ids)], [("e", [*ids, 32]), ("y", [*ids, 16])], {"table": table, "w": w}), table


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
@pytest.mark.parametrize("ids", [["b", "t"], ["b"], []])
def test_a_table_is_int8_with_a_scale_for_each_hidden_channel(tmp_path: Path, family: str, ids) -> None:
    path, table = embedding(tmp_path / "e.onnx", ids)
    made = write(path, plan_for(path, family, {"lookup"}), {}, tmp_path / "q.onnx")
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(made.path).graph.initializer}
    assert [(k, v.dtype) for k, v in stored.items() if v.shape == table.shape] == [("table_quantized", np.int8)]
    dtype = np.float32 if family == "cpu" else np.float16
    assert stored["table_scale"].dtype == dtype
    scale = (np.abs(table).max(axis=0) / np.float32(127)).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(stored["table_scale"], scale.astype(dtype))
    index = np.random.default_rng(2).integers(0, 50, size=[3 if isinstance(d, str) else d for d in ids])
    want = (np.clip(np.rint(table / scale), -127, 127) * scale)[index]
    for optimize in (False, True):
        got = run(made.path, {"ids": index}, optimize=optimize)
        assert got["e"].dtype == np.float32
        np.testing.assert_allclose(got["e"], want, rtol=1e-6 if family == "cpu" else 1e-3)
        assert got["e"].shape == (*index.shape, 32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnxruntime_looks_up_int8_and_dequantizes_only_the_rows(tmp_path: Path, dynamic: bool) -> None:
    path, table = embedding(tmp_path / "e.onnx", ["b", "t"])
    made = write(path, plan_for(path, "cpu", {"lookup", "project"}, dynamic=dynamic), {}, tmp_path / "q.onnx")
    assert made.bytes < table.size + 8000
    session(made.path, save_optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    types = {i.name: i.data_type for i in graph.initializer}
    [gather] = [n for n in graph.node if n.op_type == "Gather"]
    assert types[gather.input[0]] == onnx.TensorProto.INT8
    assert {n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"} == set(gather.output)
    assert not [i for i in graph.initializer if list(i.dims) == [50, 32] and i.data_type == onnx.TensorProto.FLOAT]
    assert made.fusion is not None
    assert made.fusion.unfused == ()


def test_tables_that_are_looked_up_twice_are_stored_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"], name="one"),
        helper.make_node("Gather", ["table", "ids2"], ["b"], name="two"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    table = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    path = save(tmp_path / "t.onnx", nodes, [("ids", ["b"]), ("ids2", ["b"])], [("y", ["b", 32])], {"table": table})
    made = write(path, plan_for(path, "cpu", {"one", "two"}), {}, tmp_path / "q.onnx")
    assert [list(i.dims) for i in onnx.load(made.path).graph.initializer if i.data_type == onnx.TensorProto.INT8] == [
        [50, 32]
    ]
    ids = {"ids": np.array([3, 4]), "ids2": np.array([5, 3])}
    np.testing.assert_allclose(run(made.path, ids)["y"], run(path, ids)["y"], atol=0.05)


@pytest.mark.exact_products
@pytest.mark.parametrize("quantized", [{"lookup", "head"}, {"lookup"}, {"head"}])
@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_tied_embeddings_are_quantized_apart(tmp_path: Path, family: str, quantized: set[str]) -> None:
    """The table is read by rows as an embedding and by columns as the head's weight: two axes, two scales."""
    table = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="lookup"),
        helper.make_node("Gemm", ["e", "table"], ["y"], transB=1, name="head"),
    ]
    path = save(tmp_path / "t.onnx", nodes, [("ids", ["b"])], [("y", ["b", 40])], {"table": table})
    made = write(path, plan_for(path, family, quantized), {}, tmp_path / "q.onnx")
    ids = {"ids": np.arange(0, 40, 3)}
    reference = run(path, ids)["y"]
    for optimize in (False, True):
        got = run(made.path, ids, optimize=optimize)["y"]
        assert np.abs(got - reference).max() / np.abs(reference).max() < 0.05
