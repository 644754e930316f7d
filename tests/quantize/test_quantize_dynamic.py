"""Dynamic activations: a scale for each token, and outlier columns multiplied in float (LLM.int8())."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.recipe import PolicyConfig, parse
from tests.policy.test_planning_rules import chain
from tests.quantize.graphs import save
from tests.quantize.planning import plan_for, run, write

WIDTH, CHANNELS = 32, 24


def quantized(
    tmp_path: Path, *, rank: int = 3, threshold: float | None = 6.0, per_token: bool = True
) -> tuple[Path, np.ndarray]:
    """Return a quantized MatMul of a weight ``[WIDTH, CHANNELS]``, and the weight."""
    weight = np.random.default_rng(0).normal(size=(WIDTH, CHANNELS)).astype(np.float32)
    lead = ["b", "t", "h"][: rank - 1]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = save(tmp_path / "g.onnx", [node], [("x", [*lead, WIDTH])], [("y", [*lead, CHANNELS])], {"w": weight})
    made = plan_for(path, "cpu", {"product"}, dynamic=True, per_token=per_token, llm_int8_threshold=threshold)
    return write(path, made, {}, tmp_path / "q.onnx").path, weight


def activations(shape: tuple[int, ...], outliers: list[int]) -> np.ndarray:
    x = np.random.default_rng(1).normal(size=(*shape, WIDTH)).clip(-4, 4).astype(np.float32)
    x.reshape(-1, WIDTH)[-1, outliers] = -50.0
    return x


def dequantized(weight: np.ndarray) -> np.ndarray:
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    return np.rint(weight / scale) * scale.astype(np.float64)


def decomposed(x: np.ndarray, weight: np.ndarray, threshold: float | None, *, per_token: bool) -> np.ndarray:
    """LLM.int8() as its paper has it (section 3), with DynamicQuantizeLinear's uint8; float32 where that rounds."""
    rows = x.reshape(-1, x.shape[-1])
    outlier = np.abs(rows).max(axis=0) > (np.inf if threshold is None else threshold)
    ordinary = np.where(outlier, np.float32(0), rows)
    constant = np.abs(ordinary).max(axis=1, keepdims=True) if per_token else np.ones((len(rows), 1), np.float32)
    constant[constant == 0] = 1
    steps = ordinary / constant
    low, high = np.minimum(steps.min(), np.float32(0)), np.maximum(steps.max(), np.float32(0))
    scale = (high - low) / np.float32(255) or np.float32(1)
    zero = np.rint(-low / scale)
    integers = (np.clip(np.rint(steps / scale) + zero, 0, 255) - zero).astype(np.float64)
    whole = (integers @ dequantized(weight)) * scale * constant + rows[:, outlier] @ dequantized(weight)[outlier]
    return whole.reshape(*x.shape[:-1], CHANNELS)


@pytest.mark.exact_products
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("threshold", [6.0, None])
@pytest.mark.parametrize("outliers", [[], [3, 17], list(range(WIDTH))])
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 7), (1, 1), (2, 3, 4)])
def test_a_product_equals_the_papers_formula(
    tmp_path: Path, shape: tuple[int, ...], outliers: list[int], threshold: float | None, per_token: bool
) -> None:
    path, weight = quantized(tmp_path, rank=len(shape) + 1, threshold=threshold, per_token=per_token)
    x = activations(shape, outliers)
    want = decomposed(x, weight, threshold, per_token=per_token)
    for optimize in (False, True):
        got = run(path, {"x": x}, optimize=optimize)["y"]
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.exact_products
def test_every_batch_has_outlier_columns_of_its_own(tmp_path: Path) -> None:
    path, weight = quantized(tmp_path)
    for outliers in ([], [0], [31], [4, 5, 6]):
        x = activations((2, 5), outliers)
        want = decomposed(x, weight, 6.0, per_token=True)
        np.testing.assert_allclose(run(path, {"x": x}, optimize=True)["y"], want, atol=1e-5 * np.abs(want).max())


@pytest.mark.exact_products
def test_rows_of_zeros_and_batches_of_zeros_stay_zero(tmp_path: Path) -> None:
    path, _ = quantized(tmp_path)
    x = activations((2, 5), [3])
    x[0, 2] = 0.0
    assert not run(path, {"x": x}, optimize=True)["y"][0, 2].any()
    assert not run(path, {"x": np.zeros_like(x)}, optimize=True)["y"].any()


@pytest.mark.exact_products
def test_tokens_and_outlier_columns_apart_each_leave_less_error_than_one_scale(tmp_path: Path) -> None:
    x = activations((4, 16), [3, 17])
    x *= np.random.default_rng(3).lognormal(sigma=0.3, size=(4, 16, 1)).astype(np.float32)
    errors = {}
    for per_token in (False, True):
        for threshold in (None, 6.0):
            path, weight = quantized(tmp_path, threshold=threshold, per_token=per_token)
            got = run(path, {"x": x}, optimize=True)["y"]
            errors[per_token, threshold] = float(np.square(got - x @ weight).sum())
    assert errors[False, 6.0] < errors[False, None] / 10
    assert errors[True, None] < errors[False, None] / 4
    assert errors[True, 6.0] < errors[True, None]
    assert errors[True, 6.0] < errors[False, 6.0]


@pytest.mark.exact_products
@pytest.mark.parametrize("trans", [0, 1])
def test_a_gemm_adds_its_bias_once(tmp_path: Path, trans: int) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(WIDTH, CHANNELS)).astype(np.float32), rng.normal(size=CHANNELS).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="product", transB=trans)
    stored = {"w": np.ascontiguousarray(weight.T) if trans else weight, "c": bias}
    path = save(tmp_path / "g.onnx", [node], [("x", ["b", WIDTH])], [("y", ["b", CHANNELS])], stored)
    made = plan_for(path, "cpu", {"product"}, dynamic=True, per_token=True, llm_int8_threshold=6.0)
    x = activations((5,), [3])
    want = decomposed(x, weight, 6.0, per_token=True) + bias
    got = run(write(path, made, {}, tmp_path / "q.onnx").path, {"x": x}, optimize=True)["y"]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_products_of_one_tensor_share_everything_but_their_weights_rows(tmp_path: Path) -> None:
    weights = {n: np.random.default_rng(i).normal(size=(32, 32)).astype(np.float32) for i, n in enumerate("uv")}
    nodes = [helper.make_node("MatMul", ["x", n], [f"{n}y"], name=n) for n in weights]
    nodes.append(helper.make_node("Add", ["uy", "vy"], ["y"], name="sum"))
    path = save(tmp_path / "g.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], weights)
    made = plan_for(path, "cpu", set(weights), dynamic=True, per_token=True, llm_int8_threshold=6.0)
    result = write(path, made, {}, tmp_path / "q.onnx")
    kinds = [n.op_type for n in onnx.load(result.path).graph.node]
    assert [kinds.count(k) for k in ("DynamicQuantizeLinear", "NonZero", "Div", "MatMul")] == [1, 1, 1, 2]
    assert result.fusion is not None
    assert sum(result.fusion.integer_kernels.values()) == 2


def test_a_plan_carries_what_the_recipe_asks_for() -> None:
    model, roles = chain()
    policy = PolicyConfig(activations="dynamic-per-token", llm_int8_threshold=6.0)
    made = plan(model, roles, policy, "cpu")
    assert (made.dynamic, made.per_token, {n.llm_int8_threshold for n in made.quantized() if n.rounding}) == (
        True,
        True,
        {6.0},
    )
    assert PrecisionPlan.from_json(made.to_json()) == made


def test_a_gpu_keeps_static_ranges_and_says_so() -> None:
    model, roles = chain()
    policy = PolicyConfig(activations="dynamic", llm_int8_threshold=6.0)
    made = plan(model, roles, policy, "gpu-int8")
    assert (made.dynamic, made.per_token, {n.llm_int8_threshold for n in made}) == (False, False, {None})
    with collecting() as notices:
        remark(made, candidates(model, roles), policy)
    assert [n.code for n in notices] == ["not-dynamic"]
    assert "smoothing separates" in notices[0].message
    with collecting() as notices:
        remark(plan(model, roles, policy, "cpu"), candidates(model, roles), policy)
    assert not notices


def test_a_threshold_without_dynamic_activations_is_refused() -> None:
    with pytest.raises(RecipeError, match="set activations to dynamic"):
        parse({"source": {"onnx": "m.onnx"}, "policy": {"llm_int8_threshold": 6.0}})


@pytest.mark.exact_products
def test_a_column_that_just_reaches_the_threshold_is_no_outlier(tmp_path: Path) -> None:
    path, weight = quantized(tmp_path)
    x = activations((2, 5), [])
    x[1, 3, 8] = 6.0
    want = decomposed(x, weight, None, per_token=True)
    assert np.abs(want - decomposed(x, weight, 5.9, per_token=True)).max() > 1e-3 * np.abs(want).max()
    np.testing.assert_allclose(run(path, {"x": x}, optimize=True)["y"], want, atol=1e-5 * np.abs(want).max())
