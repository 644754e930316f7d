from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Validation
from pipeline.validation.measurement import (
    BatchLatency,
    LayerLoss,
    Measurements,
    Mode,
    OutputMetrics,
    TaskMeasurement,
    Timing,
)
from pipeline.validation.thresholds import Status, Threshold, judge


def latency(batch: int, p50: float, fp32: float) -> BatchLatency:
    return BatchLatency(
        batch=batch, runs=9, p50=p50, p90=p50 * 1.5, min=p50, max=p50 * 2, cpu_p50=p50,
        fp32=Timing(p50=fp32, p90=fp32 * 1.5, min=fp32, max=fp32 * 2, cpu_p50=fp32),
        speedup=fp32 / p50, speedup_min=fp32 / p50, speedup_cpu=None,
    )  # fmt: skip


def output(**values: float | bool) -> OutputMetrics:
    base = {"count": 10, "sqnr_db": 20.0, "cosine": 0.99, "max_abs": 0.5, "mean_abs": 0.1, "relative_l2": 0.1}
    return OutputMetrics(**{**base, **values})


@pytest.fixture
def measured() -> Measurements:
    return Measurements(
        mode=Mode.MEASURED,
        samples=4,
        threads=1,
        stages={"qdq_plain": {"a.b": output(sqnr_db=30.0)}, "engine": {"a.b": output(), "c": output(sqnr_db=15.0, max_abs=2.0)}},
        task=TaskMeasurement(name="f1", fp32={"f1": 0.8, "kappa": 0.5}, engine={"f1": 0.796, "kappa": None}),
        latency_ms={"b1": latency(1, 5.0, 10.0), "b8": latency(8, 40.0, 50.0)},
        engine_bytes=30,
        fp32_bytes=100,
        layers=(LayerLoss(node="n", local_sqnr_db=1.0, isolated_sqnr_db=None, noise_share=1.0),),
        not_measured={"x": "why"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "condition", "value", "passed"),
    [
        ("sqnr_db", ">= 15", 15.0, True),  # the worst output decides
        ("sqnr_db", "> 15", 15.0, False),
        ("max_abs", "<= 1", 2.0, False),
        ("outputs.a.b.sqnr_db", ">= 20", 20.0, True),
        ("outputs.c.max_abs", "<2.5", 2.0, True),
        ("task.f1", ">= 99% of fp32", 0.796, True),
        ("task.f1", ">= 99.9 % OF fp32", 0.796, False),
        ("task.f1", ">= 0.79", 0.796, True),
        ("latency_ms.p50", "<= 5", 5.0, True),  # the smallest batch
        ("latency_ms.b8.p90", "<= 50", 60.0, False),
        ("latency_ms.b8.p90", "<= 80% of fp32", 60.0, True),
        ("speedup", ">= 1.5", 2.0, True),
        ("speedup.b8", ">= 1.5", 1.25, False),
        ("engine_bytes", "<= 30% of fp32", 30, True),
        ("engine_bytes", "<= 2.9e1", 30, False),
        ("nonfinite", "<= 0", 0, True),
    ],
)
def test_gate(measured: Measurements, key: str, condition: str, value: float, passed: bool) -> None:
    verdict = judge(measured, {key: condition})
    (gate,) = verdict.gates
    assert (gate.value, gate.passed) == (value, passed)
    assert verdict.status is (Status.PASSED if passed else Status.FAILED)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sqnr", "sqnr_db"),
        ("cosin", "cosine"),
        ("latency_ms.p95", "latency_ms.p90"),
        ("latency_ms.b8.p9", "latency_ms.b8.p90"),
        ("latency.p90", "latency_ms.p90"),
        ("outputs.c.sqnr", "outputs.c.sqnr_db"),
        ("engine_byte", "engine_bytes"),
        ("outputs.d.sqnr_db", "outputs.c.sqnr_db"),
        ("task.f2", "task.f1"),
        ("speedup.8", "speedup"),
        ("zzzzzzzz", "There are: sqnr_db"),
    ],
)
def test_an_unknown_key_names_the_nearest(measured: Measurements, key: str, nearest: str) -> None:
    with pytest.raises(RecipeError) as caught:
        judge(measured, {key: ">= 1"})
    assert nearest in caught.value.fix
    assert key in caught.value.where


@pytest.mark.parametrize("condition", ["20", ">= ", "== 3", ">= 1.2.3", ">= 5% of int8", "=> 3", ">= nan"])
def test_a_condition_that_cannot_be_read(condition: str) -> None:
    with pytest.raises(RecipeError, match="not a condition"):
        Threshold.parse("sqnr_db", condition)


def test_a_comparison_with_fp32_is_not_relative_to_it_again() -> None:
    with pytest.raises(RecipeError, match="no FP32 figure"):
        Threshold.parse("sqnr_db", ">= 99% of fp32")


@given(number=st.floats(-1e6, 1e6), op=st.sampled_from([">=", "<=", ">", "<"]), relative=st.booleans())
def test_what_the_recipe_accepts_is_parsed(number: float, op: str, relative: bool) -> None:
    condition = f"{op} {number!r}{' % of fp32' if relative else ''}"
    Validation(gates={"engine_bytes": condition})
    threshold = Threshold.parse("engine_bytes", condition)
    assert (threshold.op, threshold.number, threshold.relative) == (op, number, relative)


def test_nothing_measured_is_no_pass() -> None:
    empty = Measurements(mode=Mode.SIMULATED, samples=0, threads=0, not_measured={"latency_ms": "no engine was run"})
    gates = {"latency_ms.p90": "<= 5", "sqnr_db": ">= 1", "task.f1": ">= 0", "engine_bytes": "<= 5", "speedup": "> 1"}
    verdict = judge(empty, gates)
    assert verdict.status is Status.NOT_MEASURED
    assert all(gate.passed is None and gate.value is None and gate.reason for gate in verdict.gates)
    assert verdict.gates[0].reason == "no engine was run"


def test_one_failed_gate_beats_one_not_measured(measured: Measurements) -> None:
    assert judge(measured, {"task.kappa": ">= 0", "sqnr_db": ">= 99"}).status is Status.FAILED
    assert judge(measured, {"task.kappa": ">= 0", "sqnr_db": ">= 1"}).status is Status.NOT_MEASURED
    assert judge(measured, {"latency_ms.b4.p50": "<= 1"}).status is Status.NOT_MEASURED
    assert judge(measured, {}).status is Status.NOT_MEASURED


def with_output(**values: float | bool | None) -> Measurements:
    metrics = OutputMetrics(**{"count": 4, "max_abs": 0.0, "mean_abs": 0.0, "cosine": 1.0, **values})
    return Measurements(mode=Mode.MEASURED, samples=1, threads=1, stages={"qdq_plain": None, "engine": {"y": metrics}})


def test_identical_outputs_pass_every_sqnr_gate() -> None:
    (gate,) = judge(with_output(exact=True, relative_l2=0.0), {"sqnr_db": ">= 200"}).gates
    assert (gate.passed, gate.value, gate.reason) == (True, None, "identical")
    json.dumps(judge(with_output(exact=True), {"sqnr_db": ">= 200"}).to_dict(), allow_nan=False)


def test_noise_on_an_all_zero_reference_fails() -> None:
    (gate,) = judge(with_output(mean_abs=0.1, max_abs=0.1), {"sqnr_db": ">= -100"}).gates
    assert gate.passed is False


def test_nan_in_the_output_fails_every_gate_on_it() -> None:
    broken = with_output(nonfinite=3, sqnr_db=60.0)
    for key in ("sqnr_db", "cosine", "max_abs"):
        (gate,) = judge(broken, {key: ">= -1"}).gates
        assert gate.passed is False
        assert "NaN" in (gate.reason or "")
    assert judge(broken, {"nonfinite": "<= 0"}).gates[0].value == 3


def test_json_round_trip(measured: Measurements) -> None:
    text = json.dumps(measured.to_dict(), allow_nan=False)
    assert Measurements.from_dict(json.loads(text)) == measured
    assert json.loads(text)["outputs"]["c"]["sqnr_db"] == 15.0


def test_outputs_fall_back_to_the_simulation(measured: Measurements) -> None:
    values = measured.to_dict()
    values["stages"]["engine"] = None
    simulated = Measurements.from_dict(values)
    assert judge(simulated, {"sqnr_db": ">= 30"}).status is Status.PASSED
    assert simulated.to_dict()["outputs"] == values["stages"]["qdq_plain"]


@pytest.mark.parametrize("change", [{"sample": 3}, {"samples": "many"}, {"mode": "guessed"}])
def test_a_damaged_file_is_a_clear_error(measured: Measurements, change: dict[str, object]) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Measurements.from_dict({**measured.to_dict(), **change})
