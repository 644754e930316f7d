"""What ONNX Runtime really runs in INT8, and what a node costs with its share of quantization."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.quantize.costs import node_costs, read_costs, write_costs
from tests.quantize.graphs import mlp, save
from tests.quantize.planning import plan_for, run, write


def unfusable(folder: Path) -> Path:
    """A transposed convolution, which has no integer kernel, beside a MatMul, which has."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["h"], name="upsample"),
        helper.make_node("MatMul", ["h", "m"], ["y"], name="product"),
    ]
    weights = {
        "w": rng.normal(size=(16, 16, 3, 3)).astype(np.float32),
        "m": rng.normal(size=(10, 20)).astype(np.float32),
    }
    return save(folder / "u.onnx", nodes, [("x", ["b", 16, 8, 8])], [("y", ["b", 16, 10, 20])], weights)


def test_a_node_that_does_not_fuse_is_named(tmp_path: Path) -> None:
    path = unfusable(tmp_path)
    with collecting() as notices:
        made = write(path, plan_for(path, "cpu", {"upsample", "product"}), {}, tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.unfused == ("upsample",)
    assert made.fusion.integer_kernels == {"MatMulIntegerToFloat": 1}
    assert [(n.code, n.where) for n in notices] == [("not-fused", "upsample")]
    assert "1 of 2" in notices[0].message


def test_a_matmul_that_becomes_a_gemm_of_floats_is_named_too(tmp_path: Path) -> None:
    """ONNX Runtime renames nodes when it fuses floats, which must not hide them."""
    w = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)
    nodes = [helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="gemm", beta=2.0)]
    path = save(tmp_path / "g.onnx", nodes, [("x", [4, 32])], [("y", [4, 24])], {"w": w, "c": w[0]})
    with collecting():
        made = write(path, plan_for(path, "cpu", {"gemm"}), {}, tmp_path / "q.onnx")
    assert made.fusion is not None
    fused = sum(made.fusion.integer_kernels.values())
    assert (fused, made.fusion.unfused) in ((1, ()), (0, ("gemm",)))


def test_costs_add_each_reader_s_share_of_the_quantization(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="two"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    w = np.ones((32, 32), np.float32)
    path = save(tmp_path / "w.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": w})
    plan = plan_for(path, "cpu", {"one", "two"})
    made = write(path, plan, {}, tmp_path / "q.onnx")
    [quantize] = [n.name for n in onnx.load(made.path).graph.node if n.op_type == "QuantizeLinear"]
    fp32 = {"one": 1.0, "two": 2.0, "sum": 0.1}
    int8 = {"one": 0.5, "two": 0.7, quantize: 0.2, "sum": 0.1}
    assert node_costs(made.path, plan, fp32, int8) == {
        "one": {"fp32_ms": 1.0, "int8_ms": pytest.approx(0.6)},
        "two": {"fp32_ms": 2.0, "int8_ms": pytest.approx(0.8)},
    }
    assert set(node_costs(made.path, plan, {"one": 1.0}, int8)) == {"one"}


def test_a_table_costs_its_look_up_and_the_dequantization_behind_it(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"], name="lookup")]
    table = np.ones((50, 32), np.float32)
    path = save(tmp_path / "t.onnx", nodes, [("ids", ["b"])], [("y", ["b", 32])], {"table": table})
    plan = plan_for(path, "cpu", {"lookup"})
    made = write(path, plan, {}, tmp_path / "q.onnx")
    [dequantize] = [n.name for n in onnx.load(made.path).graph.node if n.op_type == "DequantizeLinear"]
    costs = node_costs(made.path, plan, {"lookup": 1.0}, {"lookup": 0.25, dequantize: 0.5})
    assert costs == {"lookup": {"fp32_ms": 1.0, "int8_ms": 0.75}}


def test_costs_file_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    costs = {"b": {"fp32_ms": 1.0, "int8_ms": 0.5}, "a": {"fp32_ms": 2.0, "int8_ms": 3.0}}
    write_costs(path, costs, machine="m", batch=8, threads=1)
    assert read_costs(path) == costs
    assert read_costs(None) == {}
    for text in ("", "[]", '{"nodes": 3}', '{"nodes": {"a": {"fp32_ms": "x", "int8_ms": 1}}}', json.dumps({"n": {}})):
        path.write_text(text)
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            read_costs(path)
        assert caught.value.where == str(path)
    with pytest.raises(RecipeError):
        read_costs(tmp_path / "none.json")


@pytest.mark.exact_products
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_gemm_equals_the_formula(tmp_path: Path, trans: int, bias: bool) -> None:
    rng = np.random.default_rng(0)
    w, c = rng.normal(size=(32, 24)).astype(np.float32), rng.normal(size=24).astype(np.float32)
    stored = np.ascontiguousarray(w.T) if trans else w
    inputs = ["x", "w", "c"] if bias else ["x", "w"]
    node = helper.make_node("Gemm", inputs, ["y"], name="gemm", transB=trans)
    weights = {"w": stored} | ({"c": c} if bias else {})
    path = save(tmp_path / "g.onnx", [node], [("x", ["b", 32])], [("y", ["b", 24])], weights)
    made = write(path, plan_for(path, "cpu", {"gemm"}, dynamic=True), {}, tmp_path / "q.onnx")
    x = rng.normal(size=(5, 32)).astype(np.float32)
    scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    step = (x.max() - x.min()) / 255
    want = x @ (np.rint(w / scale) * scale) + (c if bias else 0)
    bound = step * 0.51 * np.abs(w).sum(axis=0).max() + 1e-4
    for optimize in (False, True):
        assert np.abs(run(made.path, {"x": x}, optimize=optimize)["y"] - want).max() < bound
    assert made.fusion is not None
    assert sum(made.fusion.integer_kernels.values()) == 1


@pytest.mark.exact_products
def test_dynamic_products_of_one_tensor_quantize_it_once(tmp_path: Path) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="two"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    path = save(tmp_path / "w.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": w})
    made = write(path, plan_for(path, "cpu", {"one", "two"}, dynamic=True), {}, tmp_path / "q.onnx")
    graph = onnx.load(made.path).graph
    assert [n.op_type for n in graph.node].count("DynamicQuantizeLinear") == 1
    assert [list(i.dims) for i in graph.initializer if len(i.dims) == 2] == [[32, 32]]
    x = np.random.default_rng(1).normal(size=(5, 32)).astype(np.float32)
    np.testing.assert_allclose(run(made.path, {"x": x}, optimize=True)["y"], 2 * (x @ w), atol=0.5)
