from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError
from report_samples import SOURCE, metrics, report, validation

from pipeline.errors import StoreError
from pipeline.report.contract import Report, Target, TargetStatus, schema, write_json
from pipeline.report.measured import Validation, nothing_measured

# What DESIGN promises to programs, written out; the code's types are held against it, not the other way round.
PROMISED = {
    "source",
    "calibration.samples",
    "calibration.seconds",
    "calibration.fp32_forward_seconds",
    "calibration.peak_rss_bytes",
    "calibration.method",
    "precision_plan[].node",
    "precision_plan[].role",
    "precision_plan[].precision",
    "precision_plan[].rule",
    "ranges[].tensor",
    "ranges[].method",
    "ranges[].min",
    "ranges[].max",
    "ranges[].scale",
    "ranges[].zero_point",
    "ranges[].alternatives.mse",
    "targets.cpu.status",
    "targets.cpu.reason",
    "targets.cpu.engine",
    "targets.cpu.bytes",
    "targets.cpu.seconds",
    "targets.a100.compiled.kernels",
    "targets.a100.compiled.fused_attention",
    "targets.a100.compiled.low_precision_flops_share",
    "targets.a100.compiled.bytes_moved",
    "validation.cpu.outputs.pooled.sqnr_db",
    "validation.cpu.outputs.pooled.cosine",
    "validation.cpu.outputs.pooled.max_abs",
    "validation.cpu.task",
    "validation.cpu.latency_ms.b1.p90",
    "validation.cpu.verdict",
    "validation.cpu.gates",
    "notices[].code",
    "stages[].name",
    "stages[].seconds",
    "stages[].fresh",
    "manifest",
    "schema_version",
    "versions.onnxruntime",
}


def keys(value: Any, prefix: str = "") -> set[str]:
    found = {prefix} if prefix else set()
    if isinstance(value, dict):
        for name, item in value.items():
            found |= keys(item, f"{prefix}.{name}" if prefix else name)
    if isinstance(value, list):
        for item in value:
            found |= keys(item, prefix + "[]")
    return found


def test_the_promised_keys_are_there() -> None:
    assert keys(json.loads(report().to_json())) >= PROMISED


def test_json_round_trip_is_exact() -> None:
    text = report().to_json()
    assert Report.from_json(text) == report()
    assert Report.from_json(text).to_json() == text


def test_equal_reports_give_equal_text() -> None:
    other = report()
    turned = report(
        targets=dict(reversed(other.targets.items())),
        validation=dict(reversed(other.validation.items())),
        versions=dict(reversed(other.versions.items())),
    )
    assert turned == other
    assert turned.to_json() == other.to_json()


def test_text_follows_the_published_schema() -> None:
    published = schema()
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    values = json.loads(report().to_json())
    validator.validate(values)
    del values["calibration"]["seconds"]
    assert [e.validator for e in validator.iter_errors(values)] == ["required"]


@pytest.mark.parametrize("name", ["status", "reason", "engine", "bytes", "seconds", "compiled", "variant"])
def test_every_key_is_required_by_the_schema(name: str) -> None:
    """A key that exists in one report exists in all: programs need no ``get``."""
    assert name in schema()["$defs"]["Target"]["required"]


def test_no_key_of_the_contract_may_be_left_out() -> None:
    for part in (schema(), *schema()["$defs"].values()):
        if part["type"] == "object":
            assert set(part["required"]) == set(part["properties"]), part["title"]
            assert part["additionalProperties"] is False


def test_unmeasured_and_measured_targets_have_the_same_keys() -> None:
    values = json.loads(report().to_json())["validation"]
    assert set(values["cpu"]) == set(values["a100"])
    assert values["a100"]["latency_ms"] is None
    assert values["a100"]["not_measured"]["latency_ms"] == "no engine was run on this machine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_floats_are_finite(bad: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        validation(outputs={"y": metrics(bad)})


def test_unknown_keys_fail() -> None:
    values = json.loads(report().to_json())
    values["targets"]["cpu"]["stauts"] = "built"
    with pytest.raises(StoreError, match=r"targets\.cpu\.stauts"):
        Report.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_broken_file_is_an_error_with_a_fix(text: str) -> None:
    with pytest.raises(StoreError) as caught:
        Report.from_json(text, where="build/report.json")
    assert caught.value.where == "build/report.json"
    assert caught.value.fix


def test_targets_and_validation_have_the_same_names() -> None:
    with pytest.raises(ValidationError, match="same keys"):
        report(validation={"cpu": validation()})


def target(status: TargetStatus) -> Target:
    return Target(status=status, reason=None, variant=None, engine=None, bytes=None, seconds=None, compiled=None)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([("built", "passed")], "passed"),
        ([("built", "passed"), ("compile_checked", "not_measured")], "passed"),
        ([("built", "passed"), ("built", "not_measured")], "not_measured"),
        ([("built", "passed"), ("compile_checked", "failed")], "failed"),
        ([("skipped", "not_measured")], "not_measured"),
        ([], "not_measured"),
    ],
)
def test_overall_verdict(targets: list[tuple[str, str]], expected: str) -> None:
    made = report(
        targets={f"t{i}": target(TargetStatus(status)) for i, (status, _) in enumerate(targets)},
        validation={f"t{i}": validation(verdict=verdict) for i, (_, verdict) in enumerate(targets)},
    )
    assert made.verdict == expected


def test_what_validation_stores_goes_in_as_it_is() -> None:
    """The two rooms may not import each other; this holds their fields together."""
    from pipeline.validation import measurement as stored
    from pipeline.validation.thresholds import judge

    timing = stored.Timing(p50=2.0, p90=2.2, min=1.9, max=3.0, cpu_p50=2.0)
    row = stored.BatchLatency(
        batch=1,
        runs=7,
        p50=1.0,
        p90=1.1,
        min=0.9,
        max=1.5,
        cpu_p50=1.0,
        fp32=timing,
        speedup=2.0,
        speedup_min=2.1,
        speedup_cpu=None,
    )
    outputs = {"y": stored.OutputMetrics(count=3, sqnr_db=21.5, cosine=0.99)}
    for measured in (
        stored.Measurements(mode=stored.Mode.SIMULATED, samples=2, threads=0),
        stored.Measurements(
            mode=stored.Mode.MEASURED,
            samples=2,
            threads=1,
            stages={"qdq_plain": outputs, "engine": outputs},
            task=stored.TaskMeasurement(name="accuracy", fp32={"accuracy": 0.9}, engine={"accuracy": None}),
            latency_ms={"b1": row},
            engine_bytes=10,
            fp32_bytes=40,
            layers=(stored.LayerLoss(node="n", local_sqnr_db=1.0, isolated_sqnr_db=None, noise_share=1.0),),
            not_measured={"layers": "why"},
        ),
    ):
        values = {**measured.to_dict(), **judge(measured, {"sqnr_db": ">= 20"}).to_dict()}
        part = Validation.model_validate(values)
        assert json.loads(part.model_dump_json()) == json.loads(json.dumps(values))


def test_nothing_measured_judges_nothing() -> None:
    part = nothing_measured("no data")
    assert part.verdict == "not_measured"
    assert set(part.not_measured.values()) == {"no data"}
    assert all(getattr(part, key) is None for key in part.not_measured)


def test_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "build" / "report.json"
    write_json(report(), path)
    before = path.read_bytes()
    assert json.loads(before)["source"]["name"] == SOURCE.name

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match="No space left"):
        write_json(report(name="other"), path)
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert path.read_bytes() == before


def test_numpy_figures_are_plain_numbers_in_the_text() -> None:
    part = validation(outputs={"y": metrics(float(np.float32(12.5)))})
    assert json.loads(part.model_dump_json())["outputs"]["y"]["sqnr_db"] == 12.5
