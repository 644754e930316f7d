"""Methods that rules set: who gets which, who must agree, what is refused and what is said."""

from __future__ import annotations

import json
from typing import Any

import onnx_ir as ir
import pytest
from onnx import helper

from engines.target import target
from pipeline.errors import RecipeError
from pipeline.notices import Notice, collecting
from pipeline.policy.fallback import policy_on
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import Evidence, plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.recipe import PolicyConfig, parse
from pipeline.types import NodeRole, Role
from tests.policy.planned import canonical, entry, graph, plan_zoo, roles_of, weight

QKV = ("attention_query", "attention_key", "attention_value")


def policy(*rules: dict[str, Any], **keys: Any) -> PolicyConfig:
    return PolicyConfig.model_validate({"rules": list(rules), **keys})


def methods(made: PrecisionPlan, key: str, *roles: str) -> set[Any]:
    return {getattr(n, key) for n in made.quantized() if n.role in roles}


def projections() -> tuple[ir.Model, dict[str, NodeRole]]:
    """x -> query, key and value of 128 channels -> Add -> down; "twice" and "again" share a weight."""
    nodes = [helper.make_node("MatMul", ["x", f"w{n}"], [n], name=n) for n in ("query", "key", "value")]
    nodes += [
        helper.make_node("Sum", ["query", "key", "value"], ["s"], name="sum"),
        helper.make_node("MatMul", ["s", "wdown"], ["d"], name="down"),
        helper.make_node("MatMul", ["d", "wtwice"], ["t"], name="twice"),
        helper.make_node("MatMul", ["t", "wtwice"], ["y"], name="again"),
    ]
    weights = {f"w{n}": weight(128, 128) for n in ("query", "key", "value", "down", "twice")}
    roles = roles_of(
        query=Role.ATTENTION_QUERY, key=Role.ATTENTION_KEY, value=Role.ATTENTION_VALUE, down=Role.FFN_DOWN,
        twice=Role.LINEAR, again=Role.LINEAR,
    )  # fmt: skip
    return graph(nodes, {"x": ["b", 7, 128]}, weights), roles


def planned(family: str, *rules: dict[str, Any], **keys: Any) -> PrecisionPlan:
    model, roles = projections()
    return plan(model, roles, policy(*rules, **keys), family)


def said(family: str, *rules: dict[str, Any], **keys: Any) -> list[Notice]:
    model, roles = projections()
    asked = policy(*rules, **keys)
    with collecting() as found:
        remark(plan(model, roles, asked, family), candidates(model, roles), asked)
    return [n for n in found if n.code.startswith("rule-method")]


def test_the_last_rule_that_sets_a_thing_wins_for_that_thing() -> None:
    rules = (
        {"role": "ffn", "smooth": 0.5, "rounding": "gptq"},
        {"role": "ffn_down", "smooth": 0.85},
        {"role": "ffn_down", "precision": "int8"},
        {"role": "ffn_up", "rounding": "rtn"},
    )
    made = plan_zoo("bert", "cpu", policy(*rules))
    assert (methods(made, "smooth", "ffn_up"), methods(made, "smooth", "ffn_down")) == ({0.5}, {0.85})
    assert (methods(made, "rounding", "ffn_up"), methods(made, "rounding", "ffn_down")) == ({"rtn"}, {"gptq"})
    assert methods(made, "smooth", *QKV) == {"auto"}
    assert methods(made, "rounding", *QKV) == {"rtn"}
    down, up = (next(n.rule for n in made if n.role == role) for role in ("ffn_down", "ffn_up"))
    assert down == (
        "recipe {role: ffn_down, precision: int8}; recipe {role: ffn_down, smooth: 0.85}; "
        "recipe {role: ffn, smooth: 0.5, rounding: gptq}"
    )
    assert (
        up == "preset int8: FFN; recipe {role: ffn, smooth: 0.5, rounding: gptq}; recipe {role: ffn_up, rounding: rtn}"
    )
    assert PrecisionPlan.from_json(made.to_json()) == made


def test_a_rule_that_sets_precision_and_method_is_named_once() -> None:
    made = planned("cpu", {"name": "down", "precision": "int4", "block_size": 64, "rounding": "rtn"})
    found = entry(made, "down")
    assert (found.block_size, found.rounding, found.smooth) == (64, "rtn", None)
    assert found.rule == "recipe {name: down, precision: int4, rounding: rtn, block_size: 64}"


@pytest.mark.parametrize(("family", "preset"), [("cpu", "int8"), ("gpu-int8", "int8"), ("cpu", "int4")])
def test_without_rules_every_product_has_the_policy_s_methods(family: str, preset: str) -> None:
    for key, value in {"smooth": 0.4, "rounding": "gptq"}.items():
        made = plan_zoo("bert", family, policy(preset=preset, **{key: value}))
        expected = {None} if key == "smooth" and preset == "int4" else {value}
        assert methods(made, key, "ffn_up", "ffn_down", *QKV) == expected
        assert not [n.rule for n in made if ";" in n.rule]
        assert all(n.rounding is None and n.smooth is None for n in made if n.op_type in ("Gather", "Softmax"))


def test_what_nobody_asked_for_follows_the_evidence() -> None:
    model, roles = projections()
    seen = Evidence(smoothable=False, data=False)
    assert {n.smooth for n in plan(model, roles, policy(), "cpu", seen)} == {"off", None}
    assert entry(plan(model, roles, policy(smooth="auto"), "cpu", seen), "down").smooth == "auto"
    ruled = plan(model, roles, policy({"name": "down", "smooth": "auto"}), "cpu", seen)
    assert (entry(ruled, "down").smooth, entry(ruled, "query").smooth) == ("auto", "off")
    for data, expected in ((True, "gptq"), (False, "rtn")):
        made = plan(model, roles, policy(preset="int4"), "cpu", Evidence(data=data))
        assert entry(made, "down").rounding == expected


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_gemms_that_read_one_tensor_take_the_alpha_of_the_last_rule_and_it_is_said(family: str) -> None:
    one, two = {"role": "attention_query", "smooth": 0.8}, {"role": "attention_key", "smooth": 0.4}
    for rules, alpha, followers in (((one,), 0.8, 2), ((one, two), 0.4, 2), ((two, one), 0.8, 2)):
        made = planned(family, *rules)
        assert methods(made, "smooth", *QKV) == {alpha}
        assert methods(made, "smooth", "ffn_down") == {"auto"}
        (notice,) = said(family, *rules)
        assert notice.code == "rule-method-shared"
        assert f"smooth: {alpha}}} decides for {followers} more nodes" in notice.message
    assert entry(made, "value").rule == (
        "preset int8: attention projections; "
        "recipe {role: attention_query, smooth: 0.8} with what reads the same tensor"
    )
    assert said(family, {"role": "attention", "smooth": 0.8}) == []


def test_awq_is_for_all_that_read_the_tensor_and_gptq_for_one() -> None:
    rule = {"role": "attention_query", "rounding": "awq"}
    made = planned("cpu", rule, preset="int4", rounding="rtn")
    assert (methods(made, "rounding", *QKV), entry(made, "down").rounding) == ({"awq"}, "rtn")
    assert [n.code for n in said("cpu", rule, preset="int4", rounding="rtn")] == ["rule-method-shared"]
    made = planned("cpu", rule, {"role": "attention_key", "rounding": "gptq"}, preset="int4", rounding="rtn")
    assert methods(made, "rounding", *QKV) == {"gptq"}
    made = planned("cpu", {"role": "attention_query", "rounding": "gptq"}, preset="int4", rounding="rtn")
    assert [entry(made, n).rounding for n in ("query", "key", "value")] == ["gptq", "rtn", "rtn"]


def test_a_tensor_s_outliers_are_those_of_all_that_read_it() -> None:
    rule = {"role": "attention_query", "llm_int8_threshold": 4.0}
    made = planned("cpu", rule, activations="dynamic-per-token", llm_int8_threshold=6.0)
    assert methods(made, "llm_int8_threshold", *QKV) == {4.0}
    assert methods(made, "llm_int8_threshold", "ffn_down", "linear") == {6.0}
    assert methods(planned("cpu", rule, activations="dynamic"), "llm_int8_threshold", "ffn_down") == {None}
    assert [n.code for n in said("cpu", rule, activations="dynamic")] == ["rule-method-shared"]


def test_merged_projections_share_their_blocks_on_gpus_alone() -> None:
    rule = {"role": "attention_query", "block_size": 64}
    for family, expected in (("cpu", [64, 128, 128]), ("gpu-int4", [64, 64, 64])):
        made = planned(family, rule, preset="int4")
        assert [entry(made, n).block_size for n in ("query", "key", "value")] == expected
        assert entry(made, "down").block_size == 128
        assert len(said(family, rule, preset="int4")) == (family != "cpu")


def test_a_block_that_does_not_divide_gives_way_to_a_smaller_one_that_does() -> None:
    """BERT's 32 channels: the rule's blocks of 32 quantize on a GPU what its 64 and 128 leave high."""
    assert not methods(plan_zoo("bert", "gpu-int4", policy(preset="int4")), "block_size", "ffn_up")
    ruled = policy({"role": "ffn", "block_size": 32}, preset="int4")
    assert methods(plan_zoo("bert", "gpu-int4", ruled), "block_size", "ffn_up", "ffn_down") == {32}
    made = plan_zoo("bert", "cpu", policy({"role": "ffn_down", "block_size": 128}, preset="int4", block_size=32))
    assert methods(made, "block_size", "ffn_down") == {64}
    assert "block_size: 128}, in blocks of 64: it sums 64 values" in next(n.rule for n in made if n.role == "ffn_down")


@pytest.mark.parametrize(
    ("family", "rule", "keys", "why"),
    [
        ("cpu", {"name": "down", "rounding": "awq"}, {"preset": "int8"}, "AWQ does not round INT8"),
        ("cpu", {"name": "down", "rounding": "gptq"}, {"preset": "nf4"}, "GPTQ does not round NF4"),
        ("cpu", {"name": "down", "smooth": 0.5}, {"preset": "int4"}, "its weight alone is quantized"),
        ("cpu", {"name": "down", "smooth": 0.5}, {"activations": "dynamic"}, "its range is found at run time"),
        ("cpu", {"name": "down", "rounding": "gptq"}, {"activations": "dynamic"}, "where activations are dynamic"),
        ("gpu-int8", {"name": "down", "llm_int8_threshold": 6}, {"activations": "dynamic"}, "calibration fixes its range"),
        ("cpu", {"name": "sum", "rounding": "gptq"}, {}, "it computes in FP32"),
        ("cpu", {"name": "down", "block_size": 32}, {"preset": "int8"}, "INT8 weights have one scale for each output channel"),
        ("gpu-w8a16", {"name": "down", "block_size": 32}, {"preset": "w8a16"}, "W8A16 weights have one scale for each output channel"),
        ("gpu-fp4", {"name": "down", "block_size": 32}, {"preset": "fp4"}, "blocks of FP4 weights hold 16"),
        ("cpu", {"role": "linear", "rounding": "gptq"}, {}, "several nodes read its weight"),
    ],
)  # fmt: skip
def test_what_a_node_does_not_take_is_said_and_left_as_it_was(
    family: str, rule: dict[str, Any], keys: dict[str, Any], why: str
) -> None:
    other = {"name": "again", "precision": "int4"}  # makes awq and block_size something that the policy can ask for
    if family != "cpu" or rule.get("role"):
        other = {"name": "nobody", "precision": "int4"}
    rules = (other, rule)
    (notice,) = said(family, *rules, **keys)
    assert notice.code == "rule-method-unused"
    assert f"that do not take it in the variant {family}; for " in notice.message
    assert why in notice.message
    assert notice.where == "policy.rules[1]"
    plain, made = planned(family, other, **keys), planned(family, *rules, **keys)
    assert made == plain


def test_a_rule_whose_precision_no_node_can_have_is_said_once_and_not_for_each_method() -> None:
    model, roles = projections()
    asked = policy({"name": "sum", "precision": "int4", "rounding": "awq", "block_size": 64})
    with collecting() as found:
        remark(plan(model, roles, asked, "cpu"), candidates(model, roles), asked)
    assert [n.code for n in found if n.code.startswith("rule-")] == ["rule-not-quantizable"]


def test_a_table_takes_no_rounding_and_it_is_said() -> None:
    model, roles = canonical("bert")
    asked = policy({"role": "embedding", "rounding": "gptq"})
    with collecting() as found:
        remark(plan(model, roles, asked, "cpu"), candidates(model, roles), asked)
    (notice,) = [n for n in found if n.code == "rule-method-unused"]
    assert "3 quantized nodes" in notice.message
    assert "Gather has no constant weight that a method is for" in notice.message


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"role": "ffn"}, "at least one thing to set: precision, smooth, rounding, block_size, llm_int8_threshold"),
        ({"smooth": 0.5}, "at least one of role, op_type, name"),
        ({"role": "ffn", "smooth": 1.5}, "smooth: 1.5"),
        ({"role": "ffn", "rounding": "awk"}, "rtn.*gptq.*awq"),
        ({"role": "ffn", "block_size": 48}, "32, 64 or 128"),
        ({"role": "ffn", "precision": "int8", "block_size": 64}, "block_size is for int4, nf4, w8a16"),
        ({"role": "ffn", "precision": "fp4", "block_size": 64}, "block_size is for int4, nf4, w8a16"),
        ({"role": "ffn", "block_size": 64}, "a rule's block_size is for int4, nf4 and w8a16"),
        ({"role": "ffn", "precision": "int4", "smooth": "auto"}, "smooth is for quantized activations"),
        ({"role": "ffn", "precision": "int8", "rounding": "awq"}, "awq is for w8a16, int4, fp4"),
        ({"role": "ffn", "rounding": "awq"}, "awq is for weights alone; take int4, fp4 or w8a16"),
        ({"role": "ffn", "llm_int8_threshold": 6.0}, "set activations to dynamic"),
        ({"role": "ffn", "precision": "int4", "llm_int8_threshold": 6.0}, "llm_int8_threshold is for int8"),
        ({"role": "ffn", "precision": "nf4", "rounding": "gptq"}, "nf4 is rounded to its nearest code"),
        ({"role": "ffn", "precision": "fp16", "rounding": "gptq"}, "rounding is for quantized nodes"),
    ],
)  # fmt: skip
def test_what_can_never_be_is_refused_when_the_recipe_is_read(rule: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        parse({"source": {"onnx": "m.onnx"}, "policy": {"rules": [rule]}})


def test_off_is_yaml_s_false() -> None:
    assert parse({"source": {"onnx": "m.onnx"}, "policy": {"rules": [{"role": "ffn", "smooth": False}]}}).policy.rules[
        0
    ].methods == {"smooth": "off"}


def test_a_block_that_a_target_does_not_take_is_refused_with_the_rule() -> None:
    rule = {"role": "ffn_down", "block_size": 32}
    with pytest.raises(RecipeError, match=r"policy.rules \{role: ffn_down, block_size: 32\}"):
        policy_on(target("a100"), policy(rule, preset="int4"))
    assert policy_on(target("cpu"), policy(rule, preset="int4")).rules[0].block_size == 32
    eight = policy({**rule, "precision": "w8a16"}, preset="int4")
    assert policy_on(target("a100"), eight) == eight


def test_fallback_leaves_rules_of_methods_alone() -> None:
    rules = ({"role": "ffn", "precision": "fp8"}, {"role": "ffn_down", "smooth": 0.85})
    found = policy_on(target("a100"), policy(*rules, preset="fp8", fallback=True))
    assert [(r.precision, r.smooth) for r in found.rules] == [("int8", None), (None, 0.85)]


def test_a_residual_add_stays_high_where_its_gemms_are_not_smoothed() -> None:
    def adds(*rules: dict[str, Any]) -> int:
        made = plan_zoo("bert", "gpu-int8", policy(*rules))
        return sum(n.precision.quantized for n in made if n.role is Role.RESIDUAL_ADD)

    assert adds({"role": "ffn", "smooth": "off"}) < adds()
    assert adds({"role": "ffn", "smooth": "off"}, {"role": "attention", "smooth": "off"}) == 0


def test_a_stage_reads_the_methods_that_it_names() -> None:
    plain, ruled = planned("cpu"), planned("cpu", {"name": "down", "rounding": "gptq"})
    assert plain.to_json() != ruled.to_json()
    assert plain.reading("smooth", "block_size") == ruled.reading("smooth", "block_size")
    assert plain.reading("rounding") != ruled.reading("rounding")
    assert "rule" not in json.loads(plain.reading())["nodes"][0]
