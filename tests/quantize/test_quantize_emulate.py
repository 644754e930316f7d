"""BF16 and FP4: what is stored and typed, and that the emulated copy computes what a GPU's types would."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.compile_check import available, compile_check
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import BuildOptions, build, extract
from pipeline.errors import PipelineError, PolicyError
from pipeline.quantize.emulate import emulate
from pipeline.quantize.weights.weight import stored_scale
from pipeline.recipe import parse
from pipeline.types import BFLOAT16
from tests.quantize.graphs import save

needs_rtx = pytest.mark.skipif(not available(), reason="needs pip install '.[rtx]'")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def layers(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """x [b, 64] -> MatMul + bias -> Relu -> MatMul -> y [b, 32]."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(size=(64, 128)).astype(np.float32),
        "b1": draw.normal(size=128).astype(np.float32),
        "w2": draw.normal(size=(128, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="up"),
        helper.make_node("Add", ["m", "b1"], ["h"], name="bias"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="down"),
    ]
    return save(path, nodes, [("x", ["b", 64])], [("y", ["b", 32])], weights), weights


def made(
    tmp_path: Path, target: str, until: str = "quantize", per_layer: bool = False, **policy: object
) -> tuple[Path, dict[str, np.ndarray]]:
    path, weights = layers(tmp_path / "m.onnx")
    draw = np.random.default_rng(1)
    np.savez(tmp_path / "calibration.npz", x=draw.normal(size=(40, 64)).astype(np.float32))
    np.savez(tmp_path / "heldout.npz", x=draw.normal(size=(16, 64)).astype(np.float32))
    recipe = {
        "source": {"onnx": str(path)},
        "policy": policy,
        "targets": [target],
        "calibration": {"data": str(tmp_path / "calibration.npz")},
        "validate": {"data": str(tmp_path / "heldout.npz"), "latency": False, "per_layer": per_layer},
    }
    build(parse(recipe), tmp_path / "b", options=BuildOptions(until=until))
    (variant,) = (tmp_path / "b/variants").glob("*/model.onnx")
    return variant, weights


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_bf16_rounds_every_tensor_and_sums_in_fp32(tmp_path: Path) -> None:
    variant, w = made(tmp_path, "a100", preset="bf16")
    graph = onnx.load(variant).graph
    assert {i.data_type for i in graph.initializer} == {TensorProto.BFLOAT16}
    assert [i.type.tensor_type.elem_type for i in (*graph.input, *graph.output)] == [TensorProto.FLOAT] * 2
    assert variant.parent.name == "gpu-bf16"
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    hidden = np.maximum(bf16(bf16(bf16(x) @ bf16(w["w1"])) + bf16(w["b1"])), 0)
    want = bf16(hidden @ bf16(w["w2"]))
    with OnnxRuntimeRunner(
        emulate(variant, tmp_path / "e.onnx", like=tmp_path / "b/model.fp32.onnx"), optimize=False
    ) as runner:
        got = runner.infer({"x": x})["y"]
    # FP32 sums in another order may round to the neighbouring BF16 value.
    assert np.abs(got - want).max() <= 2**-7 * np.abs(want).max()
    assert np.mean(got == want) > 0.9
    exact = np.maximum(x @ w["w1"] + w["b1"], 0) @ w["w2"]
    assert 1e-4 < np.abs(got - exact).max() / np.abs(exact).max() < 0.02


def test_int8_beside_bf16_has_bf16_scales(tmp_path: Path) -> None:
    variant, _ = made(tmp_path, "a100", preset="int8", half="bf16")
    graph = onnx.load(variant).graph
    types = {i.name: i.data_type for i in graph.initializer}
    scales = {n.input[1] for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    assert {types[s] for s in scales} == {TensorProto.BFLOAT16}
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    with (
        OnnxRuntimeRunner(tmp_path / "m.onnx") as plain,
        OnnxRuntimeRunner(emulate(variant, tmp_path / "e.onnx", like=tmp_path / "b/model.fp32.onnx")) as q,
    ):
        want, got = plain.infer({"x": x})["y"], q.infer({"x": x})["y"]
    assert 0 < np.abs(got - want).max() / np.abs(want).max() < 0.1


def test_fp4_weights_are_rounded_by_gptq_where_there_is_data(tmp_path: Path) -> None:
    rules = [{"op_type": "MatMul", "precision": "fp4"}]
    errors = {}
    seen = np.random.default_rng(1).normal(size=(40, 64)).astype(np.float32)
    for rounding in (None, "rtn"):
        folder = tmp_path / str(rounding)
        folder.mkdir()
        variant, w = made(folder, "rtx5090", preset="fp4", rules=rules, rounding=rounding)
        copy = emulate(variant, folder / "e.onnx", like=folder / "b/model.fp32.onnx")
        want = np.maximum(seen @ w["w1"] + w["b1"], 0) @ w["w2"]
        with OnnxRuntimeRunner(copy, optimize=False) as runner:
            errors[rounding] = np.square(runner.infer({"x": seen})["y"] - want).sum()
    assert errors[None] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_fp4_blocks_hold_the_nearest_of_sixteen_values(tmp_path: Path, half: str) -> None:
    rules = [{"op_type": "MatMul", "precision": "fp4"}]
    variant, w = made(tmp_path, "rtx5090", preset="fp4", half=half, rules=rules, rounding="rtn")
    model = onnx.load(variant)
    assert model.opset_import[0].version >= 23
    stored = {i.name: i for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == 2
    for node, name in zip(nodes, ("w2", "w1"), strict=True):
        weight, scale = (numpy_helper.to_array(stored[i]).astype(np.float64) for i in node.input[:2])
        assert stored[node.input[0]].data_type == TensorProto.FLOAT4E2M1
        assert len(stored[node.input[0]].raw_data) == w[name].size // 2
        assert set(np.unique(np.abs(weight))) <= set(E2M1)
        steps = np.repeat(scale, 16, axis=0)
        candidates = np.concatenate([E2M1, -E2M1])[:, None, None] * steps
        nearest = np.abs(candidates - w[name]).min(axis=0)
        np.testing.assert_allclose(np.abs(weight * steps - w[name]), nearest, atol=1e-6)
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    copy = emulate(variant, tmp_path / "e.onnx", like=tmp_path / "b/model.fp32.onnx")
    with OnnxRuntimeRunner(tmp_path / "m.onnx") as plain, OnnxRuntimeRunner(copy, optimize=False) as runner:
        want, got = plain.infer({"x": x})["y"], runner.infer({"x": x})["y"]
    assert 0.005 < np.abs(got - want).max() / np.abs(want).max() < 0.2


def test_a_report_says_emulated(tmp_path: Path) -> None:
    made(tmp_path, "a100", until="publish", preset="bf16")
    report = json.loads((tmp_path / "b/report.json").read_text(encoding="utf-8"))
    assert report["validation"]["a100"]["mode"] == "emulated"
    assert 30 < report["validation"]["a100"]["outputs"]["y"]["sqnr_db"] < 60
    assert not list((tmp_path / "b").rglob("e.onnx"))


@pytest.mark.parametrize(
    ("target", "policy", "said"),
    [
        ("t4", {"preset": "bf16"}, "T4 is SM75 and has no BF16"),
        ("t4", {"preset": "int8", "half": "bf16"}, "T4 is SM75 and has no BF16"),
        ("h100", {"preset": "fp4"}, "H100 is SM90 and has no FP4 .* use int4"),
        ("cpu", {"preset": "bf16"}, "CPU has no BF16 kernels"),
        ("a100", {"preset": "int8", "rules": [{"name": "*", "precision": "bf16"}]}, "one 16-bit type, here FP16"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, target: str, policy: dict[str, object], said: str
) -> None:
    with pytest.raises(PipelineError, match=said):
        made(tmp_path, target, **policy)
    assert not (tmp_path / "b/variants").exists()


def test_a_graph_of_bf16_may_have_bf16_rules() -> None:
    from pipeline.policy.planning import half_of
    from pipeline.recipe import PolicyConfig, RuleConfig

    assert half_of(PolicyConfig(half="bf16", rules=(RuleConfig(name="*", precision="bf16"),))) == "bf16"
    with pytest.raises(PolicyError):
        half_of(PolicyConfig(preset="bf16", rules=(RuleConfig(name="*", precision="fp16"),)))


def test_bf16_scales_are_never_so_small_that_values_clip() -> None:
    scale = np.random.default_rng(3).uniform(1e-6, 10, 1000).astype(np.float32)
    found = stored_scale(scale, BFLOAT16)
    np.testing.assert_array_equal(found, bf16(found))
    assert np.all(found * (127.5 / 127) >= scale)
    assert np.all(found <= scale * (1 + 2**-7))


@pytest.mark.parametrize(
    ("target", "policy"), [("a100", {"preset": "int8", "half": "bf16"}), ("rtx5090", {"preset": "fp4"})]
)
def test_layers_are_ranked_and_extracted_all_the_same(tmp_path: Path, target: str, policy: dict[str, object]) -> None:
    made(tmp_path, target, until="publish", per_layer=True, **policy)
    report = json.loads((tmp_path / "b/report.json").read_text(encoding="utf-8"))
    (layer,) = report["validation"][target]["layers"]
    assert layer["node"] == "up"
    assert 10 < layer["isolated_sqnr_db"] < 60
    found = extract(tmp_path / "b", ("up",), tmp_path / "layer")
    assert found.expected_quantized is not None
    expected, got = (np.load(f)[np.load(f).files[0]] for f in (found.expected, found.expected_quantized))
    assert 10 < 10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()) < 60


@needs_rtx
@pytest.mark.parametrize(
    ("target", "capability", "policy"),
    [
        ("a100", (8, 0), {"preset": "bf16"}),
        ("a100", (8, 0), {"preset": "int8", "half": "bf16"}),
        ("rtx5090", (12, 0), {"preset": "fp4"}),
    ],
)
def test_it_compiles(tmp_path: Path, target: str, capability: tuple[int, int], policy: dict[str, object]) -> None:
    variant, _ = made(tmp_path, target, **policy)
    compiled = compile_check(variant, capability, {"x": (8, 64)})
    types = {t.dtype for layer in compiled for t in (*layer.inputs, *layer.constants, *layer.outputs)}
    assert {"FP4E2M1", "BFloat16"} & types
    assert all(t.bytes > 0 for layer in compiled for t in (*layer.inputs, *layer.constants))
