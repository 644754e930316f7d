"""The command that compares schemes, those that no target executes among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from typer.testing import CliRunner

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import BuildOptions, simulate
from pipeline.cli import app
from pipeline.errors import PolicyError, QuantizeError, RecipeError
from pipeline.notices import collecting
from pipeline.quantize.schemes import SCHEMES, SIMULATION_ONLY
from pipeline.recipe import parse
from pipeline.report.figures import number
from pipeline.report.schemes import scheme_table
from tests.quantize.graphs import save
from tests.stages.builds import recipe


def command(*args: str) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_every_scheme_is_measured_and_says_what_executes_it(inputs: Path, tmp_path: Path) -> None:
    data = ["--calibration", inputs / "calibration.npz", "--validate", inputs / "heldout.npz", "-o", tmp_path / "s"]
    result = command("simulate", inputs / "bert.onnx", *data, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["scheme"]: row for row in json.loads(result.stdout)["schemes"]}
    assert list(rows) == list(SCHEMES)
    for name, row in rows.items():
        assert row["deployable"] is SCHEMES[name].deployable
        assert (row["runs_on"] == SIMULATION_ONLY) is not row["deployable"]
        assert row["measurements"]["mode"] == "emulated"
        assert row["measurements"]["engine_bytes"] is row["measurements"]["latency_ms"] is None
        assert row["quantized"] == row["products"] == 12
        assert row == json.loads((tmp_path / f"s/simulations/{name}.json").read_text())
    outputs = {n: r["measurements"]["stages"]["qdq_plain"] for n, r in rows.items()}
    sqnr = {n: min(o["sqnr_db"] for o in found.values()) for n, found in outputs.items()}
    assert sqnr["int8-block-32"] > sqnr["int8-per-token"] > sqnr["int8"]
    assert sqnr["fp8-e4m3"] > sqnr["fp8-e4m3-e5m2"] > sqnr["fp8-e5m2"]
    # A mantissa bit fewer doubles the steps: 6 dB.
    assert sqnr["fp8-e4m3"] - sqnr["fp8-e5m2"] == pytest.approx(6.0, abs=1.0)


def test_the_table_says_that_nothing_is_deployed_and_there_is_nothing_to_publish(inputs: Path, tmp_path: Path) -> None:
    data = ["--calibration", inputs / "calibration.npz", "-o", tmp_path / "s"]
    schemes = ["--scheme", "fp8-e5m2", "--scheme", "int8-block-64"]
    result = command("simulate", inputs / "bert.onnx", *data, *schemes)
    assert result.exit_code == 0, result.output
    assert "nothing here is deployed" in result.stdout
    assert " ".join(result.stdout.split()).count("simulation only") == 2
    assert "measured on calibration data" in " ".join(result.stderr.split())
    assert [p.name for p in (tmp_path / "s").rglob("*.onnx")] == ["model.fp32.onnx"]
    for name in ("publish", "compile", "build"):
        refused = command(name, tmp_path / "s", "-o", tmp_path / "out")
        assert refused.exit_code == 2
        assert "simulations of schemes" in " ".join(refused.stderr.split())
        assert not (tmp_path / "out").exists()


def test_a_second_run_measures_nothing_again(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = simulate(recipe(inputs), tmp_path / "s", schemes=["int8-per-token"])
    monkeypatch.setattr("pipeline.stages.simulation.measure", None)
    assert simulate(recipe(inputs), tmp_path / "s", schemes=["int8-per-token"]) == first
    with pytest.raises(TypeError, match="not callable"):
        simulate(recipe(inputs), tmp_path / "s", schemes=["int8-per-token"], options=BuildOptions(force=True))


def test_a_policy_decides_what_schemes_quantize_and_says_what_it_names_in_vain(inputs: Path, tmp_path: Path) -> None:
    rules = [{"role": "ffn", "precision": "fp32"}]
    made = recipe(inputs, policy={"preset": "fp8", "rules": rules, "skip": ["layer.7"]}, targets=["h100"])
    with collecting() as notices:
        (found,) = simulate(made, tmp_path / "s", schemes=["int8-per-token"])
    assert (found.quantized, found.products) == (8, 8)
    assert [n.code for n in notices] == ["skip-unmatched"]
    everything = recipe(inputs, policy={"rules": [{"role": "*", "precision": "fp32"}]})
    with pytest.raises(PolicyError, match="quantizes no product"):
        simulate(everything, tmp_path / "t")


def test_dynamic_schemes_need_no_calibration_data_and_static_ones_do(inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, calibration={"data": None})
    (found,) = simulate(made, tmp_path / "s", schemes=["int8-block-32"])
    assert found.measurements.samples == 16
    with pytest.raises(RecipeError, match=r"need calibration data.*: int8, fp8-e5m2\.") as refused:
        simulate(made, tmp_path / "t", schemes=["fp8-e5m2", "int8", "int8-dynamic"])
    assert not (tmp_path / "t").exists()
    proposed = refused.value.fix.rstrip(".").split("--scheme ")[1:]
    assert len(simulate(made, tmp_path / "s", schemes=[name.strip() for name in proposed])) == 12
    judged = recipe(inputs, calibration={"data": None}, policy={"outlier_threshold": 20})
    with collecting() as notices:
        simulate(judged, tmp_path / "s", schemes=["int8-block-32"])
    assert [n.code for n in notices].count("outliers-unchecked") == 1
    with pytest.raises(RecipeError, match="no data to measure schemes on"):
        simulate(
            recipe(inputs, calibration={"data": None}, validate={"data": None}),
            tmp_path / "s",
            schemes=["int8-block-32"],
        )


def test_a_builds_folder_and_an_unknown_scheme_are_refused(inputs: Path, built: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds a build"):
        simulate(recipe(inputs), built.directory)
    with pytest.raises(RecipeError, match="no scheme 'int3'"):
        simulate(recipe(inputs), tmp_path / "s", schemes=["int3"])


def test_a_task_is_a_column_and_a_scheme_that_quantizes_nothing_has_no_figures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 16, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["y"], name="flat"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("x", ["b", 16, 8, 8])], [("y", ["b", 16])], {"k": kernel})
    x = rng.normal(size=(32, 16, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    with OnnxRuntimeRunner(path) as runner:
        np.save(tmp_path / "labels.npy", runner.infer({"x": x})["y"].argmax(axis=1))
    data = ["--calibration", tmp_path / "x.npz", "--validate", tmp_path / "x.npz", "-o", tmp_path / "s"]
    task = ["--validate.task", "accuracy", "--validate.labels", tmp_path / "labels.npy"]
    schemes = ["--scheme", "fp8-e5m2", "--scheme", "int8-per-token"]
    given = [path, *data, *task, *schemes, "--policy.rules", "[{op_type: Conv, precision: int8}]"]
    result = command("simulate", *given)
    assert result.exit_code == 0, result.output
    rows = json.loads(command("simulate", *given, "--json").stdout)["schemes"]
    assert (rows[0]["scheme"], rows[0]["quantized"], rows[0]["measurements"]) == ("int8-per-token", 0, None)
    scores = rows[1]["measurements"]["task"]
    assert scores["fp32"]["accuracy"] == 1.0
    assert 0 < scores["engine"]["accuracy"] < 1.0
    table = scheme_table(rows)
    column = next(i for i, name in enumerate(table.columns) if name.startswith("accuracy (FP32"))
    assert [row[column] for row in table.rows] == ["not measured", number(scores["engine"]["accuracy"])]
    assert table.rows[0][4:6] == ("not measured", "not measured")


def test_the_worst_output_is_one_with_an_sqnr_where_there_is_one() -> None:
    def row(**outputs: dict[str, Any]) -> dict[str, Any]:
        empty = dict.fromkeys(("sqnr_db", "cosine", "cosine_min", "max_abs", "mean_abs", "relative_l2", "exact_match"))
        full = {
            n: {"count": 9, "nonfinite": 0, "exact": False, "top1_agreement": None} | empty | o
            for n, o in outputs.items()
        }
        facts = dict.fromkeys(("scheme", "weights", "activations", "quantized", "products", "runs_on"), "")
        return {**facts, "measurements": {"task": None, "stages": {"qdq_plain": full}}}

    classes, noisy, other = {"exact_match": 0.75}, {"sqnr_db": 12.0, "cosine": 0.9}, {"sqnr_db": 30.0, "cosine": 0.99}
    rows = [row(a=classes, b=noisy, c=other), row(a=classes), row(a={"exact": True}), row(a=other, b={"nonfinite": 3})]
    assert [r[4:6] for r in scheme_table(rows).rows] == [
        ("12.0 dB", "0.9000"),
        ("75.0 % equal", "not measured"),
        ("equal", "not measured"),
        ("NaN or infinite", "not measured"),
    ]


def test_other_calibration_data_is_measured_again_by_schemes_with_static_scales_alone(
    inputs: Path, tmp_path: Path
) -> None:
    with np.load(inputs / "calibration.npz") as arrays:
        np.savez(tmp_path / "few.npz", **{name: arrays[name][:1] for name in arrays.files})
    first = simulate(recipe(inputs), tmp_path / "s", schemes=["int8", "int8-per-token"])
    few = recipe(inputs, calibration={"data": str(tmp_path / "few.npz")})
    second = simulate(few, tmp_path / "s", schemes=["int8", "int8-per-token"])
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True]


def test_rules_in_other_precisions_say_which_products_and_not_how(inputs: Path, tmp_path: Path) -> None:
    rules = [{"role": "*", "precision": "fp32"}, {"role": "ffn", "precision": "fp8"}]
    made = recipe(inputs, policy={"preset": "fp8", "rules": rules}, targets=["h100"])
    (found,) = simulate(made, tmp_path / "s", schemes=["int8-per-token"])
    assert (found.quantized, found.products) == (4, 4)


def test_a_tensor_with_nan_has_no_range(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Log", ["x"], ["l"], name="log"),
        helper.make_node("MatMul", ["l", "w"], ["y"], name="product"),
    ]
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    path = save(tmp_path / "m.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": weight})
    x = np.random.default_rng(1).uniform(1, 2, (16, 32)).astype(np.float32)
    x[3, 4] = -1.0
    np.savez(tmp_path / "x.npz", x=x)
    made = parse({"name": "m", "source": {"onnx": str(path)}, "calibration": {"data": str(tmp_path / "x.npz")}})
    with pytest.raises(QuantizeError, match="NaN or infinite") as refused:
        simulate(made, tmp_path / "s", schemes=["int8"])
    assert refused.value.where == "tensor l"
