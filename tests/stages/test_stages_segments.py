"""Builds of a model that is larger than the memory it may take: the same as of one that fits, but for the last bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.llama import Shape, write
from calibrators.collector import Statistics
from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import build
from pipeline.recipe import parse
from pipeline.running import memory, segmented

SMALL = 16
"""memory_mb: the model's two tables alone have as much."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with 36 MB of weights in FP32 (21 of them matrices), and data."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder / "m.onnx", Shape(width=128, layers=2), ir.DataType.FLOAT)
    for seed, name in enumerate(("calibration", "heldout")):
        np.savez(folder / f"{name}.npz", input_ids=np.random.default_rng(seed).integers(0, 32000, (10, 32)))
    return folder


def made(inputs: Path, out: Path, memory_mb: int | None, **sections: Any) -> Path:
    recipe = {
        "name": "m",
        "source": {"onnx": str(inputs / "m.onnx")},
        "calibration": {"data": str(inputs / "calibration.npz"), "batch_size": 4},
        "validate": {"data": str(inputs / "heldout.npz"), "latency": False},
        "memory_mb": memory_mb,
        "threads": 1,
        **sections,
    }
    build(parse(recipe), out, progress=lambda *step: TOLD.append(step))
    return out


TOLD: list[tuple[str, int, int]] = []
"""What the builds of this file said of their progress."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded whole by the line itself, and how often a segment was."""
    seen: list[str] = []
    for module, kind in ((memory, "whole"), (segmented, "segment")):
        plain = module.session

        def session(*args: Any, plain: Any = plain, kind: str = kind, **options: Any) -> Any:
            seen.append(kind)
            return plain(*args, **options)

        monkeypatch.setattr(module, "session", session)
    return seen


def report(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return found


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        ({"preset": "int8"}, "cpu"),
        ({"preset": "int8", "rounding": "gptq"}, "a100"),
        ({"preset": "int4", "rounding": "rtn"}, "cpu"),
    ],
)
def test_a_build_in_segments_is_the_build_of_the_whole_model(
    inputs: Path, tmp_path: Path, loaded: list[str], policy: dict[str, str], target: str
) -> None:
    sections = {"policy": policy, "targets": [target]}
    whole = made(inputs, tmp_path / "whole", None, **sections)
    assert set(loaded) == {"whole"}
    loaded.clear()
    parts = made(inputs, tmp_path / "parts", SMALL, **sections)
    assert set(loaded) == {"segment"}

    assert (parts / "model.fp32.onnx.data").read_bytes() == (whole / "model.fp32.onnx.data").read_bytes()
    family = next((parts / "variants").iterdir()).name
    plans = [json.loads((d / f"variants/{family}/precision_plan.json").read_text()) for d in (whole, parts)]
    assert plans[0] == plans[1]
    if (whole / "calibration/statistics.safetensors").exists():
        old, new = (Statistics.load(d / "calibration/statistics.safetensors") for d in (whole, parts))
        assert old.requests == new.requests
        for request in old.requests:
            if request.statistic == "sketch":
                assert (new[request.tensor].count, new[request.tensor].max) == (
                    old[request.tensor].count,
                    pytest.approx(old[request.tensor].max, rel=1e-4),
                )
    ids = {"input_ids": np.load(inputs / "heldout.npz")["input_ids"][:2]}
    results = []
    for directory in (whole, parts):
        with OnnxRuntimeRunner(directory / f"variants/{family}/model.onnx", optimize=False) as runner:
            results.append(runner.infer(ids)["logits"].astype(np.float64))
    noise = np.square(results[0] - results[1]).mean() / np.square(results[0]).mean()
    assert noise < 1e-3  # a step of a weight or an activation here and there; the quantization itself costs more
    one, other = (report(d)["validation"][target] for d in (whole, parts))
    assert other["outputs"]["logits"]["sqnr_db"] == pytest.approx(one["outputs"]["logits"]["sqnr_db"], abs=0.3)
    assert one["outputs"]["logits"]["sqnr_db"] < 45


def test_what_needs_the_whole_model_is_not_measured_and_the_report_says_why(
    inputs: Path, tmp_path: Path, caplog
) -> None:
    held = {"data": str(inputs / "heldout.npz"), "samples": 2, "latency": True, "per_layer": True}
    out = made(inputs, tmp_path / "parts", SMALL, targets=["cpu"], validate=held)
    measured = json.loads((out / "engines/cpu/measurements.json").read_text())
    assert measured["latency_ms"] is None
    assert measured["layers"] is None
    for key in ("latency_ms", "layers"):
        assert "ran in segments" in measured["not_measured"][key]
    assert "runs in segments" in caplog.text
    assert any(item["code"] == "runs-in-segments" for item in report(out)["notices"])


def test_progress_goes_evenly_from_segment_to_segment_and_from_weight_to_weight(inputs: Path, tmp_path: Path) -> None:
    TOLD.clear()
    made(inputs, tmp_path / "parts", SMALL, targets=["a100"], validate={}, policy={"smooth": "off"})
    steps = [(done, total) for stage, done, total in TOLD if stage == "calibrate"]
    (total,) = {total for _, total in steps}
    assert [done for done, _ in steps] == list(range(1, total + 1))
    assert total % 3 == 0  # three batches
    assert total > 3
    scales = [(done, total) for stage, done, total in TOLD if stage == "scales"]
    assert [done for done, _ in scales] == list(range(scales[-1][1] + 1))
    assert scales[-1][1] >= 14


def test_the_fusion_of_a_variant_is_counted_over_its_segments(inputs: Path, tmp_path: Path) -> None:
    facts = []
    for name, memory_mb in (("whole", None), ("parts", SMALL)):
        out = made(inputs, tmp_path / name, memory_mb, targets=["cpu"], validate={})
        facts.append(json.loads((out / ".stages/quantize.cpu.json").read_text())["facts"])
    assert facts[0]["integer_kernels"]["MatMulIntegerToFloat"] > 10
    assert facts[0] == facts[1]
