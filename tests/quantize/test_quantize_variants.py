from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.policy.formats import GPU_FP8
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insertion.sites import sites
from pipeline.quantize.quantize import quantize
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.types import Precision, Range
from tests.quantize.graphs import cnn, fake_quantize, fake_quantize_weight, mlp
from tests.quantize.planning import plan_for


def ranges_for(path: Path, plan: PrecisionPlan, known: dict[str, tuple[float, float]]) -> list[SiteRange]:
    found = sites(models.load(path), plan)
    return [
        SiteRange(site=s, method="test", range=Range(min=known[s.tensor][0], max=known[s.tensor][1])) for s in found
    ]


def run(path: Path, x: np.ndarray, *, optimize: bool = False) -> np.ndarray:
    with OnnxRuntimeRunner(path, threads=1, optimize=optimize) as runner:
        return runner.infer({"x": x})["y"]


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_mlp_equals_the_formula(tmp_path: Path, family: str) -> None:
    path, w = mlp(tmp_path / "mlp.onnx")
    plan = replace(plan_for(path, family, {"up", "down"}), elsewhere=Precision.FP32)
    ranges = ranges_for(path, plan, {"x": (-3.0, 2.0), "r": (0.0, 9.0)})
    out = quantize(path, plan, ranges, tmp_path / "out" / "model.onnx").path
    x = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)
    symmetric = family != "cpu"
    hidden = fake_quantize(x, -3, 2, symmetric=symmetric) @ fake_quantize_weight(w["w1"]) + w["b1"]
    want = fake_quantize(np.maximum(hidden, 0), 0, 9, symmetric=symmetric) @ fake_quantize_weight(w["w2"])
    got = run(out, x)
    # One step of the hidden quantizer may differ where float32 and float64 round a tie apart.
    assert np.mean(np.abs(got - want) > 1e-3) < 0.02
    assert np.abs(got - want).max() < 0.5


def test_weights_are_stored_as_int8_and_nothing_else_is_left(tmp_path: Path) -> None:
    path, w = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "cpu", {"up", "down"})
    out = quantize(path, plan, ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)}), tmp_path / "q.onnx").path
    initializers = {i.name: onnx.numpy_helper.to_array(i, str(tmp_path)) for i in onnx.load(out).graph.initializer}
    stored = next(v for v in initializers.values() if v.shape == (32, 48))
    scale = (np.abs(w["w1"]).max(axis=0) / 127).astype(np.float32)
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, np.rint(w["w1"] / scale))
    assert not [n for n, v in initializers.items() if v.dtype == np.float32 and v.shape in ((32, 48), (48, 24))]


@pytest.mark.exact_products
@pytest.mark.parametrize("gemm", [False, True])
def test_cpu_mlp_is_fused(tmp_path: Path, gemm: bool) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx", gemm=gemm)
    plan = plan_for(path, "cpu", {"up", "down"})
    made = quantize(path, plan, ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)}), tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.unfused == ()
    assert sum(made.fusion.integer_kernels.values()) == 2
    x = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)
    reference, got = run(path, x), run(made.path, x, optimize=True)
    assert np.abs(got - reference).max() / np.abs(reference).max() < 0.05


def test_cpu_cnn_is_fused_with_its_residual_add(tmp_path: Path) -> None:
    path = cnn(tmp_path / "cnn.onnx")
    plan = plan_for(path, "cpu", {"conv0", "conv1", "skip", "conv2"})
    known = {"x": (-4, 4), "r0": (0, 6), "c1": (-6, 6), "r1": (0, 9), "y": (-8, 8)}
    made = quantize(path, plan, ranges_for(path, plan, known), tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.integer_kernels == {"QLinearConv": 3, "QLinearAdd": 1}
    assert made.fusion.unfused == ()
    x = np.random.default_rng(3).normal(size=(2, 16, 12, 12)).astype(np.float32)
    reference, got = run(path, x), run(made.path, x, optimize=True)
    assert 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()) > 25


def test_gpu_cnn_quantizes_inputs_and_the_skip_branch_only(tmp_path: Path) -> None:
    path = cnn(tmp_path / "cnn.onnx")
    plan = plan_for(path, "gpu-int8", {"conv0", "conv1", "skip", "conv2"})
    found = sites(models.load(path), plan)
    assert [(s.tensor, s.readers) for s in found] == [
        ("x", (("conv0", 0),)),
        ("r0", (("conv1", 0), ("skip", 1))),
        ("r1", (("conv2", 0),)),
    ]


def test_gpu_variant_is_strongly_typed_fp16(tmp_path: Path) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "gpu-int8", {"up", "down"})
    out = quantize(path, plan, ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)}), tmp_path / "q.onnx").path
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    assert types["h"] == types["r"] == onnx.TensorProto.FLOAT16
    assert [i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.output)] == [1, 1]
    assert not [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    x = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)
    reference, got = run(path, x), run(out, x)
    assert np.abs(got - reference).max() / np.abs(reference).max() < 0.05


def test_fp32_islands_are_cast_once(tmp_path: Path) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "gpu-int8", {"up", "down"})
    nodes = tuple(replace(n, precision=Precision.FP32) if n.node == "act" else n for n in plan.nodes)
    ranges = ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)})
    out = quantize(path, replace(plan, nodes=nodes), ranges, tmp_path / "q.onnx").path
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    act = next(n for n in model.graph.node if n.op_type == "Relu")
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast"}
    assert act.input[0] in casts
    assert len(casts) == 4  # input, into the island, out of it, output


def test_mask_constants_saturate_in_fp16(tmp_path: Path) -> None:
    from onnx import helper

    from tests.quantize.graphs import save

    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="add")]
    mask = np.array([0.0, np.finfo(np.float32).min, -np.inf], np.float32)
    path = save(tmp_path / "m.onnx", nodes, [("x", ["b", 3])], [("y", ["b", 3])], {"mask": mask})
    out = quantize(path, plan_for(path, "gpu-fp16", set()), [], tmp_path / "q.onnx").path
    got = run(out, np.ones((1, 3), np.float32))
    np.testing.assert_allclose(got, [[1.0, -65504.0, -65504.0]], atol=32)


@pytest.mark.exact_products
def test_dynamic_equals_the_formula_and_is_fused(tmp_path: Path) -> None:
    path, w = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "cpu", {"up", "down"}, dynamic=True)
    made = quantize(path, plan, [], tmp_path / "q.onnx")
    assert made.fusion is not None
    assert sum(made.fusion.integer_kernels.values()) == 2
    x = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)
    hidden = fake_quantize(x, x.min(), x.max(), symmetric=False) @ fake_quantize_weight(w["w1"]) + w["b1"]
    hidden = np.maximum(hidden, 0)
    want = fake_quantize(hidden, 0, hidden.max(), symmetric=False) @ fake_quantize_weight(w["w2"])
    for optimize in (False, True):
        got = run(made.path, x, optimize=optimize)
        assert np.abs(got - want).max() / np.abs(want).max() < 0.01


def test_same_input_same_bytes(tmp_path: Path) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "gpu-int8", {"up", "down"})
    texts = []
    for name in ("a", "b"):
        ranges = ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)})
        out = quantize(path, plan, ranges, tmp_path / name / "model.onnx").path
        texts.append([f.read_bytes() for f in models.files(out)])
    assert texts[0] == texts[1]


def fake_e4m3(x: np.ndarray, amax: float | np.ndarray) -> np.ndarray:
    """FP8 E4M3 with scale amax / 448, by the type's definition: 3 mantissa bits, exponents from -6, no infinity."""
    scale = np.float64(np.float16(np.float32(amax) / 448)) if np.ndim(amax) == 0 else (amax / np.float32(448))
    value = np.clip(x / scale, -448, 448)
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(value), 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.rint(value / step) * step * scale


def test_fp8_equals_the_formula(tmp_path: Path) -> None:
    path, w = mlp(tmp_path / "mlp.onnx")
    base = plan_for(path, "gpu-fp8", {"up", "down"})
    nodes = tuple(replace(n, precision=Precision.FP8) if n.precision is Precision.INT8 else n for n in base.nodes)
    plan = replace(base, nodes=nodes, formats={Precision.FP8: GPU_FP8}, elsewhere=Precision.FP32)
    out = quantize(path, plan, ranges_for(path, plan, {"x": (-3.5, 3.5), "r": (0, 25)}), tmp_path / "q.onnx").path
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    types = {i.data_type for i in model.graph.initializer if len(i.dims) == 2}
    assert types == {onnx.TensorProto.FLOAT8E4M3FN}
    x = np.random.default_rng(5).normal(size=(7, 32)).astype(np.float32)

    def exact(values: np.ndarray, amax: float) -> np.ndarray:
        return fake_e4m3(values / np.float32(amax / 448), 448.0) * np.float32(amax / 448)

    columns = {k: np.abs(w[k]).max(axis=0) for k in ("w1", "w2")}
    hidden = exact(x, 3.5) @ fake_e4m3(w["w1"], columns["w1"]) + w["b1"]
    want = exact(np.maximum(hidden, 0), 25.0) @ fake_e4m3(w["w2"], columns["w2"])
    got = run(out, x)
    # A value on the edge of two steps may fall to either side in float32.
    assert np.mean(np.abs(got - want) > 0.02 * np.abs(want).max()) < 0.02
    reference = run(path, x)
    assert np.abs(got - reference).max() / np.abs(reference).max() < 0.1
