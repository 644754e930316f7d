"""What a target gets where it lacks a precision: an error that names the nearest, or with fallback the nearest itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.target import target
from pipeline.build import BuildOptions, build
from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.policy.fallback import policy_on
from pipeline.recipe import PolicyConfig, Preset, RuleConfig, parse
from tests.quantize.graphs import mlp


@pytest.mark.parametrize(
    ("name", "preset", "gets"),
    [
        ("a100", "fp8", "int8"),
        ("a100", "fp8-int8", "int8"),
        ("h100", "fp8", "fp8"),
        ("l4", "fp4", "int4"),
        ("t4", "fp4", "w8a16"),
        ("t4", "int4", "w8a16"),
        ("t4", "bf16", "fp16"),
        ("cpu", "fp8-int8", "int8"),
        ("cpu", "fp4", "int4"),
        ("cpu", "bf16", "fp32"),
        ("cpu", "nf4", "nf4"),
        ("a100", "nf4", "int4"),
        ("t4", "nf4", "w8a16"),
    ],
)
def test_a_target_gets_the_nearest_that_it_has(name: str, preset: str, gets: str) -> None:
    with collecting() as notices:
        found = policy_on(target(name), PolicyConfig(preset=preset, fallback=True))
    assert found.preset == gets
    assert [n.code for n in notices] == ([] if preset == gets else ["fallback"])
    assert all(gets.upper() in n.message for n in notices)


def test_rules_and_the_16_bit_type_fall_back_too() -> None:
    rules = (RuleConfig(role="ffn", precision="fp8"), RuleConfig(role="head", precision="bf16"))
    asked = PolicyConfig(preset=Preset.INT8, half="bf16", rules=rules, fallback=True)
    found = policy_on(target("t4"), asked)
    assert (found.half, [r.precision for r in found.rules]) == ("fp16", ["int8", "fp16"])
    assert policy_on(target("h100"), asked) == asked


@pytest.mark.parametrize(
    ("name", "policy"),
    [("a100", {"preset": "fp8"}), ("t4", {"half": "bf16"}), ("a10", {"rules": [{"name": "*", "precision": "fp8"}]})],
)
def test_without_it_the_error_names_both_ways_out(name: str, policy: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"; use (int8|fp16), or --fallback"):
        policy_on(target(name), PolicyConfig.model_validate(policy))


def test_one_recipe_makes_int8_for_one_gpu_and_fp8_for_another(tmp_path: Path) -> None:
    import numpy as np

    path, _ = mlp(tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32))
    policy = {"preset": "fp8", "fallback": True, "rules": [{"op_type": "MatMul", "precision": "fp8"}]}
    recipe = {"source": {"onnx": str(path)}, "policy": policy, "targets": ["a100", "h100"]}
    build(parse({**recipe, "calibration": {"data": str(tmp_path / "c.npz")}}), tmp_path / "b",
          options=BuildOptions(until="quantize"))  # fmt: skip
    assert {p.name for p in (tmp_path / "b/variants").iterdir()} == {"gpu-int8", "gpu-fp8"}
    plans = {p: (tmp_path / f"b/variants/{p}/precision_plan.json").read_text() for p in ("gpu-int8", "gpu-fp8")}
    assert '"precision": "int8"' in plans["gpu-int8"]
    assert '"precision": "fp8"' not in plans["gpu-int8"]
    assert '"precision": "fp8"' in plans["gpu-fp8"]
