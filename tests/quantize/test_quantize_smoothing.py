"""Smoothing: the float function stays, the paper's formula holds, and outliers cost less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.graph.prepare import prepare
from pipeline.quantize.insertion.sites import sites
from pipeline.quantize.transforms import smoothing_search
from pipeline.quantize.transforms.groups import Group, groups
from pipeline.quantize.transforms.smooth import apply
from pipeline.quantize.transforms.smoothing import (
    ChoiceOptions,
    Part,
    Smoothing,
    by_tensor,
    choose,
)
from pipeline.quantize.transforms.smoothing_search import search
from pipeline.quantize.weights.fake import fake_quantize, fake_quantize_weight
from pipeline.types import Precision, QuantDType, QuantSpec, Range, Role
from tests.quantize import graphs
from tests.quantize.planning import plan_for

WIDTH = 32


def normed(path: Path, *, shared: bool, gemm: bool) -> Path:
    """x -> LayerNorm -> two GEMMs (and, if shared, a residual Add) -> Gelu -> GEMM -> y."""
    draw = np.random.default_rng(3)
    weights = {name: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("w1", "w2", "w3")}
    weights |= {"g": draw.uniform(0.5, 2, WIDTH).astype(np.float32), "b": draw.normal(size=WIDTH).astype(np.float32)}
    weights["w1"] = weights["w1"].T.copy() if gemm else weights["w1"]
    first = helper.make_node("Gemm", ["n", "w1"], ["p"], name="one", transB=1) if gemm else helper.make_node(
        "MatMul", ["n", "w1"], ["p"], name="one"
    )  # fmt: skip
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"], name="norm", axis=-1),
        first,
        helper.make_node("MatMul", ["n", "w2"], ["q"], name="two"),
        helper.make_node("Add", ["p", "q"], ["s"], name="sum"),
        helper.make_node("Add", ["s", "n" if shared else "q"], ["t"], name="residual"),
        helper.make_node("Gelu", ["t"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w3"], ["y"], name="three"),
    ]
    return graphs.save(path, nodes, [("x", ["b", WIDTH])], [("y", ["b", WIDTH])], weights)


def outlying(rows: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    values[:, 5] *= 60
    return values


def tapped(path: Path, feeds: dict[str, np.ndarray], tensors: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Channel ranges by running the model with more outputs: no code of the collector."""
    import onnx
    import onnxruntime as ort

    proto = onnx.load(path)
    known = {o.name for o in proto.graph.output} | {i.name for i in proto.graph.input}
    proto.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in known)
    session = ort.InferenceSession(proto.SerializeToString())
    found = {t: feeds[t] if t in feeds else session.run([t], feeds)[0] for t in tensors}
    return {t: (v.reshape(-1, v.shape[-1]).min(0), v.reshape(-1, v.shape[-1]).max(0)) for t, v in found.items()}


@pytest.mark.parametrize("shared", [False, True], ids=["folded into the norm", "explicit Mul"])
@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
@pytest.mark.parametrize("alpha", ["auto", 0.5, 1.0])
def test_the_float_function_stays(tmp_path: Path, shared: bool, gemm: bool, family: str, alpha: str | float) -> None:
    path = normed(tmp_path / "m.onnx", shared=shared, gemm=gemm)
    plan = plan_for(path, family, {"one", "two", "three"}, smooth=alpha)
    feeds = {"x": outlying(200)}
    model = models.load(path)
    extremes = tapped(path, feeds, [g.tensor for g in groups(model, plan)])
    chosen = by_tensor(search(path, plan, extremes, [feeds]))
    assert chosen
    before = len(model.graph)
    apply(model, chosen)
    norm = next(n for n in model.graph if n.name == "norm")
    if "n" in chosen:  # the norm takes it in only where nobody else reads its output
        muls = sum(n.op_type == "Mul" and "n/smoothing" in (n.name or "") for n in model.graph)
        assert muls == (1 if shared else 0)
        assert (norm.inputs[1].name == "g") is shared
    assert len(model.graph) >= before
    models.save(model, tmp_path / "smoothed.onnx")
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5


def test_an_rms_norm_s_gain_takes_the_scale_in(tmp_path: Path) -> None:
    draw = np.random.default_rng(8)
    weights = {"w": draw.normal(size=(WIDTH, 24)).astype(np.float32), "g": draw.uniform(1, 2, WIDTH).astype(np.float32)}
    weights |= {"two": np.float32([2.0]), "tiny": np.float32([1e-6])}
    nodes = [
        helper.make_node("Pow", ["x", "two"], ["x2"], name="square"),
        helper.make_node("ReduceMean", ["x2"], ["m"], name="mean", keepdims=1, noop_with_empty_axes=1),
        helper.make_node("Add", ["m", "tiny"], ["e"], name="eps"),
        helper.make_node("Sqrt", ["e"], ["d"], name="root"),
        helper.make_node("Div", ["x", "d"], ["n"], name="divide"),
        helper.make_node("Mul", ["g", "n"], ["h"], name="gain"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="one"),
    ]
    path = graphs.save(tmp_path / "m.onnx", nodes, [("x", ["b", WIDTH])], [("y", ["b", 24])], weights)
    plan = plan_for(path, "cpu", {"one"}, smooth=0.8)  # asymmetric: no shift
    feeds = {"x": outlying(200)}
    chosen = by_tensor(search(path, plan, tapped(path, feeds, ["h"]), [feeds]))
    model = models.load(path)
    before = len(model.graph)
    assert apply(model, chosen) == ("h",)
    assert len(model.graph) == before
    models.save(model, tmp_path / "smoothed.onnx")
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5
    gain = next(n for n in model.graph if n.name == "gain").inputs[0]
    np.testing.assert_allclose(gain.const_value.numpy(), weights["g"] / chosen["h"].scale, rtol=1e-6)


def test_alpha_moves_what_the_paper_s_formula_says(tmp_path: Path) -> None:
    path, weights = graphs.mlp(tmp_path / "m.onnx")
    plan = plan_for(path, "cpu", {"up"}, smooth=0.7)
    values = outlying(100)
    low, high = values.min(0), values.max(0)
    found = search(path, plan, {"x": (low, high)}, [{"x": values}])
    amax = np.maximum(-low, high).astype(np.float64)
    amax = np.maximum(amax, np.quantile(amax, 0.75))  # the others are alike
    expected = amax**0.7 / np.abs(weights["w1"]).max(axis=1) ** 0.3
    # Scales matter only relative to each other: one factor for all of them changes no rounding.
    np.testing.assert_allclose(found[0].scale / found[0].scale[0], expected / expected[0], rtol=1e-5)


def test_some_outputs_of_a_large_weight_choose_what_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest weight of each channel is that of all outputs, also where it is not among those that are tried."""
    draw = np.random.default_rng(6)
    weight = draw.normal(size=(WIDTH, 600)).astype(np.float32)
    weight[3, 1] = 40.0  # not tried
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = graphs.save(tmp_path / "m.onnx", [node], [("x", ["b", WIDTH])], [("y", ["b", 600])], {"w": weight})
    values = outlying(512)
    plan, extremes = plan_for(path, "gpu-int8", {"product"}), {"x": (values.min(axis=0), values.max(axis=0))}
    (whole,) = search(path, plan, extremes, [{"x": values}])
    monkeypatch.setattr(smoothing_search, "TRIED", 1)
    monkeypatch.setattr(smoothing_search, "LEAST_OUTPUTS", 60)
    (some,) = search(path, plan, extremes, [{"x": values}])
    assert (some.alpha, some.shifted) == (whole.alpha, whole.shifted) != (None, False)
    np.testing.assert_array_equal(some.scale, whole.scale)
    assert some.error == pytest.approx(whole.error, rel=0.3)
    assert some.error != whole.error


def pick(values: np.ndarray, weight: np.ndarray, family: str, **more: object) -> Smoothing:
    from pipeline.policy.formats import CPU_INT8, GPU_INT8
    from pipeline.policy.plan import PrecisionPlan

    form = CPU_INT8 if family == "cpu" else GPU_INT8
    plan = PrecisionPlan(family=family, elsewhere=Precision.FP32, formats={Precision.INT8: form})
    group = Group(tensor="x", nodes=("n",), precision=Precision.INT8)
    return choose(
        group, plan, [Part.of_gemm(values, weight)], (values.min(0), values.max(0)), options=ChoiceOptions(**more)
    )  # type: ignore[arg-type]


def independent_error(values: np.ndarray, weight: np.ndarray, found: Smoothing, *, symmetric: bool) -> float:
    """Both operands rounded by the formula in float64, the product compared with the exact one."""
    moved = (values.astype(np.float64) - found.shift) / found.scale
    x = graphs.fake_quantize(moved, float(moved.min()), float(moved.max()), symmetric=symmetric)
    w = graphs.fake_quantize_weight(weight * found.scale[:, None])
    exact = values.astype(np.float64) @ weight
    return float(((x @ w + found.shift @ weight - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_smoothing_makes_outlier_channels_cheaper_by_an_independent_measure(family: str) -> None:
    values, weight = outlying(400), np.random.default_rng(9).normal(size=(WIDTH, 64)).astype(np.float32)
    found = pick(values, weight, family)
    assert found.alpha is not None
    measured = independent_error(values, weight, found, symmetric=family != "cpu")
    assert measured == pytest.approx(found.error, rel=0.1)
    plain = Smoothing(
        group=found.group, alpha=None, shifted=False, scale=np.ones(WIDTH, np.float32), shift=np.zeros(WIDTH, np.float32),
        error=0.0, plain_error=0.0,
    )  # fmt: skip
    assert measured < 0.2 * independent_error(values, weight, plain, symmetric=family != "cpu")


def test_a_one_sided_tensor_is_shifted_where_the_format_is_symmetric() -> None:
    draw = np.random.default_rng(4)
    values = draw.uniform(0, 1, (400, WIDTH)).astype(np.float32)
    values[:, 5] *= 60
    weight = draw.normal(size=(WIDTH, 64)).astype(np.float32)
    shifted, symmetric_cpu = pick(values, weight, "gpu-int8"), pick(values, weight, "cpu")
    assert shifted.shifted
    assert not symmetric_cpu.shifted  # an asymmetric format has all its steps already
    moved = (values - shifted.shift) / shifted.scale
    assert abs(moved.max() + moved.min()) < 0.05 * moved.max()


def test_even_channels_are_left_as_they_are() -> None:
    draw = np.random.default_rng(5)
    values = draw.uniform(-1, 1, (400, WIDTH)).astype(np.float32)
    weight = draw.uniform(-1, 1, (WIDTH, 64)).astype(np.float32)
    assert pick(values, weight, "gpu-int8").alpha is None
    assert pick(values, weight, "gpu-int8", alphas=(0.5,), forced=True).alpha == 0.5


def test_fp8_rounds_as_the_type_does() -> None:
    values = np.random.default_rng(6).normal(size=1000).astype(np.float32)
    spec = QuantSpec(dtype=QuantDType.FP8_E4M3)
    got = fake_quantize(values, Range(min=-2.0, max=2.0), spec)
    scale = np.float32(2.0 / 448)
    expected = np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(got, expected)
    weight = values.reshape(50, 20)
    error = np.abs(fake_quantize_weight(weight, spec) - weight).max(axis=0)
    assert np.all(error <= np.abs(weight).max(axis=0) / 16)  # three mantissa bits: half a step of the top binade


def attention(path: Path, *, bias: bool, softmax: bool = True, seen: bool = False) -> Path:
    """x -> V projection, mean over tokens by softmax of another input -> output projection -> y; heads of 8 channels."""
    draw = np.random.default_rng(4)
    weights = {name: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("wv", "wo")}
    weights["wv"][:, 3] *= 40  # an outlier channel
    weights |= {"bv": draw.normal(size=WIDTH).astype(np.float32) + 4}
    weights |= {"heads": np.int64([0, 0, WIDTH // 8, 8]), "flat": np.int64([0, 0, WIDTH])}
    nodes = [
        helper.make_node("MatMul", ["x", "wv"], ["v0"], name="value"),
        *([helper.make_node("Add", ["v0", "bv"], ["v1"], name="value bias")] if bias else []),
        helper.make_node("Reshape", ["v1" if bias else "v0", "heads"], ["v2"], name="split"),
        helper.make_node("Transpose", ["v2"], ["v3"], name="to heads", perm=[0, 2, 1, 3]),
        helper.make_node("Softmax" if softmax else "Identity", ["scores"], ["p"], name="weights"),
        helper.make_node("MatMul", ["p", "v3"], ["c0"], name="context"),
        helper.make_node("Transpose", ["c0"], ["c1"], name="from heads", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["c1", "flat"], ["c"], name="join"),
        helper.make_node("MatMul", ["c", "wo"], ["y"], name="output"),
    ]
    inputs = [("x", ["b", "t", WIDTH]), ("scores", ["b", WIDTH // 8, "t", "t"])]
    outputs = [("y", ["b", "t", WIDTH])] + ([("v3", ["b", WIDTH // 8, "t", 8])] if seen else [])
    return prepare(graphs.save(path, nodes, inputs, outputs, weights), path.with_name("canonical.onnx")).path


def gated(path: Path) -> Path:
    """x -> sigmoid(gate) * up -> down -> y."""
    draw = np.random.default_rng(5)
    weights = {name: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("wg", "wu", "wd")}
    nodes = [
        helper.make_node("MatMul", ["x", "wg"], ["g0"], name="gate"),
        helper.make_node("Sigmoid", ["g0"], ["g"], name="act"),
        helper.make_node("MatMul", ["x", "wu"], ["u"], name="up"),
        helper.make_node("Mul", ["g", "u"], ["c"], name="product"),
        helper.make_node("MatMul", ["c", "wd"], ["y"], name="output"),
    ]
    return graphs.save(path, nodes, [("x", ["b", WIDTH])], [("y", ["b", WIDTH])], weights)


def smoothing_of(tensor: str, *, shifted: bool) -> Smoothing:
    draw = np.random.default_rng(6)
    return Smoothing(
        group=Group(tensor=tensor, nodes=("output",), precision=Precision.INT8),
        alpha=0.5,
        shifted=shifted,
        scale=np.exp(draw.normal(size=WIDTH)).astype(np.float32),
        shift=draw.normal(size=WIDTH).astype(np.float32) if shifted else np.zeros(WIDTH, np.float32),
        error=0.0,
        plain_error=1.0,
    )


@pytest.mark.parametrize(
    ("graph", "more", "shifted", "folds"),
    [
        ("attention", {"bias": True}, True, True),
        ("attention", {"bias": False}, True, True),
        ("attention", {"bias": True}, False, True),
        ("attention", {"bias": True, "softmax": False}, False, True),
        ("attention", {"bias": True, "softmax": False}, True, False),  # these weights need not sum to 1
        ("attention", {"bias": True, "seen": True}, False, False),  # somebody else reads the values
        ("gated", {}, False, True),
        ("gated", {}, True, False),
    ],
)
def test_what_is_linear_upstream_takes_smoothing_in(
    tmp_path: Path, graph: str, more: dict[str, bool], shifted: bool, folds: bool
) -> None:
    path = attention(tmp_path / "m.onnx", **more) if graph == "attention" else gated(tmp_path / "m.onnx")
    draw = np.random.default_rng(7)
    feeds = {"x": draw.normal(size=(2, 5, WIDTH)).astype(np.float32)}
    if graph == "attention":
        feeds["scores"] = draw.normal(size=(2, WIDTH // 8, 5, 5)).astype(np.float32)
    else:
        feeds["x"] = feeds["x"][0]
    model, chosen = models.load(path), smoothing_of("c", shifted=shifted)
    changed = apply(model, {"c": chosen})
    kinds = [n.op_type for n in model.graph if "/smoothing/" in (n.name or "")]
    if folds:
        assert changed == (("v3", "c") if graph == "attention" else ("c",))
        assert len(kinds) <= 2  # an Add for the shift where there is no bias, never anything in front of the quantizer
        assert "Mul" not in kinds
    else:
        assert "Mul" in kinds
    models.save(model, tmp_path / "smoothed.onnx")
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5
    if folds:
        low, high = tapped(tmp_path / "smoothed.onnx", feeds, ["c"])["c"]
        before = tapped(path, feeds, ["c"])["c"]
        np.testing.assert_allclose(low, (before[0] - chosen.shift) / chosen.scale, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(high, (before[1] - chosen.shift) / chosen.scale, rtol=1e-3, atol=1e-4)


def massive(path: Path) -> Path:
    """x -> Relu -> GEMM with a bias -> y; one channel has large activations and large weights."""
    draw = np.random.default_rng(12)
    weights = {
        "w": draw.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "b": draw.normal(size=WIDTH).astype(np.float32),
    }
    weights["w"][5] *= 30
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w"], ["m"], name="output"),
        helper.make_node("Add", ["m", "b"], ["y"], name="bias"),
    ]
    return graphs.save(path, nodes, [("x", ["b", WIDTH])], [("y", ["b", WIDTH])], weights)


def test_a_channel_that_is_large_on_both_sides_is_multiplied_apart(tmp_path: Path) -> None:
    path, feeds = massive(tmp_path / "m.onnx"), {"x": outlying(400)}
    plan = plan_for(path, "gpu-int8", {"output"})
    extremes = tapped(path, feeds, ["r"])
    (found,) = search(path, plan, extremes, [feeds])
    assert found.outliers == (5,)
    model = models.load(path)
    assert apply(model, by_tensor([found])) != ()
    models.save(model, tmp_path / "smoothed.onnx")
    weight = next(n for n in model.graph if n.name == "output").inputs[1]
    assert not weight.const_value.numpy()[5].any()
    assert model.graph.outputs[0].name == "y"
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5
    # By an independent measure: without the channel, the two roundings cost less than the best alpha does with it.
    values, weight = np.maximum(feeds["x"], 0), original(path)
    kept = np.where(np.arange(WIDTH) == 5, 0, weight.T).T.astype(np.float32)
    energy, share = (float(((values.astype(np.float64) @ w) ** 2).sum()) for w in (weight, kept))
    apart = independent_error(values, kept, found, symmetric=True) * share / energy
    assert apart == pytest.approx(found.error, rel=0.1)
    assert apart < 0.8 * independent_error(values, weight, pick(values, weight, "gpu-int8"), symmetric=True)


def original(path: Path) -> np.ndarray:
    weight = next(n for n in models.load(path).graph if n.name == "output").inputs[1]
    return weight.const_value.numpy()


@pytest.mark.parametrize("nodes", [("one",), ("one", "two")], ids=["a GEMM behind a norm", "two GEMMs"])
def test_nothing_is_multiplied_apart_where_it_would_part_a_kernel(tmp_path: Path, nodes: tuple[str, ...]) -> None:
    path = normed(tmp_path / "m.onnx", shared=False, gemm=False)
    plan = plan_for(path, "gpu-int8", set(nodes))
    feeds = {"x": outlying(400)}
    found = search(path, plan, tapped(path, feeds, ["n"]), [feeds])
    assert [c.outliers for c in found] == [()]


def test_a_residual_add_reads_the_smoothed_pair_of_its_gemms(tmp_path: Path) -> None:
    path = normed(tmp_path / "m.onnx", shared=True, gemm=False)
    plan = plan_for(path, "gpu-int8", {"one", "two", "residual"}, smooth=0.8)
    plan = replace(plan, nodes=tuple(replace(n, role=Role.RESIDUAL_ADD) if n.node == "residual" else n for n in plan))
    feeds = {"x": outlying(200)}
    chosen = search(path, plan, tapped(path, feeds, ["n"]), [feeds])
    assert chosen[0].group.adds == ("residual",)
    model = models.load(path)
    assert apply(model, by_tensor(chosen)) == ("n",)  # the norm takes it in: nobody reads its output as it was
    models.save(model, tmp_path / "smoothed.onnx")
    with OnnxRuntimeRunner(path) as one, OnnxRuntimeRunner(tmp_path / "smoothed.onnx") as two:
        expected, got = one.infer(feeds)["y"], two.infer(feeds)["y"]
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5
    (site,) = sites(models.load(tmp_path / "smoothed.onnx"), plan)
    restored = next(n.name for n in model.graph if n.name.startswith("n/restoring/Mul"))
    assert site.readers == (("one", 0), ("two", 0), (restored, 0))
