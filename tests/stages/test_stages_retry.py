"""A node that the real builder refuses is named with its rule, remembered, and planned otherwise the next time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.compile_check import available
from pipeline.build import BuildOptions, BuildResult, build
from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.policy.overrides import add_override, read_overrides
from pipeline.policy.planning import Evidence, plan
from pipeline.recipe import PolicyConfig, RuleConfig, parse
from pipeline.types import Precision
from tests.policy.planned import entry
from tests.policy.test_planning_rules import chain
from tests.quantize.graphs import mlp

needs_rtx = pytest.mark.skipif(not available(), reason="needs pip install '.[rtx]'")


def made(folder: Path, **options: bool) -> BuildResult:
    """TensorRT for RTX has no FP32 products on SM75, and this recipe asks a T4 for one."""
    path, _ = mlp(folder / "m.onnx")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32))
    recipe = parse(
        {
            "source": {"onnx": str(path)},
            "calibration": {"data": str(folder / "data.npz"), "method": "minmax"},
            "policy": {"rules": [{"name": "up", "precision": "fp32"}]},
            "targets": ["t4"],
        }
    )
    return build(recipe, folder / "build", options=BuildOptions(**options))


def precision_of(folder: Path, node: str) -> tuple[str, str]:
    written = json.loads((folder / "build/variants/gpu-int8/precision_plan.json").read_text(encoding="utf-8"))
    found = next(n for n in written["nodes"] if n["node"] == node)
    return found["precision"], found["rule"]


@needs_rtx
def test_the_next_run_plans_a_refused_node_otherwise(tmp_path: Path) -> None:
    with collecting() as notices:
        first = made(tmp_path)
    assert first.exit_code == 3
    said = next(n.message for n in notices if n.code == "node-refused")
    assert "up" in said
    assert "recipe {name: up, precision: fp32}" in said
    assert precision_of(tmp_path, "up")[0] == "fp32"
    assert list(read_overrides(tmp_path / "build/overrides.json")["gpu-int8"]) == ["up"]
    second = made(tmp_path)
    assert second.exit_code == 0
    precision, rule = precision_of(tmp_path, "up")
    assert precision == "fp16"
    assert rule.startswith("override: TensorRT for RTX's builder refuses")
    assert second.report is not None
    assert second.report["targets"]["t4"]["status"] == "compile_checked"


@needs_rtx
def test_retry_does_both_at_once(tmp_path: Path) -> None:
    with collecting() as notices:
        result = made(tmp_path, retry=True)
    assert result.exit_code == 0
    assert [n.code for n in notices if n.code in ("node-refused", "retry")] == ["node-refused", "retry"]
    assert precision_of(tmp_path, "up")[0] == "fp16"


def test_an_override_wins_over_every_rule() -> None:
    model, roles = chain()
    policy = PolicyConfig(rules=(RuleConfig(role="ffn", precision=Precision.INT8),))
    plain = plan(model, roles, policy, "gpu-int8")
    refused = plan(model, roles, policy, "gpu-int8", Evidence(overrides={"/layer.0/up": "too odd"}))
    assert entry(plain, "/layer.0/up").precision is Precision.INT8
    assert entry(refused, "/layer.0/up").precision is Precision.FP16
    assert entry(refused, "/layer.0/up").rule == "too odd"
    assert entry(refused, "/layer.1/down").precision is Precision.INT8


def test_overrides_are_kept_by_variant_and_a_broken_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    assert add_override(path, "gpu-int8", "a", "x")
    assert add_override(path, "gpu-fp8", "a", "y")
    assert not add_override(path, "gpu-int8", "a", "again")
    assert read_overrides(path) == {"gpu-int8": {"a": "x"}, "gpu-fp8": {"a": "y"}}
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_overrides(path)
