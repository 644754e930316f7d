"""The job matrix is what the workflow needs: one job for each GPU that TensorRT builds on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.matrix import matrix
from pipeline.recipe import parse

WORKFLOW = Path(__file__).parents[1] / ".github/workflows/engines.yml"


def test_a_job_for_every_gpu_and_none_for_what_any_machine_builds() -> None:
    made = matrix(parse({"source": {"onnx": "m.onnx"}, "targets": ["cpu", "a100", "rtx4090", "H100"]}))
    assert made == {
        "include": [
            {"target": "a100", "sm": "SM80", "runner": ["self-hosted", "gpu", "a100"]},
            {"target": "h100", "sm": "SM90", "runner": ["self-hosted", "gpu", "h100"]},
        ]
    }


def test_the_command_prints_one_line_of_json(tmp_path: Path) -> None:
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text("source: {onnx: m.onnx}\ntargets: [cpu]\n")
    result = CliRunner().invoke(app, ["matrix", str(recipe)])
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [{"include": []}]


def test_the_workflow_uses_what_the_matrix_gives() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert jobs["engine"]["runs-on"] == "${{ matrix.runner }}"
    assert any("--target ${{ matrix.target }}" in step.get("run", "") for step in jobs["engine"]["steps"])
