"""Whole builds: the same bytes every time, nothing done twice, and nothing lost to kill -9."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import recipe as recipes
from pipeline.errors import DataError, RecipeError
from tests.stages.builds import fresh, recipe, run, tree
from tests.stages.conftest import Built
from tests.stages.killed_builds import MOMENTS, STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Built:
    """The finished build in a directory of its own; stages are recognised there by what their files hold."""
    shutil.copytree(built.directory, tmp_path / "copy")
    return Built(built.recipe, tmp_path / "copy", built.result)


def test_two_builds_of_one_recipe_are_the_same_bytes(built: Built, tmp_path: Path) -> None:
    second = run(built.recipe, tmp_path / "elsewhere")
    assert second.exit_code == 0
    first, other = tree(built.directory), tree(tmp_path / "elsewhere")
    assert first == other
    for wanted in ("manifest.json", "model.fp32.onnx", "calibration/statistics.safetensors", "variants/cpu/model.onnx"):
        assert wanted in first
    for family in ("cpu", "gpu-int8"):
        assert {f"variants/{family}/{n}" for n in ("precision_plan.json", "ranges.json", "model.onnx")} <= set(first)


def test_a_second_run_does_nothing(copy: Built) -> None:
    before = tree(copy.directory)
    again = run(copy.recipe, copy.directory)
    assert fresh(again) == []
    assert tree(copy.directory) == before
    assert again.report is not None
    assert copy.result.report is not None
    assert again.report["notices"] == copy.result.report["notices"]


def test_a_changed_gate_judges_again_and_runs_nothing(copy: Built, inputs: Path) -> None:
    for gate, code, published in (("cosine", 0, True), ("sqnr_db", 3, False), ("cosine", 0, True)):
        limit = {"cosine": ">= 0.5", "sqnr_db": ">= 300"}[gate]
        made = recipe(inputs, targets=["cpu", "a100"], validate={"gates": {gate: limit}})
        result = run(made, copy.directory)
        assert result.exit_code == code
        assert set(fresh(result)) <= {"publish"}
        # What a failed verdict forbids must not lie there from an earlier run either.
        assert (copy.directory / "triton" / "tiny" / "config.pbtxt").exists() is published
        assert (copy.directory / "engines/cpu/model.onnx").exists()
        assert result.report is not None
        assert result.report["validation"]["cpu"]["verdict"] == ("failed" if code else "passed")
        assert (result.report["repository"] is not None) is published


def test_a_changed_rule_plans_again_and_does_not_calibrate(copy: Built, inputs: Path) -> None:
    rules = [{"role": "ffn_down", "precision": "fp32"}, {"role": "attention_scores", "precision": "int8"}]
    result = run(recipe(inputs, targets=["cpu", "a100"], policy={"rules": rules}), copy.directory)
    stages = fresh(result)
    assert "calibrate" not in stages
    assert {"plan/cpu", "plan/gpu-int8", "ranges/cpu", "quantize/cpu"} <= set(stages)


def test_from_a_stage_runs_it_and_all_later_ones(copy: Built) -> None:
    before = tree(copy.directory)
    stages = fresh(run(copy.recipe, copy.directory, from_stage="quantize"))
    assert stages[0].startswith("quantize/")
    assert not {s.partition("/")[0] for s in stages} & {"prepare", "calibrate", "plan", "ranges"}
    assert {"quantize/cpu", "quantize/gpu-int8", "engines/cpu", "validate/cpu", "publish"} <= set(stages)
    assert tree(copy.directory) == before


def test_until_a_stage_stops_there(inputs: Path, tmp_path: Path) -> None:
    result = run(recipe(inputs), tmp_path / "b", until="plan")
    assert result.report is None
    assert result.exit_code == 0
    assert (tmp_path / "b/variants/cpu/precision_plan.json").exists()
    assert not (tmp_path / "b/variants/cpu/model.onnx").exists()
    with pytest.raises(RecipeError, match="no stage"):
        run(recipe(inputs), tmp_path / "b", until="nonsense")


def test_what_another_recipe_left_behind_is_not_in_the_manifest(copy: Built, inputs: Path, tmp_path: Path) -> None:
    run(recipe(inputs), copy.directory)
    run(recipe(inputs), tmp_path / "clean")
    manifests = [json.loads((d / "manifest.json").read_text()) for d in (copy.directory, tmp_path / "clean")]
    assert manifests[0] == manifests[1]
    assert not [o["path"] for o in manifests[0]["outputs"] if "gpu" in o["path"]]


def test_shards_add_up_to_the_bytes_of_one_run(inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs, targets=["cpu", "a100"], calibration={"batch_size": 5})
    places = [tmp_path / f"shard{i}" for i in range(2)]
    for index, place in enumerate(places):
        assert run(made, place, shard=(index, 2)).exit_code == 0
    run(made, tmp_path / "merged", merge=tuple(places), until="ranges")
    run(made, tmp_path / "whole", until="ranges")
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")
    assert "calibration/statistics.safetensors" in tree(tmp_path / "merged")
    assert "calibrate" not in fresh(run(made, tmp_path / "merged"))  # a build goes on from merged statistics


def test_shards_that_do_not_fit_are_refused(inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs)
    run(made, tmp_path / "s0", shard=(0, 2))
    run(made, tmp_path / "s1", shard=(1, 2))
    with pytest.raises(DataError, match="not complete"):
        run(made, tmp_path / "m", merge=(tmp_path / "s0",))
    with pytest.raises(DataError, match="not complete"):
        run(made, tmp_path / "m", merge=(tmp_path / "s0", tmp_path / "s0"))
    fewer = recipe(inputs, calibration={"samples": 8})
    with pytest.raises(DataError, match="another data"):
        run(fewer, tmp_path / "m", merge=(tmp_path / "s0", tmp_path / "s1"))
    padded = recipe(inputs, calibration={"ignore_padding": False})
    with pytest.raises(DataError, match="another mask"):
        run(padded, tmp_path / "m", merge=(tmp_path / "s0", tmp_path / "s1"))
    assert not (tmp_path / "m/calibration").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_build_that_is_killed_anywhere_goes_on_and_ends_the_same(built: Built, inputs: Path, tmp_path: Path) -> None:
    made = recipe(inputs)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipes.to_dict(made)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.killed_builds", str(file), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    died = json.loads(done.stdout.splitlines()[-1])
    assert died == [[s, m] for s in STAGES for m in MOMENTS] + [["report", "begins"]]
    assert not (tmp_path / "killed/.work").exists()
    clean = run(made, tmp_path / "clean")
    assert clean.exit_code == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "clean")
