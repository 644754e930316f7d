"""Builds whose rules set methods: what each role got is what a build gives that has the method everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from pipeline.policy.plan import PrecisionPlan
from tests.stages.builds import fresh, recipe, run


def built(inputs: Path, out: Path, *rules: dict[str, Any], target: str = "cpu", **policy: Any) -> Path:
    run(recipe(inputs, policy={"rules": list(rules), **policy}, targets=[target]), out, until="quantize")
    return out / "variants"


def smoothing(variants: Path, family: str = "cpu") -> dict[str, dict[str, Any]]:
    found = json.loads((variants / family / "smoothing.json").read_text(encoding="utf-8"))
    return {node: choice for choice in found for node in choice["nodes"]}


def initializers(path: Path) -> dict[str, str]:
    """Every tensor's SHA-256 by name."""
    proto = onnx.load(path)
    arrays = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    return {n: hashlib.sha256(str(a.dtype).encode() + a.tobytes()).hexdigest() for n, a in arrays.items()}


def plan_of(variants: Path, family: str = "cpu") -> PrecisionPlan:
    return PrecisionPlan.from_json((variants / family / "precision_plan.json").read_text(encoding="utf-8"))


def weights(variants: Path) -> dict[str, list[str]]:
    """Product to the hashes of its stored weight, by the model's own edges."""
    path = variants / "cpu/model.onnx"
    proto, hashes = onnx.load(path), initializers(path)
    makers = {output: node for node in proto.graph.node for output in node.output}
    products = {n.node for n in plan_of(variants) if n.rounding is not None}
    found = {}
    for node in proto.graph.node:
        if node.name in products:
            read = makers[node.input[1]].input if node.input[1] in makers else node.input[1:3]
            found[node.name] = [hashes[name] for name in read if name in hashes]
    return found


def is_down(node: str) -> bool:
    return "attention" not in node and "output/dense" in node


def is_ffn(node: str) -> bool:
    return is_down(node) or "intermediate" in node


def test_an_alpha_for_a_role_is_the_one_that_it_has_when_all_have_it(inputs: Path, tmp_path: Path) -> None:
    rule = {"role": "ffn_down", "smooth": 0.85}
    ruled = built(inputs, tmp_path / "ruled", rule, smooth=0.5)
    half, high = (built(inputs, tmp_path / f"a{alpha}", smooth=alpha) for alpha in (0.5, 0.85))
    found, of_half, of_high = (smoothing(v) for v in (ruled, half, high))
    assert {n: c["alpha"] for n, c in found.items()} == {n: 0.85 if is_down(n) else 0.5 for n in found}
    assert any(map(is_down, found))
    assert found == {n: (of_high if is_down(n) else of_half)[n] for n in found}
    assert found != of_half
    # The weights of the float graph are scaled by what was chosen, of each role by its own.
    mine, all_half, all_high = (weights_of_float(v) for v in (ruled, half, high))
    for node, stored in mine.items():
        assert stored == (all_high if is_down(node) else all_half)[node], node
        assert all_half[node] != all_high[node]


def weights_of_float(variants: Path) -> dict[str, str]:
    proto, hashes = onnx.load(variants / "cpu/float.onnx"), initializers(variants / "cpu/float.onnx")
    planned = {n.node for n in plan_of(variants) if n.smooth is not None}
    # A value projection and an FFN's first GEMM take in what is behind them: their columns follow two alphas.
    inner = ("value", "intermediate")
    return {
        n.name: hashes[n.input[1]]
        for n in proto.graph.node
        if n.name in planned and not any(word in n.name for word in inner)
    }


def test_smoothing_for_one_role_alone(inputs: Path, tmp_path: Path) -> None:
    ruled = built(inputs, tmp_path / "ruled", {"role": "ffn_down", "smooth": 0.85}, smooth="off")
    found, every = smoothing(ruled), smoothing(built(inputs, tmp_path / "all", smooth=0.85))
    assert found == {n: c for n, c in every.items() if is_down(n)}
    assert found


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_rounding_of_one_role_leaves_the_bytes_of_the_others(inputs: Path, tmp_path: Path, preset: str) -> None:
    common: dict[str, Any] = {"preset": preset, "smooth": "off"} | ({"block_size": 32} if preset == "int4" else {})
    rule = {"role": "ffn", "rounding": "gptq"}
    ruled = weights(built(inputs, tmp_path / "ruled", rule, rounding="rtn", **common))
    nearest = weights(built(inputs, tmp_path / "rtn", rounding="rtn", **common))
    every = weights(built(inputs, tmp_path / "gptq", rounding="gptq", **common))
    assert len(ruled) == 12
    assert sum(map(is_ffn, ruled)) == 4
    for node, stored in ruled.items():
        assert stored == (every if is_ffn(node) else nearest)[node], node
        assert every[node] != nearest[node], node


def test_awq_of_one_role_scales_its_inputs_alone(inputs: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"preset": "int4", "block_size": 32}
    ruled = built(inputs, tmp_path / "ruled", {"role": "ffn_up", "rounding": "awq"}, rounding="rtn", **common)
    every = smoothing(built(inputs, tmp_path / "awq", rounding="awq", **common))
    found = smoothing(ruled)
    assert {"intermediate" in n for n in found} == {True}
    assert found == {n: c for n, c in every.items() if "intermediate" in n}
    nearest = weights(built(inputs, tmp_path / "rtn", rounding="rtn", **common))
    same = [n for n, stored in weights(ruled).items() if stored == nearest[n]]
    assert sorted(same) == sorted(n for n in nearest if "intermediate" not in n)


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "awq"])
def test_blocks_of_a_role_s_own_size_in_the_cpu_s_kernel(inputs: Path, tmp_path: Path, rounding: str) -> None:
    rule = {"role": "ffn_down", "block_size": 64}
    variants = built(inputs, tmp_path / "b", rule, preset="int4", block_size=32, rounding=rounding)
    nodes = [n for n in onnx.load(variants / "cpu/model.onnx").graph.node if n.op_type == "MatMulNBits"]
    sizes = {n.name: next(a.i for a in n.attribute if a.name == "block_size") for n in nodes}
    assert sizes == {n: 64 if is_down(n) else 32 for n in sizes}
    assert len(sizes) == 12


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_blocks_of_a_role_s_own_size_in_a_gpu_s_dequantize_linear(inputs: Path, tmp_path: Path, rounding: str) -> None:
    rule = {"role": "ffn_down", "block_size": 64}
    variants = built(
        inputs, tmp_path / "b", rule, target="rtx4090", preset="int4", block_size=32, rounding=rounding
    )  # fmt: skip
    proto = onnx.load(variants / "gpu-int4/model.onnx")
    shapes = {i.name: list(i.dims) for i in proto.graph.initializer}
    plan = plan_of(variants, "gpu-int4")
    found = {}
    for node in proto.graph.node:
        size = next((a.i for a in node.attribute if a.name == "block_size"), 0)
        if node.op_type == "DequantizeLinear" and size:
            reader = next(n.name for n in proto.graph.node if node.output[0] in n.input)
            found[reader] = size
            assert shapes[node.input[0]][0] == size * shapes[node.input[1]][0]
    assert found == {n.node: 64 if is_down(n.node) else 32 for n in plan.quantized()}
    assert len(found) == 12


def test_outliers_of_one_role_are_multiplied_in_float_and_the_rest_is_as_it_was(inputs: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"activations": "dynamic-per-token"}
    rule = {"role": "ffn_down", "llm_int8_threshold": 0.5}
    names = {}
    for name, rules, threshold in (("ruled", [rule], None), ("none", [], None), ("every", [], 0.5)):
        variants = built(inputs, tmp_path / name, *rules, **common, llm_int8_threshold=threshold)
        names[name] = {n.name for n in onnx.load(variants / "cpu/model.onnx").graph.node}
    apart = {n for n in names["every"] if n.endswith("_with_outliers")}
    assert len(apart) == 12
    assert {n for n in names["ruled"] if n.endswith("_with_outliers")} == {n for n in apart if is_down(n)} != set()
    assert names["none"] < names["ruled"] < names["every"]


def test_a_changed_rule_runs_what_reads_it_again_and_nothing_before(inputs: Path, tmp_path: Path) -> None:
    def again(*rules: dict[str, Any]) -> set[str]:
        return set(fresh(run(recipe(inputs, policy={"rules": list(rules)}, targets=["cpu"]), tmp_path / "b")))

    down = {"role": "ffn_down", "smooth": 0.85}
    again(down)
    assert not again(down) & {"plan/cpu", "smooth/cpu", "quantize/cpu"}
    before = (tmp_path / "b/variants/cpu/model.onnx").read_bytes()
    ran = again({**down, "smooth": 0.6})
    assert {"plan/cpu", "smooth/cpu", "ranges/cpu", "quantize/cpu"} <= ran
    assert not ran & {"export", "prepare", "calibrate"}
    assert (tmp_path / "b/variants/cpu/model.onnx").read_bytes() != before
    ran = again({**down, "smooth": 0.6}, {"role": "ffn_up", "rounding": "gptq"})
    assert {"plan/cpu", "rounding/cpu", "quantize/cpu"} <= ran
    assert not ran & {"calibrate", "smooth/cpu", "ranges/cpu"}
    report = json.loads((tmp_path / "b/report.json").read_text(encoding="utf-8"))
    (rule,) = {n["rule"] for n in report["precision_plan"] if n["role"] == "ffn_up"}
    assert rule == "preset int8: FFN; recipe {role: ffn_up, rounding: gptq}"


def test_mixed_precision_keeps_the_methods_of_what_stays_narrow(inputs: Path, tmp_path: Path) -> None:
    rules = ({"role": "ffn", "smooth": 0.6, "rounding": "gptq"}, {"role": "attention", "smooth": "off"})
    variants = built(inputs, tmp_path / "b", *rules, mixed_precision={"low_share": 0.6})
    plan, draft = plan_of(variants), plan_of(tmp_path / "b/draft")
    high = [n for n in plan if "mixed precision" in n.rule]
    assert high
    assert {(n.smooth, n.rounding) for n in high} == {(None, None)}
    kept = {n.node: (n.smooth, n.rounding) for n in plan.quantized() if n.rounding}
    assert kept == {n.node: (n.smooth, n.rounding) for n in draft if n.node in kept}
    assert {kept[n] for n in kept if is_ffn(n)} <= {(0.6, "gptq")}
    assert {kept[n] for n in kept if not is_ffn(n)} <= {("off", "rtn")}
    assert {is_ffn(n) for n in smoothing(variants)} == {True}
    index = json.loads((variants / "cpu/rounding/index.json").read_text(encoding="utf-8"))
    assert set(index) == {n for n in kept if is_ffn(n)}


def test_the_same_rules_give_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    rules = ({"role": "ffn_down", "smooth": 0.85}, {"role": "attention_query", "rounding": "gptq"})
    one, two = (built(inputs, tmp_path / name, *rules) for name in "ab")
    for file in ("model.onnx", "float.onnx", "smoothing.json", "precision_plan.json", "ranges.json"):
        assert (one / "cpu" / file).read_bytes() == (two / "cpu" / file).read_bytes(), file
