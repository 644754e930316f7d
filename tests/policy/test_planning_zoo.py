"""Placement on exports of real architectures: what each preset makes INT8, by role and by count."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.policy.half_range import FLOAT16_MAX
from pipeline.quantize.insertion.sites import sites
from pipeline.recipe import PolicyConfig, Preset, RuleConfig
from pipeline.types import Precision, Role
from tests.policy.planned import canonical, plan_zoo
from tests.zoo import LAYERS

ENCODER = {"attention_query", "attention_key", "attention_value", "attention_output", "ffn_up", "ffn_down"}
GEMMS = {
    "bert": ENCODER,
    "distilbert": ENCODER,
    "llama": ENCODER | {"ffn_gate"},
    "gpt2": {"attention_qkv", "attention_output", "ffn_up", "ffn_down"},
}
HIGH = {Role.EMBEDDING, Role.NORM, Role.HEAD, Role.ATTENTION_SOFTMAX}
CORE = {Role.ATTENTION_SCORES, Role.ATTENTION_SOFTMAX, Role.ATTENTION_CONTEXT}
FAMILIES = ("cpu", "gpu-int8")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GEMMS)
def test_preset_int8_takes_every_projection_and_ffn_gemm_and_nothing_else(name: str, family: str) -> None:
    made = plan_zoo(name, family)
    gemms = [n for n in made.quantized() if n.role not in (Role.RESIDUAL_ADD, Role.EMBEDDING)]
    assert Counter(n.role for n in gemms) == dict.fromkeys(GEMMS[name], LAYERS)
    assert {n.op_type for n in gemms} <= {"MatMul", "Gemm"}
    assert all(n.rule.startswith("preset int8: ") for n in made.quantized())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_attention_core_is_untouched_by_int8_and_its_matmuls_by_int8_all_are_not(name: str, family: str) -> None:
    core = [n for n in plan_zoo(name, family) if n.role in CORE]
    assert len([n for n in core if n.role is not Role.ATTENTION_SOFTMAX]) == 2 * LAYERS
    assert not any(n.precision.quantized for n in core)
    everything = plan_zoo(name, family, PolicyConfig(preset=Preset.INT8_ALL))
    matmuls = [n for n in everything if n.role in (Role.ATTENTION_SCORES, Role.ATTENTION_CONTEXT)]
    assert [n.precision for n in matmuls] == [Precision.INT8] * (2 * LAYERS)
    assert {n.role for n in everything if n.role in HIGH and n.precision.quantized} <= {Role.EMBEDDING}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_query_key_and_value_share_one_activation_pair(name: str, family: str) -> None:
    model, _ = canonical(name)
    made = plan_zoo(name, family)
    blocks: dict[int | None, set[str]] = {}
    for item in made:
        if item.role in (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE):
            blocks.setdefault(item.block, set()).add(item.node)
    assert [len(nodes) for nodes in blocks.values()] == [3] * LAYERS
    found = sites(model, made)
    for nodes in blocks.values():
        reading = [s for s in found if s.readers and nodes & {n for n, _ in s.readers}]
        assert len(reading) == 1
        assert nodes <= {n for n, _ in reading[0].readers or ()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_projection_in_high_precision_takes_the_other_two_along(family: str) -> None:
    query = next(n for n in plan_zoo("bert", family) if n.role is Role.ATTENTION_QUERY)
    policy = PolicyConfig(rules=(RuleConfig(name=query.node, precision=Precision.FP32),))
    made = plan_zoo("bert", family, policy)
    same = [n for n in made if n.block == query.block and n.role in (Role.ATTENTION_KEY, Role.ATTENTION_VALUE)]
    assert [n.precision for n in same] == [Precision.FP32] * 2
    assert all(query.node in n.rule and "precision: fp32" in n.rule for n in same)
    kinds = Counter(n.op_type for n in made.quantized())
    assert kinds["MatMul"] + kinds["Gemm"] == 6 * LAYERS - 3


def test_a_projection_beyond_fp16_takes_the_other_two_along() -> None:
    model, _ = canonical("bert")
    key = next(n for n in plan_zoo("bert", "gpu-int8") if n.role is Role.ATTENTION_KEY)
    output = next(n for n in model.graph if n.name == key.node).outputs[0].name
    made = plan_zoo("bert", "gpu-int8", extents={output: 2 * FLOAT16_MAX})
    block = [n for n in made if n.block == key.block and str(n.role) in ENCODER and "attention_o" not in n.role]
    kept = [n.precision for n in block if n.role.startswith("attention_")]
    assert kept == [Precision.FP32] * 3


def test_depthwise_convolutions_are_int8_on_gpus_and_not_on_cpus() -> None:
    for family, expected in (("cpu", Precision.FP32), ("gpu-int8", Precision.INT8)):
        made = plan_zoo("cnn", family)
        assert [n.precision for n in made if n.role is Role.DEPTHWISE_CONV] == [expected] * 3
        assert {n.precision for n in made if n.role in (Role.CONV, Role.CONV_STEM)} == {Precision.INT8}
        assert [n.precision for n in made if n.role is Role.RESIDUAL_ADD] == [Precision.INT8] * 3
    assert all("slower in INT8" in n.rule for n in plan_zoo("cnn", "cpu") if n.role is Role.DEPTHWISE_CONV)


def test_residual_adds_between_transformer_layers_are_int8_where_they_share_a_smoothed_tensor() -> None:
    for family in FAMILIES:
        adds = [n for n in plan_zoo("bert", family) if n.role is Role.RESIDUAL_ADD]
        assert len(adds) == 2 * LAYERS
        shared = family == "gpu-int8"
        assert all(n.precision.quantized is shared for n in adds)
        assert shared or all(n.rule.startswith("guard: residual add") for n in adds)
    unsmoothed = [n for n in plan_zoo("bert", "gpu-int8", smoothable=False) if n.role is Role.RESIDUAL_ADD]
    assert not any(n.precision.quantized for n in unsmoothed)


def test_positions_and_written_out_norms_stay_fp32_where_the_rest_is_fp16() -> None:
    made = plan_zoo("llama", "gpu-int8")
    by_op = {op: {n.precision for n in made if n.op_type == op} for op in ("Sin", "Cos", "ReduceMean", "Softmax")}
    assert by_op == {
        "Sin": {Precision.FP32},
        "Cos": {Precision.FP32},
        "ReduceMean": {Precision.FP32},
        "Softmax": {Precision.FP16},
    }
    model, _ = canonical("llama")
    precision = made.precisions()
    sine = next(n for n in model.graph if n.op_type == "Sin")
    upstream, names = [sine], set()
    while upstream:  # everything float that the angle is computed from
        node = upstream.pop()
        names.add(node.name)
        upstream += [
            v.producer() for v in node.inputs if v is not None and v.producer() is not None and not v.dtype.is_integer()
        ]
    assert len(names) > 2
    assert {precision[n] for n in names} == {Precision.FP32}


def test_layer_normalization_as_one_operator_stays_fp16() -> None:
    norms = [n for n in plan_zoo("bert", "gpu-int8") if n.op_type == "LayerNormalization"]
    assert norms
    assert {n.precision for n in norms} == {Precision.FP16}


@pytest.mark.parametrize("name", ["bert", "llama", "cnn"])
def test_a_plan_survives_its_json_and_is_the_same_every_time(name: str) -> None:
    for family in FAMILIES:
        first, second = plan_zoo(name, family), plan_zoo(name, family)
        assert type(first).from_json(first.to_json()) == first
        assert first.to_json() == second.to_json()
