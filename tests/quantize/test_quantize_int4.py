"""INT4 weights in blocks, and FP8 beside INT8: what is stored, what it computes, and what the compiler says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.compile_check import available, compile_check
from engines.onnxruntime import OnnxRuntimeRunner
from engines.target import check_precision, target
from engines.target import nearest as nearest_precision
from pipeline import model as models
from pipeline.build import BuildOptions, build
from pipeline.errors import RecipeError
from pipeline.policy.plan import PrecisionPlan, fitted
from pipeline.policy.planning import family, plan
from pipeline.policy.sizes import expected_bytes
from pipeline.quantize.weights.fake import nearest
from pipeline.quantize.weights.weight import block_scales
from pipeline.recipe import PolicyConfig, Preset, parse
from pipeline.types import NodeRole, Precision, QuantDType, QuantSpec, Role
from tests.policy.planned import entry, plan_zoo
from tests.quantize.graphs import save

needs_rtx = pytest.mark.skipif(not available(), reason="needs pip install '.[rtx]'")


def three(path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """x [b, 128] -> MatMul -> Relu -> Gemm (weight transposed) -> MatMul that sums 100 values -> y."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(size=(128, 256)).astype(np.float32),
        "w2": draw.normal(size=(100, 256)).astype(np.float32),
        "b2": draw.normal(size=100).astype(np.float32),
        "w3": draw.normal(size=(100, 32)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["d"], name="down", transB=1),
        helper.make_node("MatMul", ["d", "w3"], ["y"], name="odd"),
    ]
    return save(path, nodes, [("x", ["b", 128])], [("y", ["b", 32])], weights), weights


def recipe(path: Path, **policy: object) -> dict[str, object]:
    rules = [{"op_type": kind, "precision": "int4"} for kind in ("MatMul", "Gemm")]
    return {"source": {"onnx": str(path)}, "policy": {"preset": "int4", "rules": rules, **policy}, "targets": ["cpu"]}


def by_blocks(weight: np.ndarray, block: int, *, signed: bool = False) -> np.ndarray:
    """Symmetric INT4 of [summed, out] by the formula in float64, without data.

    ``signed``: the value of largest magnitude is -8 whatever its sign. Else each block is clipped, by 12 % at most, where
    that costs least.
    """
    result = np.empty(weight.shape)
    for begin in range(0, len(weight), block):
        part = weight[begin : begin + block].astype(np.float64)
        largest = np.abs(part).max(axis=0)
        best = np.full(part.shape[1], np.inf)
        if signed:
            scales = [-np.where(part.max(axis=0) == largest, largest, -largest) / 8]
        else:
            shares = (1, 0.96, 0.92, 0.88)
            scales = [(largest * np.float32(s) / np.float32(7)).astype(np.float32) for s in shares]
        for scale in scales:
            stored = np.clip(np.rint(part / scale), -8, 7) * scale
            error = np.square(stored - part).sum(axis=0)
            result[begin : begin + block] = np.where(error < best, stored, result[begin : begin + block])
            best = np.minimum(error, best)
    return result


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def decibel(got: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()))


@pytest.mark.parametrize("block", [64, 128])
def test_on_a_gpu_blocks_along_the_summed_axis_have_a_scale_each(tmp_path: Path, block: int) -> None:
    path, weights = three(tmp_path / "m.onnx")
    values = recipe(path, block_size=block) | {"targets": ["a100"]}
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/gpu-int4/model.onnx"
    model = onnx.load(variant)
    stored = {i.name: i for i in model.graph.initializer}
    forms = {n.input[0]: attributes(n) for n in model.graph.node if n.op_type == "DequantizeLinear"}
    # Four bits a value, and K = 100 of the last product cannot be divided into blocks.
    assert {name: stored[name].data_type for name in forms} == dict.fromkeys(
        ("w1_quantized", "w2_quantized"), onnx.TensorProto.INT4
    )
    assert forms["w1_quantized"] == {"axis": 0, "block_size": block}
    assert forms["w2_quantized"] == {"axis": 1, "block_size": block}
    assert numpy_helper.to_array(stored["w1_scale"]).shape == (128 // block, 256)
    assert numpy_helper.to_array(stored["w2_scale"]).shape == (100, 256 // block)
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    by_name = {name: numpy_helper.to_array(i).astype(np.float64) for name, i in stored.items()}
    w1 = by_name["w1_quantized"] * np.repeat(by_name["w1_scale"], block, axis=0)
    w2 = (by_name["w2_quantized"] * np.repeat(by_name["w2_scale"], block, axis=1)).T
    for got, weight in (
        (w1, weights["w1"]),
        (w2, weights["w2"].T),
    ):  # rounded to FP16, a scale may be another one as good
        assert np.square(got - weight).sum() < 1.01 * np.square(by_blocks(weight, block) - weight).sum()
    expected = (np.maximum(x @ w1, 0) @ w2 + weights["b2"]) @ weights["w3"]
    with OnnxRuntimeRunner(variant, optimize=False) as runner:
        got = runner.infer({"x": x})["y"]
    assert decibel(got, expected) > 55  # the rest computes in FP16


def test_a_gpu_without_four_bit_weights_falls_back_to_eight_bit_ones() -> None:
    assert nearest_precision(target("t4"), Precision.INT4) is Precision.W8A16
    assert nearest_precision(target("h100"), Precision.FP4) is Precision.INT4


def test_what_cannot_be_divided_into_blocks_stays_high_and_says_why(tmp_path: Path) -> None:
    path, _ = three(tmp_path / "m.onnx")
    model = models.load(path)
    roles = {name: NodeRole(role=Role.LINEAR) for name in ("up", "down", "odd")}
    made = plan(model, roles, PolicyConfig(preset=Preset.INT4), "gpu-int4")
    assert entry(made, "up").precision is Precision.INT4
    assert entry(made, "odd").precision is Precision.FP16
    assert "sums 100 values, which is no multiple of the block of 128 or of a smaller one" in entry(made, "odd").rule


@pytest.mark.parametrize(
    ("family", "summed", "asked", "block"),
    [
        ("gpu-int4", 256, 128, 128),
        ("gpu-int4", 576, 128, 64),
        ("gpu-int4", 96, 128, None),
        ("gpu-int4", 96, 32, 32),
        ("cpu", 96, 128, 32),
        ("cpu", 576, 128, 64),
        ("cpu", 576, 64, 64),
        ("cpu", 40, 128, None),
    ],
)
def test_where_a_block_does_not_divide_a_smaller_one_that_does_is_taken(
    family: str, summed: int, asked: int, block: int | None
) -> None:
    assert fitted(QuantSpec(dtype=QuantDType.INT4, block=asked), summed, family) == block
    assert fitted(QuantSpec(dtype=QuantDType.FP4_E2M1, block=16), 40, family) is None


def test_smaller_blocks_reach_the_graph_and_the_size(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    weights = {"w": draw.normal(size=(192, 64)).astype(np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    path = save(tmp_path / "m.onnx", [node], [("x", ["b", 192])], [("y", ["b", 64])], weights)
    np.savez(tmp_path / "data.npz", x=draw.normal(size=(300, 192)).astype(np.float32))
    raw = recipe(path) | {"calibration": {"data": str(tmp_path / "data.npz")}}
    build(parse(raw), tmp_path / "b", options=BuildOptions(until="quantize"))
    stored = {i.name: i for i in onnx.load(tmp_path / "b/variants/cpu/model.onnx").graph.initializer}
    # Four-bit weights are rounded by GPTQ where there is data, in the same blocks; -8 is one of the sixteen steps.
    assert (tmp_path / "b/variants/cpu/rounding/index.json").is_file()
    assert numpy_helper.to_array(stored["w_scale"]).shape == (64, 3)
    assert int((numpy_helper.to_array(stored["w_quantized"]) & 15).min()) == 0
    made = json.loads((tmp_path / "b/variants/cpu/precision_plan.json").read_text())
    assert "in blocks of 64: it sums 192 values, which is no multiple of 128" in made["nodes"][0]["rule"]
    model = models.load(path)
    plan_ = PrecisionPlan.from_json((tmp_path / "b/variants/cpu/precision_plan.json").read_text())
    assert expected_bytes(model, plan_) == 192 * 64 // 2 + 3 * 64 * 4


def test_no_calibration_data_is_needed_to_round_to_nearest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = three(tmp_path / "m.onnx")
    result = build(parse(recipe(path)), tmp_path / "b")
    assert "Four-bit weights are rounded to nearest" in caplog.text
    assert result.exit_code == 0
    assert result.report is not None
    assert result.report["targets"]["cpu"]["status"] == "built"


def test_gptq_in_blocks_keeps_outputs_closer(tmp_path: Path) -> None:
    path, _ = three(tmp_path / "m.onnx")
    draw = np.random.default_rng(2)
    mixing = draw.normal(size=(128, 128)) / 6 + np.eye(128)
    x = ((draw.normal(size=(600, 128)) * draw.uniform(0.1, 3, 128)) @ mixing).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x[:500])
    errors = []
    with OnnxRuntimeRunner(path) as reference:
        expected = reference.infer({"x": x[500:]})["y"]
    for rounding in ("rtn", "gptq"):
        values = recipe(path, rounding=rounding) | {
            "calibration": {"data": str(tmp_path / "data.npz"), "samples": 500, "method": "minmax"}
        }
        build(parse(values), tmp_path / rounding, options=BuildOptions(until="quantize"))
        with OnnxRuntimeRunner(tmp_path / rounding / "variants/cpu/model.onnx") as runner:
            errors.append(float(np.square(runner.infer({"x": x[500:]})["y"] - expected).sum()))
    assert errors[1] < 0.6 * errors[0]


def test_scales_of_blocks_weigh_errors_by_what_they_cost() -> None:
    draw = np.random.default_rng(3)
    weight = draw.standard_t(3, size=(64, 10)).astype(np.float32)
    spec = QuantSpec(dtype=QuantDType.INT4, block=32)
    importance = draw.uniform(0, 1, 64)

    def cost(scale: np.ndarray) -> np.ndarray:
        steps = np.repeat(scale, 32, axis=0)
        stored = np.clip(nearest(weight / steps, QuantDType.INT4), -8, 7)
        error = np.square(stored * steps - weight) * importance[:, None]
        return error.reshape(2, 32, 10).sum(axis=1)

    plain = np.abs(weight).reshape(2, 32, 10).max(axis=1) / 7
    found = block_scales(weight, spec, importance, np.float32)
    assert found.shape == (2, 10)
    assert (cost(found) <= cost(plain) * (1 + 1e-5)).all()
    assert cost(found).sum() < 0.95 * cost(plain).sum()
    both = block_scales(weight, spec, importance, np.float32, signed=True)
    assert (both < 0).any()  # the largest value is above 0, and -8 reaches further than 7
    assert (cost(both) <= cost(found) * (1 + 1e-5)).all()
    assert cost(both).sum() < cost(found).sum()


def test_a_gpu_without_the_type_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match="T4 is SM75 and has no INT4"):
        check_precision(target("t4"), Precision.INT4)
    with pytest.raises(RecipeError, match="A100 is SM80 and has no FP8"):
        build(parse({"source": {"onnx": "m.onnx"}, "policy": {"preset": "fp8-int8"}, "targets": ["a100"]}), Path("no"))
    with pytest.raises(RecipeError, match="blocks of 64 and 128, not of 32"):
        build(
            parse({"source": {"onnx": "m.onnx"}, "policy": {"preset": "int4", "block_size": 32}, "targets": ["a100"]}),
            Path("no"),
        )
    assert family(target("a100"), PolicyConfig(preset=Preset.INT4)) == "gpu-int4"
    assert family(target("h100"), PolicyConfig(preset=Preset.FP8_INT8)) == "gpu-fp8"
    assert parse({"source": {"onnx": "m"}, "policy": {"preset": "W4A16"}}).policy.preset is Preset.INT4


def test_fp8_and_int8_stand_side_by_side_never_in_one_product() -> None:
    made = plan_zoo("bert", "gpu-fp8", PolicyConfig(preset=Preset.FP8_INT8))
    by_role = {n.role: n.precision for n in made if n.precision.quantized}
    assert by_role[Role.FFN_DOWN] is by_role[Role.ATTENTION_OUTPUT] is Precision.FP8
    assert by_role[Role.FFN_UP] is by_role[Role.ATTENTION_QUERY] is Precision.INT8
    for form in made.formats.values():
        assert form.activations is not None
        assert form.activations.dtype is form.weights.dtype


@needs_rtx
@pytest.mark.parametrize(
    ("preset", "target_", "capability", "rules", "types"),
    [
        ("int4", "a100", (8, 0), {"up": "int4", "down": "int4"}, {"Int4"}),
        ("w8a16", "a100", (8, 0), {"up": "w8a16", "down": "w8a16"}, {"Int8"}),
        ("fp8-int8", "l40s", (8, 9), {"up": "int8", "down": "fp8"}, {"Int8", "FP8"}),
    ],
)
def test_it_compiles(
    tmp_path: Path, preset: str, target_: str, capability: tuple[int, int], rules: dict[str, str], types: set[str]
) -> None:
    path, _ = three(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(4).normal(size=(64, 128)).astype(np.float32))
    values = {
        "source": {"onnx": str(path)},
        "calibration": {"data": str(tmp_path / "data.npz"), "method": "minmax"},
        "policy": {"preset": preset, "rules": [{"name": n, "precision": p} for n, p in rules.items()]},
        "targets": [target_],
    }
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    name = family(target(target_), parse(values).policy)
    layers = compile_check(tmp_path / f"b/variants/{name}/model.onnx", capability, {"x": (8, 128)})
    kernels = [layer for layer in layers if layer.flops > 0]
    assert types <= {t.dtype for layer in layers for t in (*layer.inputs, *layer.constants)}
    # What is stored narrow is what the kernel that multiplies reads: it was not widened before.
    # (TensorRT for RTX widens INT4 where there are 100 outputs.)
    assert sum(layer.is_low_precision for layer in kernels) >= (1 if preset == "int4" else 2)
