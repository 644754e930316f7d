from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import DataError, EngineError
from pipeline.types import TensorInfo
from pipeline.validation.latency import LatencyOptions, first_samples, measure_latency
from pipeline.validation.layers import LayerOptions
from pipeline.validation.measurement import Measurements, Mode
from pipeline.validation.thresholds import Status, judge
from pipeline.validation.validate import ValidateOptions, validate

QUICK = LatencyOptions(batches=(1, 4), repeats=8)


def sqnr(ref: np.ndarray, out: np.ndarray) -> float:
    return float(10 * np.log10((ref.astype(np.float64) ** 2).sum() / ((ref.astype(np.float64) - out) ** 2).sum()))


def masked(data) -> tuple[np.ndarray, np.ndarray]:
    x = np.concatenate([feeds["x"] for feeds in data])
    return x, np.concatenate([feeds["attention_mask"] for feeds in data]) > 0


@pytest.mark.exact_products
def test_stages_against_plain_numpy(models, data, by_hand) -> None:
    found = validate(models.fp32, models.qdq, data, options=ValidateOptions(threads=1, latency=QUICK))
    x, keep = masked(data)
    ref, out = by_hand(x)[1][keep], by_hand(x, "up", "down")[1][keep]
    plain, engine = found.stages["qdq_plain"], found.stages["engine"]
    assert plain is not None
    assert engine is not None
    assert plain["y"].sqnr_db == pytest.approx(sqnr(ref, out), abs=0.05)
    assert engine["y"].sqnr_db == pytest.approx(sqnr(ref, out), abs=0.5)  # fused kernels round elsewhere
    assert plain["y"].count == keep.sum() * 8
    assert found.samples == len(data) == 8
    assert found.engine_bytes == models.qdq.stat().st_size
    assert found.fp32_bytes == models.fp32.stat().st_size
    assert list(found.latency_ms or {}) == ["b1", "b4"]
    assert set(found.not_measured) == {"task", "layers"}
    assert Measurements.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_a_simulation_claims_nothing_of_the_engine(models, data) -> None:
    found = validate(models.fp32, models.qdq, data, options=ValidateOptions(mode=Mode.SIMULATED, threads=1))
    assert found.stages["engine"] is None
    assert found.outputs == found.stages["qdq_plain"]
    assert (found.latency_ms, found.engine_bytes) == (None, None)
    verdict = judge(found, {"sqnr_db": ">= 1", "latency_ms.p50": "<= 100"})
    assert verdict.status is Status.NOT_MEASURED
    assert "no engine was run" in (verdict.gates[1].reason or "")


@pytest.mark.exact_products
def test_everything_at_once(models, data) -> None:
    class Mean:
        name = "mean"

        def score(self, runner, data):
            return {"mean": float(np.mean([runner.infer(feeds)["y"].mean() for feeds in data]))}

    seen: list[tuple[str, int, int]] = []
    options = ValidateOptions(threads=1, latency=QUICK, task=Mean(), layers=LayerOptions())
    found = validate(models.fp32, models.qdq, data, options=options, progress=lambda *step: seen.append(step))
    assert found.not_measured == {}
    assert found.task is not None
    assert found.task.engine["mean"] == pytest.approx(found.task.fp32["mean"], abs=0.2)
    assert found.task.engine != found.task.fp32
    for stage in ("validate", "task", "latency", "layers"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps[-1][0] == steps[-1][1], stage
        assert steps == sorted(steps)


def test_the_same_model_is_exact(models, data) -> None:
    found = validate(models.fp32, models.fp32, data, options=ValidateOptions(latency=None, threads=1))
    assert found.outputs is not None
    assert found.outputs["y"].exact
    assert judge(found, {"sqnr_db": ">= 100"}).status is Status.PASSED


def test_no_samples(models, list_data) -> None:
    with pytest.raises(DataError, match="no validation samples"):
        validate(models.fp32, models.qdq, list_data())


def test_a_missing_input(models, list_data) -> None:
    data = list_data([{"wrong": np.zeros((1, 5, 8), np.float32)}])
    with pytest.raises(DataError) as caught:
        validate(models.fp32, models.qdq, data)
    assert caught.value.where == "input x"


def test_a_model_with_other_outputs(models, data, tmp_path: Path) -> None:
    other = onnx.load(models.qdq)
    other.graph.node[-1].output[0] = other.graph.output[0].name = "z"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(EngineError, match="lacks an output"):
        validate(models.fp32, tmp_path / "other.onnx", data)


class SlowRunner:
    """Takes a known time; remembers the order of the calls."""

    outputs: tuple[TensorInfo, ...] = ()

    def __init__(self, label: str, seconds: float, calls: list[tuple[str, int]], first: int | str = "batch") -> None:
        self.inputs = (TensorInfo(name="x", dtype=np.dtype(np.float32), shape=(first, 2)),)
        self.label, self.seconds, self.calls = label, seconds, calls

    def infer(self, feeds):
        self.calls.append((self.label, len(feeds["x"])))
        time.sleep(self.seconds)
        return {}

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None: ...


def test_latency_is_interleaved_and_true(list_data) -> None:
    calls: list[tuple[str, int]] = []
    data = list_data([{"x": np.zeros((2, 2), np.float32)}])
    options = LatencyOptions(batches=(3,), warmup=1, repeats=8)
    found = measure_latency(SlowRunner("f", 0.02, calls), SlowRunner("q", 0.005, calls), data, options)["b3"]
    assert [label for label, _ in calls] == ["f", "q"] + ["f", "q", "q", "f"] * 4
    assert {size for _, size in calls} == {3}
    assert found.runs == 8
    assert found.fp32.min >= 20
    assert found.min >= 5
    assert found.speedup == pytest.approx(found.fp32.p50 / found.p50)
    assert found.speedup_min == pytest.approx(found.fp32.min / found.min)
    assert found.speedup > 1.2
    assert found.min <= found.p50 <= found.p90 <= found.max
    assert found.fp32.cpu_p50 < 5  # asleep, so no CPU time


def test_latency_stops_at_its_time_bound(list_data) -> None:
    calls: list[tuple[str, int]] = []
    data = list_data([{"x": np.zeros((1, 2), np.float32)}])
    options = LatencyOptions(batches=(1,), warmup=0, repeats=1000, min_repeats=7, seconds=0.0)
    found = measure_latency(SlowRunner("f", 0.001, calls), SlowRunner("q", 0.001, calls), data, options)
    assert found["b1"].runs == 7


def test_a_fixed_batch_is_the_only_one_timed(list_data) -> None:
    calls: list[tuple[str, int]] = []
    data = list_data([{"x": np.zeros((4, 2), np.float32)}])
    options = LatencyOptions(batches=(1, 8), repeats=7, warmup=0)
    assert list(measure_latency(SlowRunner("f", 0, calls, 4), SlowRunner("q", 0, calls, 4), data, options)) == ["b4"]


def test_first_samples_are_repeated_and_end_where_shapes_change(list_data) -> None:
    data = list_data([{"x": np.arange(2.0)[:, None]}, {"x": np.array([[2.0]])}, {"x": np.zeros((1, 2))}])
    assert first_samples(data, 5)["x"].ravel().tolist() == [0, 1, 2, 0, 1]
    assert first_samples(data, 1)["x"].ravel().tolist() == [0]
    with pytest.raises(DataError, match="no samples"):
        first_samples(list_data(), 1)


def test_a_slower_engine_is_said_aloud(models, data, monkeypatch, caplog) -> None:
    infer = OnnxRuntimeRunner.infer

    def slow(self, feeds):
        time.sleep(0.004 if self.path == models.qdq else 0)
        return infer(self, feeds)

    monkeypatch.setattr(OnnxRuntimeRunner, "infer", slow)
    with caplog.at_level(logging.WARNING, logger="pipeline.notice"):
        validate(models.fp32, models.qdq, data, options=ValidateOptions(latency=QUICK, threads=1))
    assert "slower than FP32" in caplog.text


def test_half_precision_inputs_are_cast(tmp_path: Path, list_data) -> None:
    paths = []
    for dtype in (TensorProto.FLOAT, TensorProto.FLOAT16):
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"], name="add")],
            "g",
            [helper.make_tensor_value_info("x", dtype, ["batch", 2])],
            [helper.make_tensor_value_info("y", dtype, ["batch", 2])],
        )
        paths.append(tmp_path / f"{dtype}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), paths[-1])
    data = list_data([{"x": np.array([[0.1, 0.25]], np.float32)}])
    found = validate(*paths, data, options=ValidateOptions(latency=None))
    assert found.outputs is not None
    assert found.outputs["y"].max_abs == pytest.approx(2 * abs(0.1 - float(np.float16(0.1))), rel=1e-3)
