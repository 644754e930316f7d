"""Simulated schemes against numpy, and the table of what executes them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper

from engines.target import TARGETS
from pipeline.errors import ModelError, RecipeError
from pipeline.graph.prepare import prepare
from pipeline.quantize.schemes import SCHEMES, SIMULATION_ONLY, schemes_named
from pipeline.quantize.simulate import simulate
from pipeline.quantize.weights.fake import nearest
from pipeline.triton.served import onnx_model
from pipeline.types import QuantDType, Range
from tests.quantize.graphs import save
from tests.quantize.planning import check, plan_for, run

WIDTH, CHANNELS = 96, 24


def simulated(tmp_path: Path, scheme: str, *, width: int = WIDTH, low: float = -4.0) -> tuple[Path, np.ndarray]:
    weight = np.random.default_rng(0).normal(size=(width, CHANNELS)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = save(tmp_path / "g.onnx", [node], [("x", ["b", "t", width])], [("y", ["b", "t", CHANNELS])], {"w": weight})
    out = tmp_path / f"{scheme}.onnx"
    simulate(path, plan_for(path, "cpu", {"product"}), SCHEMES[scheme], {"x": Range(min=low, max=4)}, out)
    check(out)
    return out, weight


def samples(width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 5, width)) * rng.lognormal(sigma=1.0, size=(3, 5, 1))
    x[0, 0] = 0.0
    x[1, 2, 7] = 40.0
    return x.astype(np.float32)


def float8(values: np.ndarray, scale: np.ndarray, kind: type, largest: float) -> np.ndarray:
    steps = np.clip(values / scale.astype(np.float32), -largest, largest)
    return steps.astype(kind).astype(np.float64) * scale


def in_blocks(x: np.ndarray, block: int) -> np.ndarray:
    rows = x.reshape(-1, block)
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    steps = np.rint(rows / np.where(scale > 0, scale, 1))
    return (steps * scale.astype(np.float64)).reshape(x.shape)


def int8_weight(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    return np.rint(weight / scale) * scale.astype(np.float64)


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_e5m2_rounds_to_even_and_saturates() -> None:
    values = np.array(
        [1.0, 1.1, 1.125, 1.375, -1.625, 57344, 60000, 61440, 1e9, -1e9, 2.0**-16, 2.0**-18, 0], np.float32
    )
    want = [1.0, 1.0, 1.0, 1.5, -1.5, 57344, 57344, 57344, 57344, -57344, 2.0**-16, 0, 0]
    assert nearest(values, QuantDType.FP8_E5M2).tolist() == want
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
    every = every[np.isfinite(every)]
    assert np.array_equal(nearest(every, QuantDType.FP8_E5M2), every)


@pytest.mark.parametrize(
    ("scheme", "weights", "activations"),
    [
        ("fp8-e5m2", (ml_dtypes.float8_e5m2, 57344), (ml_dtypes.float8_e5m2, 57344)),
        ("fp8-e4m3-e5m2", (ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e5m2, 57344)),
        ("fp8-e4m3", (ml_dtypes.float8_e4m3fn, 448), (ml_dtypes.float8_e4m3fn, 448)),
        ("fp8-e5m2-weights", (ml_dtypes.float8_e5m2, 57344), None),
    ],
)
def test_float8_equals_ml_dtypes_also_where_it_saturates(tmp_path: Path, scheme: str, weights, activations) -> None:
    path, weight = simulated(tmp_path, scheme)
    x = samples()
    assert np.abs(x).max() > 4  # the calibrated range
    rounded = x if activations is None else float8(x, np.float32(4 / activations[1]), *activations)
    want = rounded @ float8(weight, np.abs(weight).max(axis=0) / np.float32(weights[1]), *weights)
    close(run(path, {"x": x})["y"], want)
    if activations is not None:
        assert np.abs(rounded).max() == pytest.approx(4)


def microscaled(values: np.ndarray, kind: type, largest: float, exponent: int) -> np.ndarray:
    """OCP MX 1.0, section 6.3, along the last axis, element by element."""
    found = np.empty(values.shape)
    for index in np.ndindex(*values.shape[:-1], values.shape[-1] // 32):
        block = values[index[:-1]][index[-1] * 32 : index[-1] * 32 + 32].astype(np.float64)
        most = np.abs(block).max()
        shared = 2.0 ** ((max(k for k in range(-140, 130) if 2.0**k <= most) if most else 0) - exponent)
        steps = np.clip(block / shared, -largest, largest).astype(np.float32).astype(kind).astype(np.float64)
        found[index[:-1]][index[-1] * 32 : index[-1] * 32 + 32] = steps * shared
    return found


E4M3, E2M1 = (ml_dtypes.float8_e4m3fn, 448, 8), (ml_dtypes.float4_e2m1fn, 6, 2)


@pytest.mark.parametrize(
    ("scheme", "weights", "activations"),
    [("mxfp8", E4M3, E4M3), ("mxfp4-mxfp8", E2M1, E4M3), ("mxfp4-weights", E2M1, None)],
)
def test_microscaling_equals_the_specification(tmp_path: Path, scheme: str, weights, activations) -> None:
    path, weight = simulated(tmp_path, scheme)
    x = samples()
    x[1, 0, :32] = np.linspace(-0.5, 1, 32)  # the largest is a power of two
    x[1, 1, :32] = np.minimum(x[1, 0, :32], np.nextafter(np.float32(1), np.float32(0)))  # and just below it
    rounded = x if activations is None else microscaled(x, *activations)
    got = run(path, {"x": x})["y"]
    close(got, rounded @ microscaled(weight.T, *weights).T)
    assert not got[0, 0].any()


def test_fp4_weights_equal_ml_dtypes(tmp_path: Path) -> None:
    path, weight = simulated(tmp_path, "fp4-weights")
    x = samples()
    graph = onnx.load(path).graph
    (stored,) = (onnx.numpy_helper.to_array(i) for i in graph.initializer if list(i.dims) == [WIDTH, CHANNELS])
    close(run(path, {"x": x})["y"], x @ stored.astype(np.float64))
    blocks = stored.reshape(-1, 16, CHANNELS)
    for block in range(len(blocks)):
        for channel in range(CHANNELS):
            assert len(np.unique(np.abs(blocks[block, :, channel]))) <= 8
    error = np.abs(stored - weight).max(axis=0) / np.abs(weight).max(axis=0)
    assert error.max() < 0.2


@pytest.mark.parametrize(
    ("scheme", "width", "block"),
    [
        ("int8-per-token", 96, 96),
        ("int8-per-token", 37, 37),
        ("int8-block-32", 96, 32),
        ("int8-block-64", 128, 64),
        ("int8-block-128", 256, 128),
        ("int8-block-128", 96, 32),  # the largest smaller block that divides
    ],
)
@pytest.mark.parametrize("optimize", [False, True])
def test_scales_of_tokens_and_blocks_equal_numpy(
    tmp_path: Path, scheme: str, width: int, block: int, optimize: bool
) -> None:
    path, weight = simulated(tmp_path, scheme, width=width)
    x = samples(width)
    want = in_blocks(x, block) @ int8_weight(weight)
    got = run(path, {"x": x}, optimize=optimize)["y"]
    close(got, want)
    assert not got[0, 0].any()


@pytest.mark.parametrize("outliers", [[], [7, 20], list(range(WIDTH))])
def test_llm_int8_equals_numpy(tmp_path: Path, outliers: list[int]) -> None:
    path, weight = simulated(tmp_path, "llm-int8")
    x = samples().clip(-5, 5)
    x[2, 1, outliers] = 9.0
    apart = np.abs(x).max(axis=(0, 1)) > 6.0
    assert apart.sum() == len(outliers)
    want = in_blocks(np.where(apart, np.float32(0), x), WIDTH) + np.where(apart, x, 0)
    close(run(path, {"x": x})["y"], want @ int8_weight(weight))


@pytest.mark.parametrize("scheme", ["uint8", "int8-dynamic"])
def test_one_asymmetric_scale_equals_numpy(tmp_path: Path, scheme: str) -> None:
    path, weight = simulated(tmp_path, scheme, low=-3.0)
    x = samples()
    low, high = (np.float32(-3), np.float32(4)) if scheme == "uint8" else (x.min(), x.max())
    scale = (high - low) / np.float32(255)
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero).astype(np.float64) * scale
    close(run(path, {"x": x})["y"], rounded @ int8_weight(weight))


def test_a_block_that_does_not_divide_and_a_convolution_without_a_form_stay_float_and_are_counted(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(20, 16)).astype(np.float32), "k": rng.normal(size=(4, 1, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("Conv", ["m", "k"], ["y"], name="conv", kernel_shape=[3, 3]),
    ]
    path = save(tmp_path / "g.onnx", nodes, [("x", ["b", 1, 8, 20])], [("y", ["b", 4, 6, 14])], weights)
    plan, x = plan_for(path, "cpu", {"product", "conv"}), rng.normal(size=(2, 1, 8, 20)).astype(np.float32)
    ranges = {name: Range(min=-30, max=30) for name in ("x", "m")}
    counts = {}
    for name, scheme in SCHEMES.items():
        out = tmp_path / f"{name}.onnx"
        counts[name] = simulate(path, plan, scheme, ranges, out)
        exact = np.array_equal(run(out, {"x": x})["y"], run(path, {"x": x})["y"])
        assert exact is (counts[name][0] == 0)
    assert {n for n, c in counts.items() if c == (0, 2)} == {
        "int8-block-32",
        "int8-block-64",
        "int8-block-128",
        "mxfp8",
        "mxfp4-mxfp8",
        "mxfp4-weights",
        "fp4-weights",
        "int4-weights",
    }
    assert {n for n, c in counts.items() if c == (1, 2)} == {"int8-dynamic", "int8-per-token", "llm-int8"}
    assert {c for n, c in counts.items() if n.startswith("fp8") or n in ("int8", "uint8")} == {(2, 2)}


def test_products_of_one_tensor_or_one_weight_share_their_rounding(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], [n], name=n) for n in "ab"]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"], name="sum"))
    path = save(tmp_path / "g.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": w})
    out = tmp_path / "q.onnx"
    assert simulate(path, plan_for(path, "cpu", {"a", "b"}), SCHEMES["int8-per-token"], {}, out) == (2, 2)
    graph = onnx.load(out).graph
    assert [n.op_type for n in graph.node].count("Round") == 1
    assert [list(i.dims) for i in graph.initializer if len(i.dims) == 2] == [[32, 32]]


def test_the_same_simulation_has_the_same_bytes(tmp_path: Path) -> None:
    texts = [simulated(tmp_path / n, "int8-block-32")[0].read_bytes() for n in "ab" if not (tmp_path / n).mkdir()]
    assert texts[0] == texts[1]


def test_a_simulation_is_no_model_to_build_or_to_serve(tmp_path: Path) -> None:
    path, _ = simulated(tmp_path, "fp8-e5m2")
    with pytest.raises(ModelError, match="simulation of the scheme fp8-e5m2"):
        prepare(path, tmp_path / "canonical.onnx")
    with pytest.raises(ModelError, match="no model to compile or publish"):
        onnx_model(path, name="model")
    assert not (tmp_path / "canonical.onnx").exists()


def test_what_no_target_executes_is_called_so() -> None:
    only = {n for n, s in SCHEMES.items() if not s.deployable}
    blocks = {"int8-block-128", "int8-block-64", "int8-block-32"}
    assert only == blocks | {"fp8-e5m2", "fp8-e4m3-e5m2", "fp8-e5m2-weights", "mxfp8", "mxfp4-mxfp8", "mxfp4-weights"}
    assert {t.name for t in SCHEMES["fp4-weights"].targets} == {"b200", "rtx5090"}
    assert all((s.runs_on == SIMULATION_ONLY) is not s.deployable for s in SCHEMES.values())
    assert SCHEMES["llm-int8"].runs_on == SCHEMES["int8-per-token"].runs_on == "cpu"
    assert "t4" not in SCHEMES["fp8-e4m3"].runs_on.split(", ")
    assert {t.name for t in SCHEMES["int4-weights"].targets} == set(TARGETS) - {"t4"}


def test_schemes_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [s.name for s in schemes_named(("fp8-e5m2", "int8"))] == ["int8", "fp8-e5m2"]
    assert [s.name for s in schemes_named(())] == list(SCHEMES)
    with pytest.raises(RecipeError, match="no scheme 'int7'"):
        schemes_named(("int7",))


def test_a_weight_that_is_read_both_ways_round_has_scales_for_each(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    weight *= np.geomspace(0.1, 10, 32, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="columns"),
        helper.make_node("Gemm", ["x", "w"], ["z"], name="rows", transB=1),
    ]
    path = save(tmp_path / "g.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32]), ("z", ["b", 32])], {"w": weight})
    out = tmp_path / "s.onnx"
    assert simulate(path, plan_for(path, "cpu", {"columns", "rows"}), SCHEMES["int8-per-token"], {}, out) == (2, 2)
    x = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    got = run(out, {"x": x})
    close(got["y"], in_blocks(x, 32) @ int8_weight(weight))
    close(got["z"], in_blocks(x, 32) @ int8_weight(weight.T))
