"""Weights in blocks as ONNX Runtime multiplies them on a CPU (MatMulNBits), and INT8 weights alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.build import BuildOptions, build
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.sizes import expected_bytes
from pipeline.recipe import parse
from tests.quantize.graphs import save
from tests.quantize.test_quantize_int4 import attributes, by_blocks, decibel, recipe, three


def unpacked(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray:
    """What a MatMulNBits multiplies, ``[summed, outputs]``, by the operator's documentation."""
    form = attributes(node)
    packed, scales = stored[node.input[1]], stored[node.input[2]]
    codes = (
        packed if form["bits"] == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    )
    assert codes.shape == (form["N"], form["K"] // form["block_size"], form["block_size"])
    values = (codes.astype(np.float64) - 2 ** (form["bits"] - 1)) * scales.reshape(form["N"], -1, 1)
    return values.reshape(form["N"], form["K"]).T


@pytest.mark.parametrize("block", [32, 64, 128])
def test_on_a_cpu_blocks_are_what_onnx_runtime_multiplies_as_they_are_stored(tmp_path: Path, block: int) -> None:
    path, weights = three(tmp_path / "m.onnx")
    build(parse(recipe(path, block_size=block)), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    model = onnx.load(variant)
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    products = {n.name: n for n in model.graph.node if n.op_type == "MatMulNBits"}
    assert set(products) == {"up", "down"}  # K = 100 of the last one cannot be divided into blocks
    assert not any(n.op_type == "DequantizeLinear" for n in model.graph.node)
    assert stored["w1_quantized"].shape == (256, 128 // block, block // 2)
    np.testing.assert_allclose(
        unpacked(products["up"], stored), by_blocks(weights["w1"], block, signed=True), rtol=1e-5
    )
    np.testing.assert_allclose(
        unpacked(products["down"], stored), by_blocks(weights["w2"].T, block, signed=True), rtol=1e-5
    )
    assert products["down"].input[5] == "b2"
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    hidden = np.maximum(x @ by_blocks(weights["w1"], block, signed=True), 0)
    expected = (hidden @ by_blocks(weights["w2"].T, block, signed=True) + weights["b2"]) @ weights["w3"]
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": x})["y"]
    assert decibel(got, expected) > 38  # each row of an activation is INT8 in the kernel


@pytest.mark.parametrize("preset", ["int4", "w8a16"])
def test_blocks_of_zeros_give_zeros(tmp_path: Path, preset: str) -> None:
    """The kernel subtracts its offset's share of the inputs' sum, which leaves rounding errors times the block's scale."""
    weight = np.zeros((256, 64), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    path = save(tmp_path / "m.onnx", [node], [("x", ["b", 256])], [("y", ["b", 64])], {"w": weight})
    rules = [{"op_type": "MatMul", "precision": preset}]
    build(parse(recipe(path, rules=rules)), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    assert [n.op_type for n in onnx.load(variant).graph.node] == ["MatMulNBits"]
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": np.random.default_rng(1).normal(size=(9, 256)).astype(np.float32)})["y"]
    assert np.abs(got).max() < 1e-7


@pytest.mark.parametrize(
    ("shape", "beta", "own"), [((100,), 1.0, True), ((100,), 0.5, False), ((1, 100), 1.0, False), ((1,), 1.0, False)]
)
def test_any_bias_of_a_gemm_is_added(tmp_path: Path, shape: tuple[int, ...], beta: float, own: bool) -> None:
    draw = np.random.default_rng(5)
    weights = {
        "w": draw.normal(size=(128, 100)).astype(np.float32),
        "b": 9 * draw.normal(size=shape).astype(np.float32),
    }
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="only", beta=beta)
    path = save(tmp_path / "m.onnx", [node], [("x", [4, 128])], [("y", [4, 100])], weights)
    build(parse(recipe(path)), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    kinds = [n.op_type for n in onnx.load(variant).graph.node]
    assert kinds == (["MatMulNBits"] if own else ["MatMulNBits", "Add"])
    x = draw.normal(size=(4, 128)).astype(np.float32)
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": x})["y"]
    assert decibel(got, x @ by_blocks(weights["w"], 128, signed=True) + beta * weights["b"]) > 38


@pytest.mark.parametrize("target", ["cpu", "a100", "t4"])
def test_int8_weights_alone_are_nearly_lossless_and_need_no_data(tmp_path: Path, target: str) -> None:
    path, weights = three(tmp_path / "m.onnx")
    rules = [{"op_type": kind, "precision": "int8-weights"} for kind in ("MatMul", "Gemm")]
    values = {"source": {"onnx": str(path)}, "policy": {"preset": "int8wo", "rules": rules}, "targets": [target]}
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    family_ = "cpu" if target == "cpu" else "gpu-w8a16"
    variant = tmp_path / f"b/variants/{family_}/model.onnx"
    model = onnx.load(variant)
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    if target == "cpu":
        products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
        assert [attributes(n)["bits"] for n in products] == [8, 8]
        assert np.abs(unpacked(products[0], stored) - weights["w1"]).max() < np.abs(weights["w1"]).max() / 127
    else:
        assert [n.op_type for n in model.graph.node].count("DequantizeLinear") == 3
        assert not any(n.op_type == "QuantizeLinear" for n in model.graph.node)
        assert stored["w1_quantized"].dtype == np.int8
        assert stored["w1_scale"].shape == (256,)
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    expected = (np.maximum(x @ weights["w1"], 0) @ weights["w2"].T + weights["b2"]) @ weights["w3"]
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": x})["y"]
    assert decibel(got, expected) > 37
    made = PrecisionPlan.from_json((variant.parent / "precision_plan.json").read_text())
    if target == "cpu":
        small = sum(len(i.raw_data) for i in model.graph.initializer)
        assert expected_bytes(models.load(path), made) == small


def test_layers_in_blocks_are_compared_and_switched(tmp_path: Path) -> None:
    path, _ = three(tmp_path / "m.onnx")
    x = np.random.default_rng(6).normal(size=(64, 128)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    values = recipe(path) | {"calibration": {"data": str(tmp_path / "data.npz")}}
    values |= {"validate": {"data": str(tmp_path / "data.npz"), "per_layer": True}}
    result = build(parse(values), tmp_path / "b")
    assert result.report is not None
    layers = result.report["validation"]["cpu"]["layers"]
    assert {layer["node"] for layer in layers} >= {"up", "down"}


def test_a_table_that_is_looked_up_and_multiplied_is_stored_for_both(tmp_path: Path) -> None:
    """A language model's tied weights: the embedding in INT8, the same matrix in a product in INT4 blocks."""
    draw = np.random.default_rng(7)
    weights = {"e": draw.normal(size=(200, 64)).astype(np.float32), "one": np.float32([1.0])}
    nodes = [
        helper.make_node("Gather", ["e", "ids"], ["h"], name="embedding"),
        helper.make_node("Mul", ["h", "one"], ["s"], name="scaled"),
        helper.make_node("Gemm", ["s", "e"], ["y"], name="head", transB=1),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("ids", ["b"])], [("y", ["b", 200])], weights)
    rules = [{"op_type": "Gather", "precision": "int8"}, {"op_type": "Gemm", "precision": "int4"}]
    values = {"source": {"onnx": str(path)}, "policy": {"preset": "int4", "rules": rules}, "targets": ["cpu"]}
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    assert [n.op_type for n in onnx.load(variant).graph.node].count("MatMulNBits") == 1
    ids = np.arange(200)
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"ids": ids})["y"]
    expected = weights["e"] @ by_blocks(weights["e"].T, 64, signed=True)
    assert decibel(got, expected) > 35
