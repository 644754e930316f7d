"""Skip lists and the outlier threshold."""

from __future__ import annotations

import numpy as np
import pytest

from calibrators.sketch import Sketch
from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.policy.planning import Evidence, plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.policy.skip import named, outlier_ratios
from pipeline.recipe import PolicyConfig, RuleConfig, parse
from pipeline.types import Precision
from tests.policy.planned import entry
from tests.policy.test_planning_rules import chain


@pytest.mark.parametrize(
    ("pattern", "node", "met"),
    [
        ("lm_head", "/lm_head/MatMul", True),
        ("lm_head", "model.lm_head.MatMul", True),
        ("lm_head", "lm_head", True),
        ("lm_head", "/lm_head_norm/MatMul", False),
        ("lm_head", "/my_lm_head/MatMul", False),
        ("layer.1", "/encoder/layer.1/ffn/MatMul", True),
        ("layer.1", "/encoder/layer.11/ffn/MatMul", False),
        ("*/layer.1/*", "/encoder/layer.1/ffn/MatMul", True),
        ("*/layer.1/*", "/encoder/layer.11/ffn/MatMul", False),
        ("*head*", "/lm_head_norm/MatMul", True),
        ("proj+out", "/projjout/MatMul", False),
    ],
)
def test_a_skip_entry_is_a_glob_or_the_name_of_a_module(pattern: str, node: str, met: bool) -> None:
    assert named(pattern, node) is met


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_what_is_skipped_stays_high_even_where_a_rule_asks_for_int8(family: str) -> None:
    model, roles = chain()
    policy = PolicyConfig(rules=(RuleConfig(role="ffn", precision=Precision.INT8),), skip=("down",))
    made = plan(model, roles, policy, family)
    high = Precision.FP32 if family == "cpu" else Precision.FP16
    assert entry(made, "/layer.1/down").precision is high
    assert entry(made, "/layer.1/down").rule == "skip: down"
    assert entry(made, "/layer.0/up").precision is Precision.INT8


def test_an_outlier_ratio_is_the_largest_magnitude_over_the_99_9th_percentile() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[7] = -400.0
    sketch = Sketch()
    sketch.update(values)
    expected = 400.0 / np.quantile(np.abs(values), 0.999)
    assert outlier_ratios({"x": sketch})["x"] == pytest.approx(expected, rel=5e-3)


def test_a_node_that_reads_outliers_stays_high() -> None:
    model, roles = chain()
    up, down = (next(n for n in model.graph if n.name == name) for name in ("/layer.0/up", "/layer.1/down"))
    outliers = {up.inputs[0].name: 90.0, down.inputs[0].name: 3.0}
    made = plan(model, roles, PolicyConfig(outlier_threshold=50), "cpu", Evidence(outliers=outliers))
    assert entry(made, "/layer.0/up").precision is Precision.FP32
    assert entry(made, "/layer.0/up").rule.startswith("outliers: ")
    assert entry(made, "/layer.1/down").precision is Precision.INT8
    unlimited = plan(model, roles, PolicyConfig(), "cpu", Evidence(outliers=outliers))
    assert entry(unlimited, "/layer.0/up").precision is Precision.INT8


def test_a_skip_entry_that_names_nothing_is_told_with_the_nearest_name() -> None:
    model, roles = chain()
    policy = PolicyConfig(skip=("layer.7",))
    with collecting() as notices:
        remark(plan(model, roles, policy, "cpu"), candidates(model, roles), policy)
    assert [n.code for n in notices] == ["skip-unmatched"]
    assert "/layer." in notices[0].message


def test_a_skip_list_may_be_text_with_commas_and_a_threshold_must_exceed_one() -> None:
    recipe = parse({"source": {"onnx": "m.onnx"}, "policy": {"skip": "lm_head, embed_tokens"}})
    assert recipe.policy.skip == ("lm_head", "embed_tokens")
    with pytest.raises(RecipeError, match="outlier_threshold"):
        parse({"source": {"onnx": "m.onnx"}, "policy": {"outlier_threshold": 0.5}})
