"""`auto`'s check at the output, on a network where the least error per tensor is the wrong choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from calibrators.statistics import Request, Statistics
from pipeline.quantize.ranges.choose import choose_ranges
from pipeline.quantize.ranges.tune import _Trials, tune
from pipeline.recipe import Method
from pipeline.types import Precision
from tests.quantize.graphs import fake_quantize, save
from tests.quantize.planning import plan_for, sites_of, sketch


def outliers(path: Path) -> tuple[Path, dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """y = x w, where channel 0 of x is rare, huge and what the output lives on; the rest is many small values.

    Squared error over x's values asks for clipping; the output asks for the outlier.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 64)).astype(np.float32)
    x[:, 0] = 0.0
    x[::64, 0] = 60.0
    w = np.full((64, 16), 1e-3, np.float32)
    w[0] = 1.0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")]
    save(path, nodes, [("x", ["b", 64])], [("y", ["b", 16])], {"w": w})
    return path, {"w": w}, [{"x": x[:256]}, {"x": x[256:]}]


def chosen_for(path: Path, feeds: list[dict[str, np.ndarray]], family: str = "cpu"):
    plan = plan_for(path, family, {"mm"}, elsewhere=Precision.FP32)
    everything = np.concatenate([f["x"] for f in feeds])
    seen = Statistics({Request("x"): sketch(everything)}, model_sha256="0" * 64, samples=len(everything))
    return plan, choose_ranges(sites_of(path, plan), seen, Method.AUTO)


def output_noise(feeds, w: np.ndarray, low: float, high: float, *, symmetric: bool) -> float:
    """Noise energy over signal energy, in numpy."""
    noise = signal = 0.0
    for feed in feeds:
        want = feed["x"].astype(np.float64) @ w
        noise += np.sum((fake_quantize(feed["x"], low, high, symmetric=symmetric) @ w - want) ** 2)
        signal += np.sum(want**2)
    return noise / signal


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_noise_is_that_of_numpy(tmp_path: Path, family: str) -> None:
    path, weights, feeds = outliers(tmp_path / "o.onnx")
    plan, ranges = chosen_for(path, feeds, family)
    trials = _Trials(path, plan, ranges, feeds, None, 1)
    for method, kept in ranges[0].options.items():
        want = output_noise(feeds, weights["w"], kept.min, kept.max, symmetric=family != "cpu")
        assert trials.noise([ranges[0].use(method)])[-1] == pytest.approx(want, rel=1e-3)


def test_the_output_overrules_the_least_error_per_tensor(tmp_path: Path) -> None:
    path, weights, feeds = outliers(tmp_path / "o.onnx")
    plan, ranges = chosen_for(path, feeds)
    steps: list[tuple[int, int]] = []
    noise = {m: output_noise(feeds, weights["w"], r.min, r.max, symmetric=False) for m, r in ranges[0].options.items()}
    assert noise[ranges[0].method] > 4 * min(noise.values())  # the premise: the per-tensor choice is wrong here
    [tuned] = tune(path, plan, ranges, feeds, progress=lambda stage, done, total: steps.append((done, total)))
    assert noise[tuned.method] == pytest.approx(min(noise.values()), rel=0.02)
    assert tuned.range == tuned.options[tuned.method]
    assert tuned.errors == ranges[0].errors
    assert all(done <= total for done, total in steps)
    assert steps[-1][0] == steps[-1][1]


def test_padding_does_not_count(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
        helper.make_node("Identity", ["idsmask"], ["ids_out"], name="keep"),
    ]
    w = np.eye(16, dtype=np.float32)
    inputs = [("x", ["b", "t", 16]), ("idsmask", ["b", "t"])]
    path = save(tmp_path / "p.onnx", nodes, inputs, [("y", ["b", "t", 16]), ("ids_out", ["b", "t"])], {"w": w})
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    x[:, 3:] *= 1000  # at padding, beyond every range
    mask = np.array([[1, 1, 1, 0, 0]] * 2)
    feeds = [{"x": x, "idsmask": mask}]
    plan = plan_for(path, "cpu", {"mm"})
    seen = Statistics({Request("x"): sketch(x[:, :3])}, model_sha256="0" * 64, samples=2)
    ranges = choose_ranges(sites_of(path, plan), seen, Method.MINMAX)
    assert _Trials(path, plan, ranges, feeds, "idsmask", 1).noise(ranges)[-1] < 1e-3
    assert _Trials(path, plan, ranges, feeds, None, 1).noise(ranges)[-1] > 0.5


def test_nothing_to_compare_changes_nothing(tmp_path: Path) -> None:
    path, _, feeds = outliers(tmp_path / "o.onnx")
    plan, ranges = chosen_for(path, feeds)
    assert tune(path, plan, ranges, []) == ranges
    assert tune(path, plan, [], feeds) == ()
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"),
        helper.make_node("ArgMax", ["m"], ["ids"], axis=1, keepdims=0, name="class"),
    ]
    w = np.ones((64, 16), np.float32)
    integers = save(tmp_path / "i.onnx", nodes, [("x", ["b", 64])], [("ids", ["b"])], {"w": w})
    assert tune(integers, plan_for(integers, "cpu", {"mm"}), ranges, feeds) == ranges
