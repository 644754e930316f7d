"""Rules, guards, costs and FP16 islands on graphs of a few nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from calibrators.sketch import Sketch
from engines.target import target
from pipeline.errors import PolicyError
from pipeline.notices import collecting
from pipeline.policy.extents import extents
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import Evidence, family, plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.policy.sizes import expected_bytes
from pipeline.recipe import PolicyConfig, Preset, RuleConfig
from pipeline.types import NodeRole, Precision, Role
from tests.policy.planned import entry, graph, roles_of, weight

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8


def chain() -> tuple[ir.Model, dict[str, NodeRole]]:
    """ids -> Gather -> up MatMul -> Relu -> down MatMul -> y."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="/embed/Gather"),
        helper.make_node("MatMul", ["e", "w1"], ["h"], name="/layer.0/up"),
        helper.make_node("Relu", ["h"], ["r"], name="/layer.0/act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="/layer.1/down"),
    ]
    weights = {"table": weight(100, 32), "w1": weight(32, 64), "w2": weight(64, 32)}
    model = graph(nodes, {"ids": ["b", 7]}, weights)
    roles = {
        "/embed/Gather": NodeRole(role=Role.EMBEDDING),
        "/layer.0/up": NodeRole(role=Role.FFN_UP, block=0),
        "/layer.0/act": NodeRole(role=Role.OTHER, block=0),
        "/layer.1/down": NodeRole(role=Role.FFN_DOWN, block=1),
    }
    return model, roles


def planned(*rules: RuleConfig, to: str = "cpu", preset: Preset = Preset.INT8, **more: object) -> PrecisionPlan:
    model, roles = chain()
    return plan(model, roles, PolicyConfig(preset=preset, rules=rules), to, Evidence(**more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        (RuleConfig(role=Role.FFN_UP, precision=FP32), ["/layer.0/up"]),
        (RuleConfig(role="ffn", precision=FP32), ["/layer.0/up", "/layer.1/down"]),
        (RuleConfig(role="attention", precision=FP32), []),
        (RuleConfig(op_type="MatMul", precision=FP32), ["/layer.0/up", "/layer.1/down"]),
        (RuleConfig(name="*/layer.1/*", precision=FP32), ["/layer.1/down"]),
        (RuleConfig(name="/layer.1/down", op_type="Gemm", precision=FP32), []),
        (RuleConfig(role="*", name="*up", precision=FP32), ["/layer.0/up"]),
    ],
    ids=str,
)
def test_a_rule_matches_what_meets_all_of_its_conditions(rule: RuleConfig, changed: list[str]) -> None:
    before, after = planned(), planned(rule)
    assert [a.node for a, b in zip(after, before, strict=True) if a.precision is not b.precision] == changed
    assert all(entry(after, node).rule == f"recipe {rule}" for node in changed)


def test_the_last_matching_rule_wins_and_is_named() -> None:
    first = RuleConfig(role="ffn", precision=FP32)
    second = RuleConfig(role=Role.FFN_UP, precision=INT8)
    made = planned(first, second)
    assert (entry(made, "/layer.0/up").precision, entry(made, "/layer.0/up").rule) == (INT8, f"recipe {second}")
    assert (entry(made, "/layer.1/down").precision, entry(made, "/layer.1/down").rule) == (FP32, f"recipe {first}")
    assert entry(planned(second, first), "/layer.0/up").precision is FP32


def test_fp16_means_fp32_without_a_gpu_and_the_plan_says_so() -> None:
    rule = RuleConfig(role=Role.FFN_UP, precision=FP16)
    on_cpu, on_gpu = entry(planned(rule), "/layer.0/up"), entry(planned(rule, to="gpu-int8"), "/layer.0/up")
    assert (on_cpu.precision, on_gpu.precision) == (FP32, FP16)
    assert "FP32" in on_cpu.rule
    assert on_cpu.rule.startswith(f"recipe {rule}")


@pytest.mark.parametrize(
    ("preset", "asked", "cpu", "gpu"),
    [
        (Preset.FP32, (), "fp32", "fp32"),
        (Preset.FP32, (INT8,), "cpu", "gpu-int8"),
        (Preset.FP32, (FP16,), "fp32", "gpu-fp16"),
        (Preset.INT8, (), "cpu", "gpu-int8"),
        (Preset.INT8_ALL, (FP32,), "cpu", "gpu-int8"),
        (Preset.FP16, (), None, "gpu-fp16"),
        (Preset.FP16, (INT8,), None, "gpu-int8"),
    ],
)
def test_the_variant_follows_everything_that_the_policy_asks_for(
    preset: Preset, asked: tuple[Precision, ...], cpu: str | None, gpu: str
) -> None:
    policy = PolicyConfig(preset=preset, rules=tuple(RuleConfig(role="ffn", precision=p) for p in asked))
    assert family(target("a100"), policy) == gpu
    if cpu is None:
        with pytest.raises(PolicyError, match="FP16"):
            family(target("cpu"), policy)
    else:
        assert family(target("cpu"), policy) == cpu


def test_preset_fp32_keeps_fp32_around_what_a_rule_quantizes() -> None:
    made = planned(RuleConfig(role="ffn", precision=INT8), to="gpu-int8", preset=Preset.FP32)
    assert made.elsewhere is FP32
    assert made.counts() == {"fp32": 2, "int8": 2}
    mixed = planned(RuleConfig(role="ffn", precision=FP16), to="gpu-fp16", preset=Preset.FP32)
    assert mixed.elsewhere is FP16
    assert mixed.counts() == {"fp16": 2, "fp32": 2}


def test_an_embedding_is_int8_in_int8_all_or_where_a_rule_says_so() -> None:
    model, _ = chain()
    assert entry(planned(preset=Preset.INT8_ALL), "/embed/Gather").precision is INT8
    made = planned(RuleConfig(role=Role.EMBEDDING, precision=INT8))
    assert entry(made, "/embed/Gather").precision is INT8
    scales = 5 * (32 + 64 + 32)  # FP32, and a zero point
    assert expected_bytes(model, made) == 100 * 32 + 32 * 64 + 64 * 32 + scales
    assert entry(planned(), "/embed/Gather").precision is INT8
    # On a GPU the look-up in FP16 costs no kernel of its own.
    high = planned(to="gpu-int8")
    assert entry(high, "/embed/Gather").precision is Precision.FP16
    assert expected_bytes(model, high) == 2 * 100 * 32 + 32 * 64 + 64 * 32 + 2 * (64 + 32)


def test_what_has_no_quantized_form_says_so_and_which_rule_asked() -> None:
    made = planned(RuleConfig(name="*", precision=INT8))
    act = entry(made, "/layer.0/act")
    assert act.precision is FP32
    assert act.rule == "not quantizable (Relu has no quantized form), asked by recipe {name: *, precision: int8}"
    assert len(made.quantized()) == 3


def said(*rules: RuleConfig, costs: dict[str, dict[str, float]] | None = None) -> list[tuple[str, str]]:
    model, roles = chain()
    policy = PolicyConfig(rules=rules)
    with collecting() as notices:
        remark(
            plan(model, roles, policy, "cpu", Evidence(costs=costs or {})),
            candidates(model, roles),
            policy,
            Evidence(costs=costs or {}),
        )
    return [(n.code, f"{n.message} [{n.where}]") for n in notices]


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        (RuleConfig(name="*/layer.7/down", precision=FP32), "no such name; the nearest is /layer.1/down"),
        (RuleConfig(role=Role.FFN_GATE, precision=FP32), "no such role; the nearest is ffn_"),
        (RuleConfig(op_type="Matmul", precision=FP32), "no such op type; the nearest is MatMul"),
        (RuleConfig(role=Role.FFN_UP, name="*down", precision=FP32), "no node meets them all"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest(rule: RuleConfig, near: str) -> None:
    [(code, message)] = said(RuleConfig(role="ffn", precision=INT8), rule)
    assert code == "rule-unmatched"
    assert near in message
    assert "policy.rules[1]" in message


def test_a_rule_that_can_quantize_nothing_is_said_and_one_that_can_is_not() -> None:
    [(code, message)] = said(RuleConfig(op_type="Relu", precision=INT8))
    assert code == "rule-not-quantizable"
    assert "/layer.0/act" in message
    assert "Relu has no quantized form" in message
    assert said(RuleConfig(name="/layer.0/*", precision=INT8)) == []


def test_costs_keep_what_gets_slower_in_fp32_on_cpu_alone_and_a_rule_overrides_them() -> None:
    costs = {
        "/layer.0/up": {"fp32_ms": 1.0, "int8_ms": 1.5},
        "/layer.1/down": {"fp32_ms": 1.0, "int8_ms": 0.5},
    }
    made = planned(costs=costs)
    assert [n.node for n in made.quantized()] == ["/embed/Gather", "/layer.1/down"]
    assert entry(made, "/layer.0/up").rule == "costs: 1.5 ms in INT8, 1 ms in FP32"
    assert len(planned(costs=costs, to="gpu-int8").quantized()) == 2
    assert len(planned(RuleConfig(role="ffn", precision=INT8), costs=costs).quantized()) == 3
    assert said(costs=costs) == []
    assert [code for code, _ in said(costs={"other": {"fp32_ms": 1.0, "int8_ms": 2.0}})] == ["costs-unused"]


def gemm(k: int, n: int, rows: list[int | str], op: str = "MatMul") -> PrecisionPlan:
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name="node")]
    model = graph(nodes, {"x": [*rows, k]}, {"w": weight(k, n)})
    return plan(model, roles_of(node=Role.LINEAR), PolicyConfig(), "cpu")


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize(("k", "n", "kept"), [(15, 64, True), (64, 15, True), (16, 16, False), (1, 64, True)])
def test_small_gemms_stay_high(op: str, k: int, n: int, kept: bool) -> None:
    [node] = gemm(k, n, ["b"], op)
    assert node.rule.startswith("guard: GEMM with K or N below 16") is kept
    assert node.precision.quantized is not kept


@pytest.mark.parametrize(
    ("rows", "kept"), [([1], True), ([1, 1], True), (["b"], False), ([1, "t"], False), ([2], False)]
)
def test_matrix_vector_products_stay_high(rows: list[int | str], kept: bool) -> None:
    [node] = gemm(32, 32, rows)
    assert (node.rule == "guard: matrix-vector product") is kept
    assert node.precision.quantized is not kept


@pytest.mark.parametrize(
    ("op", "shape", "group", "role", "cpu", "gpu"),
    [
        ("Conv", (16, 16, 3, 3), 1, Role.CONV, INT8, INT8),
        ("Conv", (8, 16, 3, 3), 1, Role.CONV, FP32, FP16),
        ("Conv", (16, 8, 3, 3), 1, Role.CONV, FP32, FP16),
        ("Conv", (16, 3, 3, 3), 1, Role.CONV_STEM, INT8, INT8),
        ("Conv", (8, 3, 3, 3), 1, Role.CONV_STEM, FP32, FP16),
        ("Conv", (32, 1, 3, 3), 32, Role.DEPTHWISE_CONV, FP32, INT8),
        ("ConvTranspose", (16, 16, 3, 3), 1, Role.CONV, FP32, INT8),
    ],
)
def test_narrow_convolutions_stay_high(
    op: str, shape: tuple[int, ...], group: int, role: Role, cpu: Precision, gpu: Precision
) -> None:
    channels = shape[0] if op == "ConvTranspose" else shape[1] * group
    model = graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="node", group=group)],
        {"x": ["b", channels, 9, 9]},
        {"w": weight(*shape)},
    )
    for to, expected in (("cpu", cpu), ("gpu-int8", gpu)):
        assert entry(plan(model, roles_of(node=role), PolicyConfig(), to), "node").precision is expected


def test_a_residual_add_needs_int8_convolutions_on_both_sides() -> None:
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", **conv),
        helper.make_node("Relu", ["a"], ["r"], name="act"),
        helper.make_node("Conv", ["r", "w"], ["b"], name="second", **conv),
        helper.make_node("Add", ["b", "r"], ["s"], name="near"),
        helper.make_node("Sigmoid", ["s"], ["g"], name="gate"),
        helper.make_node("Add", ["s", "g"], ["y"], name="far"),
    ]
    model = graph(nodes, {"x": ["n", 16, 8, 8]}, {"w": weight(16, 16, 3, 3)})
    roles = roles_of(first=Role.CONV, second=Role.CONV, near=Role.RESIDUAL_ADD, far=Role.RESIDUAL_ADD)
    made = plan(model, roles, PolicyConfig(), "cpu")
    assert (entry(made, "near").precision, entry(made, "far").precision) == (INT8, FP32)
    high = PolicyConfig(rules=(RuleConfig(name="second", precision=FP32),))
    assert entry(plan(model, roles, high, "cpu"), "near").precision is FP32
    asked = PolicyConfig(rules=(RuleConfig(name="far", precision=INT8),))
    assert entry(plan(model, roles, asked, "cpu"), "far").precision is INT8


def sketch(*values: float) -> Sketch:
    made = Sketch()
    made.update(np.asarray(values, np.float32))
    return made


@pytest.mark.parametrize("sentinel", [-3.4e38, -1e9, -np.inf, np.finfo(np.float32).min])
def test_mask_sentinels_are_no_activations(sentinel: float) -> None:
    found = extents({"mask": sketch(0.0, sentinel), "scores": sketch(-12.0, 7.0, sentinel), "big": sketch(70000.0)})
    assert found["mask"] == 0.0
    assert 12.0 <= found["scores"] <= 12.0 * 1.01
    assert found["big"] == 70000.0


def test_nodes_beyond_fp16_become_fp32_islands_and_others_do_not() -> None:
    small, large = {"h": 65000.0, "r": 1.0}, {"h": 66000.0, "r": 1.0}
    assert FP32 not in planned(to="gpu-int8", extents=small).precisions().values()
    made = planned(to="gpu-int8", extents=large)
    assert {n.node for n in made if n.precision is FP32} == {"/layer.0/up", "/layer.0/act"}
    assert "6.6e+04" in entry(made, "/layer.0/up").rule
    assert planned(extents=large).precisions() == planned().precisions()


def test_constants_that_fp16_rounds_to_zero_keep_their_node_in_fp32() -> None:
    for epsilon, expected in ((1e-12, FP32), (1e-5, FP16)):
        nodes = [helper.make_node("Add", ["x", "eps"], ["y"], name="node")]
        model = graph(nodes, {"x": ["b", 4]}, {"eps": np.array(epsilon, np.float32)})
        assert entry(plan(model, {}, PolicyConfig(), "gpu-int8"), "node").precision is expected


def test_dynamic_activations_quantize_matrix_products_with_a_constant_weight_only() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="weighted"),
        helper.make_node("MatMul", ["a", "a"], ["y"], name="product"),
    ]
    model = graph(nodes, {"x": ["b", 32, 32]}, {"w": weight(32, 32)})
    roles = roles_of(weighted=Role.LINEAR, product=Role.ATTENTION_SCORES)
    policy = PolicyConfig(preset=Preset.INT8_ALL, activations="dynamic")
    made = plan(model, roles, policy, "cpu")
    assert (entry(made, "weighted").precision, entry(made, "product").precision) == (INT8, FP32)
    assert "dynamic" in entry(made, "product").rule
    assert made.dynamic
    assert not plan(model, roles, policy, "gpu-int8").dynamic


def test_a_quantizing_preset_that_quantizes_nothing_says_why() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["y"], name="relu"),
    ]
    model, roles = graph(nodes, {"x": ["b", 32, 8, 8]}, {"w": weight(32, 32, 3, 3)}), roles_of(conv=Role.CONV)
    for policy, told in (
        (PolicyConfig(activations="dynamic-per-token"), "Conv has no form with dynamic activations"),
        (PolicyConfig(rules=(RuleConfig(name="conv", precision=FP32),)), "recipe {name: conv, precision: fp32}"),
        (PolicyConfig(), None),
        (PolicyConfig(preset=Preset.FP32), None),
    ):
        with collecting() as notices:
            remark(plan(model, roles, policy, "cpu"), candidates(model, roles), policy)
        found = [n.message for n in notices if n.code == "nothing-quantized"]
        assert len(found) == (told is not None)
        assert all(told in message for message in found if told)


def test_angles_from_integers_stay_fp32_and_sines_of_activations_do_not() -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["p"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Mul", ["p", "frequency"], ["angle"], name="angles"),
        helper.make_node("Cos", ["angle"], ["c"], name="cosine"),
        helper.make_node("Gather", ["table", "ids"], ["e"], name="lookup"),
        helper.make_node("Sin", ["e"], ["s"], name="sine"),
        helper.make_node("Mul", ["s", "c"], ["y"], name="rotate"),
    ]
    weights = {"frequency": weight(8), "table": weight(50, 8)}
    made = plan(graph(nodes, {"ids": ["b", 1]}, weights), {}, PolicyConfig(), "gpu-int8")
    assert {n.node for n in made if n.precision is FP32} == {"cast", "angles", "cosine"}
