"""A cache that is stored in INT8, FP8 or FP16: types, and values against numpy, over several steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.compile_check import available, compile_check
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.build import BuildOptions, BuildResult, build
from pipeline.errors import DataError
from pipeline.graph.roles import find_roles
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import plan
from pipeline.recipe import PolicyConfig, Preset, RuleConfig, parse
from pipeline.types import Precision, Role
from pipeline.validation.feeds import fit
from tests.language.conftest import recipe
from tests.quantize.graphs import save
from tests.quantize.planning import run, write

HEADS, SIZE, LIMIT = 2, 16, 3.0
WEIGHT = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32) / 4
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.fixture
def attention(tmp_path: Path) -> Path:
    """Query times the keys of past and new tokens: k = x W, present = [past, k], y = q present^T."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["k"], name="key"),
        helper.make_node("Concat", ["past_key_values.0.key", "k"], ["present.0.key"], name="join", axis=2),
        helper.make_node("Transpose", ["present.0.key"], ["t"], name="turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "t"], ["y"], name="scores"),
    ]
    inputs = [(n, ["b", HEADS, s, SIZE]) for n, s in (("x", "s"), ("q", "s"), ("past_key_values.0.key", "p"))]
    outputs = [("present.0.key", ["b", HEADS, "t", SIZE]), ("y", ["b", HEADS, "s", "t"])]
    return save(tmp_path / "attention.onnx", nodes, inputs, outputs, {"w": WEIGHT})


def planned(path: Path, family: str, precision: Precision | None, **policy: object) -> PrecisionPlan:
    model = models.load(path)
    rules = () if precision is None else (RuleConfig(role=Role.KV_CACHE, precision=precision),)
    return plan(model, find_roles(model), PolicyConfig(preset=Preset.FP32, rules=rules, **policy), family)  # type: ignore[arg-type]


def types(path: Path) -> dict[str, int]:
    graph = onnx.load(path).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}


def steps(path: Path, dtype: np.dtype, *, optimize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return y of the last of three steps (4, 1 and 2 tokens), and the cache behind it."""
    rng = np.random.default_rng(3)
    cache = np.zeros((1, HEADS, 0, SIZE), dtype)
    for tokens in (4, 1, 2):
        x, q = (rng.normal(size=(1, HEADS, tokens, SIZE)).astype(np.float32) for _ in range(2))
        made = run(path, {"x": x, "q": q, "past_key_values.0.key": cache}, optimize=optimize)
        cache = made["present.0.key"]
    return made["y"], cache


def expected(store) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """The same in numpy, where ``store`` says what becomes of a key; returns y and the stored keys."""
    rng = np.random.default_rng(3)
    keys = np.zeros((1, HEADS, 0, SIZE), np.float32)
    for tokens in (4, 1, 2):
        x, q = (rng.normal(size=(1, HEADS, tokens, SIZE)).astype(np.float32) for _ in range(2))
        keys = np.concatenate([keys, store(x @ WEIGHT)], axis=2)
    return q @ keys.swapaxes(-1, -2), keys


def int8(values: np.ndarray) -> np.ndarray:
    scale = np.float32(LIMIT / 127)
    return np.clip(np.rint(values / scale), -128, 127).astype(np.float32) * scale


def fp8(values: np.ndarray) -> np.ndarray:
    scale = np.float32(LIMIT / 448)
    return np.clip(values / scale, -448, 448).astype(FP8).astype(np.float32) * scale


def test_the_node_that_joins_past_and_new_has_the_role(attention: Path) -> None:
    roles = find_roles(models.load(attention))
    assert {name for name, role in roles.items() if role.role is Role.KV_CACHE} == {"join"}


@pytest.mark.parametrize(("family", "optimize"), [("cpu", False), ("cpu", True), ("gpu-int8", False)])
def test_an_int8_cache_is_stored_joined_and_read_as_int8(
    attention: Path, tmp_path: Path, family: str, optimize: bool
) -> None:
    out = write(attention, planned(attention, family, Precision.INT8), {"k": (-LIMIT, LIMIT)}, tmp_path / "q.onnx").path
    assert types(out)["past_key_values.0.key"] == types(out)["present.0.key"] == TensorProto.INT8
    y, cache = steps(out, np.dtype(np.int8), optimize=optimize)
    wanted, keys = expected(int8)
    assert cache.dtype == np.int8
    assert cache.shape == (1, HEADS, 7, SIZE)
    np.testing.assert_array_equal(cache, np.rint(keys / np.float32(LIMIT / 127)).astype(np.int8))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(y - expected(lambda k: k)[0]).max() > 1e-3  # it is not the float graph


def test_nothing_is_quantized_twice_and_no_pair_is_left_over(attention: Path, tmp_path: Path) -> None:
    for family in ("cpu", "gpu-int8"):
        out = write(attention, planned(attention, family, Precision.INT8), {}, tmp_path / f"{family}.onnx").path
        kinds = [n.op_type for n in onnx.load(out).graph.node]
        assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 1
    # On a CPU the transpose moves bytes, and ONNX Runtime adds no pair of its own.
    order = [n.op_type for n in onnx.load(tmp_path / "cpu.onnx").graph.node]
    assert order.index("Transpose") < order.index("DequantizeLinear")


def test_an_fp8_cache_is_stored_as_fp8(attention: Path, tmp_path: Path) -> None:
    out = write(
        attention, planned(attention, "gpu-fp8", Precision.FP8), {"k": (-LIMIT, LIMIT)}, tmp_path / "q.onnx"
    ).path
    assert types(out)["past_key_values.0.key"] == types(out)["present.0.key"] == TensorProto.FLOAT8E4M3FN
    y, cache = steps(out, FP8, optimize=False)
    wanted, keys = expected(fp8)
    assert cache.dtype == FP8
    np.testing.assert_allclose(cache.astype(np.float32) * np.float32(LIMIT / 448), keys, rtol=1e-6)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not available(), reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(("precision", "family", "gpu"), [("int8", "gpu-int8", (8, 0)), ("fp8", "gpu-fp8", (8, 9))])
def test_both_compile_for_a_gpu(
    attention: Path, tmp_path: Path, precision: str, family: str, gpu: tuple[int, int]
) -> None:
    policy = PolicyConfig(preset=Preset.FP16, rules=(RuleConfig(role=Role.KV_CACHE, precision=Precision(precision)),))
    model = models.load(attention)
    out = write(attention, plan(model, find_roles(model), policy, family), {}, tmp_path / "q.onnx").path
    shape = (1, HEADS, 4, SIZE)
    found = compile_check(out, gpu, {"x": shape, "q": shape, "past_key_values.0.key": (1, HEADS, 8, SIZE)})
    assert found.layers


def test_a_half_precision_graph_has_a_half_precision_cache(attention: Path, tmp_path: Path) -> None:
    model = models.load(attention)
    made = plan(model, find_roles(model), PolicyConfig(preset=Preset.FP16), "gpu-fp16")
    out = write(attention, made, {}, tmp_path / "half.onnx").path
    found = types(out)
    assert found["past_key_values.0.key"] == found["present.0.key"] == TensorProto.FLOAT16
    assert found["x"] == found["y"] == TensorProto.FLOAT
    y, cache = steps(out, np.dtype(np.float16), optimize=False)
    np.testing.assert_allclose(y, expected(lambda k: k)[0], atol=0.05)
    assert cache.dtype == np.float16


@pytest.mark.parametrize(
    ("precision", "policy", "why"),
    [
        (Precision.INT4, {}, "stored in INT8 or FP8"),
        (Precision.INT8, {"activations": "dynamic"}, "one scale for all steps"),
    ],
)
def test_what_a_cache_cannot_be_stored_in_is_said(
    attention: Path, precision: Precision, policy: dict[str, object], why: str
) -> None:
    entry = next(n for n in planned(attention, "cpu", precision, **policy) if n.node == "join")
    assert entry.precision is Precision.FP32
    assert why in entry.rule


def test_only_an_empty_cache_fits_a_variant_of_another_type(attention: Path, tmp_path: Path) -> None:
    out = write(attention, planned(attention, "cpu", Precision.INT8), {}, tmp_path / "q.onnx").path
    x = np.ones((1, HEADS, 1, SIZE), np.float32)
    with OnnxRuntimeRunner(out) as runner:
        fitted = fit(runner, {"x": x, "q": x, "past_key_values.0.key": x[:, :, :0]})
        assert fitted["past_key_values.0.key"].dtype == np.int8
        with pytest.raises(DataError, match="stores its cache in int8"):
            fit(runner, {"x": x, "q": x, "past_key_values.0.key": x})


def test_mixed_precision_leaves_a_quantized_cache_as_it_is(
    llama: Path, built: tuple[Path, BuildResult], tmp_path: Path
) -> None:
    """A cache's type is that of the graph's inputs and outputs; no switch changes it."""
    out = Path(shutil.copytree(built[0], tmp_path / "b"))
    rules = [{"role": "kv_cache", "precision": "int8"}]
    wanted = recipe(llama, targets=["cpu", "a100"], policy={"rules": rules, "mixed_precision": {"low_share": 0.6}})
    build(parse(wanted), out, options=BuildOptions(until="plan"))
    for family in ("cpu", "gpu-int8"):
        folder = out / "variants" / family
        made = PrecisionPlan.from_json((folder / "precision_plan.json").read_text())
        cache = {n.node for n in made if n.role is Role.KV_CACHE}
        units = json.loads((folder / "mixed_precision.json").read_text())["units"]
        measured = {node for unit in units for node in unit["nodes"]}
        assert cache
        assert not cache & measured
        assert all(made.precisions()[node] is Precision.INT8 for node in cache)
        assert any(unit["high"] for unit in units)
