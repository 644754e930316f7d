"""NF4 weights alone: codes, packing and double quantization by independent formulas, and what ONNX Runtime multiplies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_bnb4
from scipy.stats import norm

from engines.onnxruntime import OnnxRuntimeRunner
from engines.target import check_precision, target
from pipeline import model as models
from pipeline.build import BuildOptions, build
from pipeline.errors import RecipeError
from pipeline.graph.prepare import prepare
from pipeline.lint.lint import lint_path
from pipeline.notices import collecting
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import plan
from pipeline.policy.sizes import expected_bytes
from pipeline.quantize.weights.nf4 import CODE, SECOND_BLOCK, dynamic_code, nearest_codes, second_level
from pipeline.recipe import PolicyConfig, parse
from pipeline.types import NodeRole, Precision, Role
from tests.policy.planned import entry
from tests.quantize.graphs import save
from tests.quantize.test_quantize_int4 import attributes, decibel, three
from tests.stages.builds import write_inputs
from tests.zoo import exported


def recipe(path: Path, **policy: object) -> dict[str, object]:
    rules = [{"op_type": kind, "precision": "nf4"} for kind in ("MatMul", "Gemm")]
    return {"source": {"onnx": str(path)}, "policy": {"preset": "nf4", "rules": rules, **policy}, "targets": ["cpu"]}


def variant_of(path: Path, out: Path, **policy: object) -> Path:
    build(parse(recipe(path, **policy)), out, options=BuildOptions(until="quantize"))
    return out / "variants/cpu/model.onnx"


def by_bits(code: int) -> float:
    """The dynamic type of the 8-bit optimizers' paper: a sign, zeros that count the exponent, a one, a linear fraction.

    Without a one there is the value 0, and with the sign bit set 1.
    """
    sign, rest = code >> 7, code & 127
    if not rest:
        return float(sign)
    exponent = 7 - rest.bit_length()
    bits = 6 - exponent
    fraction = rest & ((1 << bits) - 1)
    value = (0.1 + 0.9 * (fraction + 0.5) / 2**bits) * 10.0**-exponent
    return -value if sign else value


def dequantized(weight: np.ndarray, block: int, *, double: bool) -> np.ndarray:
    """NF4 of [summed, outputs] in float64, by looking for the nearest of all values."""
    rows = weight.T.astype(np.float64).reshape(-1, block)
    maxima = np.abs(rows).max(axis=1)
    code = CODE.astype(np.float64)
    nearest = code[np.abs((rows / np.where(maxima, maxima, 1)[:, None])[..., None] - code).argmin(axis=-1)]
    if double:
        every, mean = np.sort([by_bits(c) for c in range(256)]), maxima.mean()
        stood = np.empty_like(maxima)
        for begin in range(0, len(maxima), 256):
            part = maxima[begin : begin + 256] - mean
            largest = np.abs(part).max()
            stood[begin : begin + 256] = (
                every[np.abs((part / largest)[:, None] - every).argmin(axis=1)] * largest + mean
            )
        maxima = stood
    return (nearest * maxima[:, None]).reshape(weight.shape[1], weight.shape[0]).T


def test_the_code_is_the_papers_quantiles() -> None:
    """Appendix E: quantiles of a normal distribution, eight on the positive side and seven on the other, and 0, over the largest."""
    end = 0.9677083
    positive, negative = norm.ppf(np.linspace(end, 0.5, 9)[:-1]), -norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    values = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(CODE, values / values.max(), rtol=1e-6, atol=1e-9)


def test_the_second_level_s_code_is_the_dynamic_type() -> None:
    np.testing.assert_allclose(dynamic_code(), np.sort([by_bits(c) for c in range(256)]), rtol=1e-6)
    assert len(np.unique(dynamic_code())) == 256


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_the_second_level_loses_less_than_half_a_step(count: int) -> None:
    maxima = np.random.default_rng(count).uniform(0.5, 3, count).astype(np.float32)
    found = second_level(maxima)
    assert found.codes.shape == (-(-count // SECOND_BLOCK), SECOND_BLOCK)
    assert found.expanded().shape == (count,)
    # Values apart by 0.9 / 64 of the largest in the top decade.
    assert np.abs(found.expanded() - maxima).max() <= np.abs(maxima - maxima.mean()).max() * 0.9 / 64 / 2 * 1.01 + 1e-6


def test_ties_and_the_ends() -> None:
    middles = (CODE[:-1] + CODE[1:]) / np.float32(2)
    np.testing.assert_array_equal(nearest_codes(CODE), np.arange(16))
    np.testing.assert_array_equal(nearest_codes(middles), np.arange(15))
    np.testing.assert_array_equal(nearest_codes(np.float32([-7, 7])), [0, 15])


@pytest.mark.parametrize("block", [32, 64, 128])
def test_packing_is_what_onnx_runtime_s_own_quantizer_packs(tmp_path: Path, block: int) -> None:
    path, weights = three(tmp_path / "m.onnx")
    graph = onnx.load(variant_of(path, tmp_path / "b", block_size=block)).graph
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    products = {n.name: n for n in graph.node if n.op_type == "MatMulBnb4"}
    assert set(products) == {"up", "down/product"}  # K = 100 of the last one cannot be divided into blocks
    for name, weight in (("up", weights["w1"]), ("down/product", weights["w2"].T)):
        summed, outputs = weight.shape
        packed, maxima = np.zeros(weight.size // 2, np.uint8), np.zeros(weight.size // block, np.float32)
        quantize_matmul_bnb4(packed, weight.T.copy(), maxima, block, 1, outputs, summed)
        np.testing.assert_array_equal(stored[products[name].input[1]], packed)
        np.testing.assert_array_equal(stored[products[name].input[2]], maxima)
        expected = {"K": summed, "N": outputs, "block_size": block, "quant_type": 1}
        assert attributes(products[name]) == expected


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_the_engine_computes_with_the_reference_s_weights(tmp_path: Path, double: bool, optimize: bool) -> None:
    path, weights = three(tmp_path / "m.onnx")
    variant = variant_of(path, tmp_path / "b", double_quantization=double)
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    w1, w2 = (dequantized(w, 64, double=double) for w in (weights["w1"], weights["w2"].T))
    expected = (np.maximum(x @ w1, 0) @ w2 + weights["b2"]) @ weights["w3"]
    with OnnxRuntimeRunner(variant, optimize=optimize) as runner:
        got = runner.infer({"x": x})["y"]
    assert decibel(got, expected) > 110
    made = PrecisionPlan.from_json((variant.parent / "precision_plan.json").read_text())
    graph = onnx.load(variant).graph
    shared = ("nf4_absmax_", "_absmax_begin", "_absmax_end")  # the same few numbers whatever the weight
    small = sum(len(i.raw_data) for i in graph.initializer if not any(s in i.name for s in shared))
    assert expected_bytes(models.load(path), made) == small


def test_double_quantization_stores_a_byte_for_each_block() -> None:
    draw, code = np.random.default_rng(2), dynamic_code()
    maxima = draw.uniform(1, 4, 512).astype(np.float32)
    found = second_level(maxima)
    assert found.codes.nbytes + found.scale.nbytes + found.offset.nbytes == 512 + 8 + 4
    by_hand = maxima.mean(dtype=np.float64)
    for index in (0, 100, 255, 256, 511):
        part = maxima[:256] if index < 256 else maxima[256:]
        largest = np.abs(part - by_hand).max()
        nearest = np.abs((maxima[index] - by_hand) / largest - code).argmin()
        assert found.codes.reshape(-1)[index] == nearest


@pytest.mark.parametrize("double", [False, True])
def test_a_block_of_zeros_stays_zero(tmp_path: Path, double: bool) -> None:
    weight = np.random.default_rng(3).normal(size=(128, 32)).astype(np.float32)
    weight[:64, 5] = 0
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="only")
    path = save(tmp_path / "m.onnx", [node], [("x", ["b", 128])], [("y", ["b", 32])], {"w": weight})
    with OnnxRuntimeRunner(variant_of(path, tmp_path / "b", double_quantization=double)) as runner:
        got = runner.infer({"x": np.eye(128, dtype=np.float32)})["y"]
    assert not got[:64, 5].any()
    assert decibel(got, dequantized(weight, 64, double=double)) > 110


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_an_fp16_graph_stays_in_fp16(tmp_path: Path, double: bool, beta: float) -> None:
    draw = np.random.default_rng(4)
    weights = {"w": draw.normal(size=(128, 96)).astype(np.float16), "b": draw.normal(size=96).astype(np.float16)}
    kind = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="only", beta=beta)],
        "g",
        [helper.make_tensor_value_info("x", kind, ["b", 128])],
        [helper.make_tensor_value_info("y", kind, ["b", 96])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    values = {"source": {"onnx": str(tmp_path / "m.onnx")}, "targets": ["cpu"]}
    values["policy"] = {
        "preset": "nf4",
        "double_quantization": double,
        "rules": [{"op_type": "Gemm", "precision": "nf4"}],
    }
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    x = draw.normal(size=(5, 128)).astype(np.float16)
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": x})["y"]
    assert got.dtype == np.float16
    expected = x.astype(np.float64) @ dequantized(weights["w"], 64, double=double) + beta * weights["b"].astype(
        np.float64
    )
    assert decibel(got.astype(np.float64), expected) > 55


@pytest.mark.parametrize("double", [False, True])
def test_a_transformer_is_built_validated_and_smaller(tmp_path: Path, double: bool) -> None:
    model = exported("bert", "torchscript")
    inputs = write_inputs(tmp_path / "in", model)
    values = {
        "name": "tiny",
        "source": {"onnx": str(model)},
        "validate": {"data": str(inputs / "heldout.npz"), "latency": False, "per_layer": True},
        "policy": {"preset": "nf4", "block_size": 32, "double_quantization": double},
    }
    result = build(parse(values), tmp_path / "b")
    assert result.exit_code == 0
    assert result.report is not None
    nf4 = {n["node"] for n in result.report["precision_plan"] if n["precision"] == "nf4"}
    assert len(nf4) == 12  # six GEMMs of each of two layers
    graph = onnx.load(tmp_path / "b/variants/cpu/model.onnx").graph
    assert [n.op_type for n in graph.node].count("MatMulBnb4") == 12
    assert {layer["node"] for layer in result.report["validation"]["cpu"]["layers"]} == nf4
    measured = next(iter(result.report["validation"]["cpu"]["outputs"].values()))
    assert measured["sqnr_db"] > 15
    assert result.report["targets"]["cpu"]["status"] == "built"


def test_targets_without_it_refuse_or_fall_back_and_say_so(tmp_path: Path) -> None:
    path, _ = three(tmp_path / "m.onnx")
    values = recipe(path) | {"targets": ["a100"]}
    with pytest.raises(RecipeError, match="A100 has no NF4, because TensorRT has none; use int4, or --fallback"):
        build(parse(values), tmp_path / "b")
    with pytest.raises(RecipeError, match="use w8a16, or --fallback"):
        check_precision(target("t4"), Precision.NF4)
    with collecting() as notices:
        build(
            parse(recipe(path, fallback=True) | {"targets": ["cpu", "a100"]}),
            tmp_path / "b",
            options=BuildOptions(until="quantize"),
        )
    assert "A100 has no NF4; it gets INT4 instead" in [n.message for n in notices]
    graph = onnx.load(tmp_path / "b/variants/gpu-int4/model.onnx").graph
    sizes = {attributes(n)["block_size"] for n in graph.node if n.op_type == "DequantizeLinear"}
    assert sizes == {128}  # INT4's own
    # The lint reads what TensorRT is given; of the other file it says that TensorRT has no such operator, and nothing else.
    assert [Path(r.model).parent.name for r in lint_path(tmp_path / "b")] == ["gpu-int4"]
    (report,) = lint_path(tmp_path / "b/variants/cpu/model.onnx")
    assert {(f.rule, f.message) for f in report.findings} == {("QDQ110", "TensorRT has no MatMulBnb4")}


def test_what_the_kernel_cannot_store_stays_high_and_says_why(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    weights = {"w": draw.normal(size=(64, 32)).astype(np.float32), "v": draw.normal(size=(100, 64)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["a", "v"], ["x"], name="odd"),
        helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="computed bias"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("a", ["b", 100]), ("c", ["b", 32])], [("y", ["b", 32])], weights)
    model = models.load(prepare(path, tmp_path / "canonical.onnx").path)
    made = plan(
        model, dict.fromkeys(("odd", "computed bias"), NodeRole(role=Role.LINEAR)), PolicyConfig(preset="nf4"), "cpu"
    )
    assert {n.node: n.precision for n in made} == dict.fromkeys(("odd", "computed bias"), Precision.FP32)
    assert "sums 100 values" in entry(made, "odd").rule
    assert "its bias is no constant" in entry(made, "computed bias").rule


def test_gptq_leaves_it_alone_and_says_so(tmp_path: Path) -> None:
    path, _ = three(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(6).normal(size=(64, 128)).astype(np.float32))
    plain = variant_of(path, tmp_path / "plain").read_bytes()
    values = recipe(path, rounding="gptq") | {"calibration": {"data": str(tmp_path / "data.npz")}}
    with collecting() as notices:
        build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    assert [n.message for n in notices if n.code == "not-gptq"] == [
        "GPTQ does not round NF4 weights; they are rounded to nearest"
    ]
    assert (tmp_path / "b/variants/cpu/model.onnx").read_bytes() == plain


def test_double_quantization_is_refused_where_nothing_is_nf4() -> None:
    with pytest.raises(RecipeError, match="double_quantization is for nf4"):
        parse({"source": {"onnx": "m.onnx"}, "policy": {"preset": "int4", "double_quantization": True}})


@pytest.mark.parametrize("preset", ["int4", "nf4"])
def test_weights_alone_stay_so_beside_dynamic_activations(tmp_path: Path, preset: str) -> None:
    path, weights = three(tmp_path / "m.onnx")
    rules = [{"name": "up", "precision": preset}, {"name": "down", "precision": "int8"}]
    values = {"source": {"onnx": str(path)}, "targets": ["cpu"]}
    values["policy"] = {"preset": "fp32", "rules": rules, "activations": "dynamic"}
    build(parse(values), tmp_path / "b", options=BuildOptions(until="quantize"))
    variant = tmp_path / "b/variants/cpu/model.onnx"
    kinds = [n.op_type for n in onnx.load(variant).graph.node]
    assert kinds.count("MatMulNBits" if preset == "int4" else "MatMulBnb4") == 1
    assert kinds.count("MatMulInteger") == 1
    x = np.random.default_rng(1).normal(size=(7, 128)).astype(np.float32)
    with OnnxRuntimeRunner(variant) as runner:
        got = runner.infer({"x": x})["y"]
    expected = (np.maximum(x @ weights["w1"], 0) @ weights["w2"].T + weights["b2"]) @ weights["w3"]
    assert decibel(got, expected) > 12
