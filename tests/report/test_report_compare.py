"""Builds side by side: figures of each target, and exactly the nodes whose precision differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_samples import report
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import StoreError
from pipeline.report.compare import compare, read_report
from pipeline.report.contract import write_json


def two(tmp_path: Path) -> tuple[Path, Path]:
    first = report()
    changed = first.precision_plan[1].model_copy(update={"precision": "fp16"})
    kept = first.targets["cpu"].model_copy(update={"bytes": 1_000_000})
    second = report(
        precision_plan=(first.precision_plan[0], changed, *first.precision_plan[2:]),
        targets={"cpu": kept},
        validation={"cpu": first.validation["cpu"]},
    )
    assert changed.precision != first.precision_plan[1].precision
    for name, made in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        write_json(made, tmp_path / name / "report.json")
    return tmp_path / "a", tmp_path / "b"


def test_figures_stand_side_by_side_and_one_node_differs(tmp_path: Path) -> None:
    folders = two(tmp_path)
    tables = compare(tuple(map(read_report, folders)))
    a100, cpu, different = tables
    assert cpu.columns == ("", "minilm (1)", "minilm (2)")
    assert {row[0]: row[1:] for row in cpu.rows}["size"] == ("58.9 MB", "1.0 MB")
    assert {row[0]: row[1:] for row in a100.rows}["status"] == ("compile checked", "not a target")
    node = report().precision_plan[1]
    assert different.rows == ((node.variant, node.node, node.precision, "fp16"),)


def test_one_build_is_shown_alone_and_equal_plans_give_no_table(tmp_path: Path) -> None:
    first, _ = two(tmp_path)
    assert len(compare((read_report(first),))) == 2
    assert len(compare((read_report(first), read_report(first)))) == 2


def test_the_command_prints_it_and_says_where_a_report_is_missing(tmp_path: Path) -> None:
    first, second = two(tmp_path)
    result = CliRunner().invoke(app, ["report", str(first), str(second), "--json"])
    assert result.exit_code == 0
    assert [t["title"] for t in json.loads(result.stdout)][:2] == ["target a100", "target cpu"]
    with pytest.raises(StoreError, match="has no report"):
        read_report(tmp_path)
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2
