"""GPTQ against the paper's formula written out, and against round-to-nearest on what it is for."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline import model as models
from pipeline.build import BuildOptions, build
from pipeline.errors import RecipeError
from pipeline.graph.roles import find_roles
from pipeline.notices import collecting
from pipeline.policy.planning import plan
from pipeline.quantize.products import Reading
from pipeline.quantize.weights import rounding
from pipeline.quantize.weights.gptq import gptq, refine
from pipeline.quantize.weights.moments import Tap, second_moments
from pipeline.quantize.weights.rounding import RoundingOptions, round_weights
from pipeline.recipe import PolicyConfig, parse
from tests.quantize import graphs

BOTH = [{"op_type": "MatMul", "precision": "int8"}]
"""Both GEMMs of :func:`graphs.mlp`, the narrow one too."""


def correlated(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(channels, channels)) / 4 + np.eye(channels)
    return (draw.normal(size=(rows, channels)) * draw.uniform(0.1, 3, channels)) @ mixing


def int8(steps: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(steps), -127, 127)


def optimal_brain_quantizer(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, damping: float) -> np.ndarray:
    """The paper's equations 2 and 3 with the inverse computed afresh for what is left, in falling order of moments."""
    left = weight.astype(np.float64) / scale
    hessian = gram + damping * np.diagonal(gram).mean() * np.eye(len(gram))
    order = list(np.argsort(-np.diagonal(gram), kind="stable"))
    result = np.zeros(weight.shape)
    while order:
        row = order[0]
        inverse = np.linalg.inv(hessian[np.ix_(order, order)])
        result[row] = np.clip(np.rint(left[row]), -127, 127)
        lost = (left[row] - result[row]) / inverse[0, 0]
        left[order] -= np.outer(inverse[:, 0], lost)
        order = order[1:]
    return result


@pytest.mark.parametrize("channels", [24, 200])  # fewer and more than one block of rows
def test_it_is_the_paper_s_algorithm(channels: int) -> None:
    values = correlated(4 * channels, channels)
    weight = np.random.default_rng(1).normal(size=(channels, 12))
    scale = np.abs(weight).max(axis=0) / 127
    gram = values.T @ values
    got = gptq(weight, gram, scale, int8)
    np.testing.assert_array_equal(got, optimal_brain_quantizer(weight, gram, scale, 0.01))


def test_outputs_are_closer_than_with_round_to_nearest() -> None:
    values = correlated(600, 64)
    weight = np.random.default_rng(2).normal(size=(64, 32))
    scale = np.abs(weight).max(axis=0) / 7  # few steps, as with INT4
    rounded = gptq(weight, values.T @ values, scale, lambda x: np.clip(np.rint(x), -7, 7))
    nearest = np.clip(np.rint(weight / scale), -7, 7)
    errors = [np.square(values @ (w * scale - weight)).sum() for w in (rounded, nearest)]
    assert errors[0] < 0.6 * errors[1]
    assert np.abs(rounded).max() <= 7


@pytest.mark.parametrize("channels", [24, 200])
def test_going_over_the_rows_again_never_makes_outputs_worse(channels: int) -> None:
    values = correlated(4 * channels, channels)
    weight = np.random.default_rng(7).normal(size=(channels, 16))
    scale = np.abs(weight).max(axis=0) / 7

    def int4(steps: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(steps), -7, 7)

    gram = values.T @ values
    first = gptq(weight, gram, scale, int4)
    second = refine(weight, first, gram, scale, int4)
    damped = gram + 0.01 * np.diagonal(gram).mean() * np.eye(channels)
    errors = [float(np.einsum("ij,ik,kj->", e, damped, e)) for e in (first * scale - weight, second * scale - weight)]
    assert errors[1] < errors[0]
    # No single weight can be moved by a step and make it better.
    slope = damped @ (weight - second * scale)
    gain = np.abs(slope) * scale - np.diagonal(damped)[:, None] * scale**2 / 2
    free = np.abs(second) < 7
    assert (gain[free] <= 1e-9 * gain.max(initial=1.0) + 1e-9).mean() > 0.99


def adaround(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, *, strength: float) -> np.ndarray:
    """AdaRound (Nagel et al. 2020, equations 21 to 25) on the same second moments: up or down, by Adam, for steps of -7 to 7."""
    floor = np.floor(weight / scale)
    chance = np.clip(weight / scale - floor, 1e-3, 1 - 1e-3)
    logit = -np.log(1.2 / (chance + 0.1) - 1)
    mean, square = np.zeros_like(logit), np.zeros_like(logit)
    unit = weight.shape[1] / np.trace(weight.T @ gram @ weight)
    for step in range(1, 3001):
        sigmoid = 1 / (1 + np.exp(-logit))
        stretched = 1.2 * sigmoid - 0.1
        up = np.clip(stretched, 0, 1)
        grid = floor + up
        slope = 2 * unit * (gram @ (np.clip(grid, -7, 7) * scale - weight)) * scale * (np.abs(grid) <= 7)
        if step > 600:
            sharpness = 2 + 9 * (1 + np.cos(np.pi * (step - 600) / 2400))
            slope -= 2 * strength * sharpness * np.abs(2 * up - 1) ** (sharpness - 1) * np.sign(2 * up - 1)
        slope *= 1.2 * sigmoid * (1 - sigmoid) * ((stretched > 0) & (stretched < 1))
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        logit -= 0.01 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return np.clip(floor + (logit > 0), -7, 7)


@pytest.mark.parametrize("channels", [24, 64])
def test_the_sweeps_come_as_close_as_adaround(channels: int) -> None:
    """Both minimize the squared error of the outputs; AdaRound gets its best of three strengths of its regularizer."""
    ratios = []
    for seed in range(4):
        values = correlated(4 * channels, channels, seed=seed)
        weight = np.random.default_rng(seed).normal(size=(channels, 16))
        scale, gram = np.abs(weight).max(axis=0) / 7, values.T @ values

        def error(steps: np.ndarray, values=values, scale=scale, weight=weight) -> float:  # type: ignore[no-untyped-def]
            return float(np.square(values @ (steps * scale - weight)).sum())

        def int4(steps: np.ndarray) -> np.ndarray:
            return np.clip(np.rint(steps), -7, 7)

        ours = error(refine(weight, gptq(weight, gram, scale, int4), gram, scale, int4))
        theirs = min(error(adaround(weight, gram, scale, strength=s)) for s in (0.01, 0.1, 1.0))
        assert theirs < 0.7 * error(int4(weight / scale))  # the reference does its work
        ratios.append(ours / theirs)
    assert max(ratios) < 1.05
    assert np.mean(ratios) < 1.0


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    values = correlated(100, 16)
    values[:, 3] = 0
    weight = np.random.default_rng(3).normal(size=(16, 8))
    scale = np.abs(weight).max(axis=0) / 127
    rounded = gptq(weight, values.T @ values, scale, int8)
    assert np.abs(rounded[3] - weight[3] / scale).max() <= 0.5 + 1e-9
    all_zero = gptq(weight, np.zeros((16, 16)), scale, int8)
    np.testing.assert_array_equal(all_zero, np.clip(np.rint(weight / scale), -127, 127))


def test_second_moments_leave_padding_out_and_do_not_depend_on_batches(tmp_path: Path) -> None:
    path, weights = graphs.mlp(tmp_path / "m.onnx")
    values = np.random.default_rng(4).normal(size=(40, 32)).astype(np.float32)
    hidden = np.maximum(values.astype(np.float64) @ weights["w1"] + weights["b1"], 0)
    for size in (40, 7):
        feeds = [{"x": values[i : i + size]} for i in range(0, 40, size)]
        found = second_moments(Tap(path, ["x", "r"], mask=None, threads=1), feeds, {"x": [Reading()], "r": [Reading()]})
        np.testing.assert_allclose(
            found["x", Reading()].gram[0], values.T.astype(np.float64) @ values, rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(found["r", Reading()].gram[0], hidden.T @ hidden, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("target", "preset"), [("cpu", "int8"), ("a100", "int8"), ("l40s", "fp8")])
@pytest.mark.parametrize("smooth", ["off", "auto"])
def test_a_build_stores_the_rounded_weights(tmp_path: Path, target: str, preset: str, smooth: str) -> None:
    path, weights = graphs.mlp(tmp_path / "m.onnx")
    values = correlated(300, 32, seed=5).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=values)

    def made(rounding: str) -> np.ndarray:
        recipe = parse(
            {
                "source": {"onnx": str(path)},
                "calibration": {"data": str(tmp_path / "data.npz"), "samples": 300, "method": "minmax"},
                "policy": {"preset": preset, "rounding": rounding, "smooth": smooth},
                "targets": [target],
            }
        )
        out = tmp_path / rounding
        build(recipe, out, options=BuildOptions(until="quantize"))
        family = {"cpu": "cpu", "a100": "gpu-int8", "l40s": "gpu-fp8"}[target]
        model = onnx.load(out / f"variants/{family}/model.onnx")
        stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        weight, scale = (next(v for k, v in stored.items() if k.startswith("w1") and k.endswith(e))
                         for e in ("_quantized", "_scale"))  # fmt: skip
        assert weight.dtype == (ml_dtypes.float8_e4m3fn if preset == "fp8" else np.int8)
        return weight.astype(np.float64) * scale.astype(np.float64)

    rounded, nearest = made("gptq"), made("rtn")
    assert rounded.shape == nearest.shape
    if smooth == "off":  # both stand for w1 itself
        errors = [np.square(values @ (w - weights["w1"])).sum() for w in (rounded, nearest)]
        assert errors[0] < errors[1]
    assert not np.array_equal(rounded, nearest)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_a_rounding_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    """A pass over the data for each weight, or one for both: what is rounded is not rounded again."""
    path, _ = graphs.mlp(tmp_path / "m.onnx")
    model = models.load(path)
    policy = PolicyConfig.model_validate({"rules": BOTH, "rounding": "gptq"})
    made = plan(model, find_roles(model), policy, "gpu-int8")
    feeds = [{"x": correlated(64, 32).astype(np.float32)}]
    options = RoundingOptions(threads=1, memory_bytes=memory_bytes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert round_weights(path, made, feeds, whole, options) == 2

    class KilledError(Exception):
        pass

    def kill(_: str, done: int, __: int) -> None:
        if done:
            raise KilledError

    with pytest.raises(KilledError):
        round_weights(path, made, feeds, parts, options, kill)
    assert [f.name for f in parts.iterdir()] == ["00000.npz"]
    (parts / "00001.tmp").write_bytes(b"half a file")
    rounded = []
    by_gptq = rounding._ROUND["gptq"]
    monkeypatch.setitem(rounding._ROUND, "gptq", lambda *a, **k: rounded.append(a[0]) or by_gptq(*a, **k))
    assert round_weights(path, made, feeds, parts, options) == 2
    assert [m.node.name for m in rounded] == ["down"]
    for file in sorted(whole.iterdir()):
        assert (parts / file.name).read_bytes() == file.read_bytes()


def test_a_build_that_is_stopped_while_it_rounds_goes_on(tmp_path: Path) -> None:
    path, _ = graphs.mlp(tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=correlated(64, 32).astype(np.float32))
    recipe = parse(
        {
            "source": {"onnx": str(path)},
            "calibration": {"data": str(tmp_path / "data.npz"), "method": "minmax"},
            "policy": {"rounding": "gptq", "rules": BOTH},
        }
    )
    seen: list[int] = []

    def stop(stage: str, done: int, _: int) -> None:
        if stage == "round":
            seen.append(done)
            if seen == [0, 1]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "b", options=BuildOptions(until="quantize"), progress=stop)
    build(recipe, tmp_path / "b", options=BuildOptions(until="quantize"), progress=stop)
    assert seen == [0, 1, 1, 2]
    build(recipe, tmp_path / "whole", options=BuildOptions(until="quantize"))
    one, two = (tmp_path / d / "variants/cpu/model.onnx" for d in ("b", "whole"))
    assert one.read_bytes() == two.read_bytes()
    assert not (tmp_path / "b/.begun").exists()


def test_what_gptq_and_smoothing_do_not_reach_is_said(tmp_path: Path) -> None:
    path, _ = graphs.mlp(tmp_path / "m.onnx")
    policy = {"rounding": "gptq", "smooth": "auto", "activations": "dynamic"}
    recipe = parse({"source": {"onnx": str(path)}, "policy": policy})
    with collecting() as notices:
        build(recipe, tmp_path / "out", options=BuildOptions(until="quantize"))
    assert {"not-gptq", "not-smoothed"} <= {n.code for n in notices}


def test_gptq_without_data_is_refused_by_name(tmp_path: Path) -> None:
    path, _ = graphs.mlp(tmp_path / "m.onnx")
    values = correlated(64, 32).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=values)
    source = {"source": {"onnx": str(path)}, "targets": ["a100"]}
    build(
        parse({**source, "calibration": {"data": str(tmp_path / "data.npz"), "method": "minmax"}}),
        tmp_path / "first",
        options=BuildOptions(until="quantize"),
    )
    cache = tmp_path / "first/calibration/minmax.cache"
    recipe = parse({**source, "calibration": {"cache": str(cache)}, "policy": {"rounding": "gptq"}})
    with pytest.raises(RecipeError, match="GPTQ needs calibration data"):
        build(recipe, tmp_path / "out", options=BuildOptions(until="quantize"))
