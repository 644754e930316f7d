"""What each rule finds: on graphs made for it, on graphs that are all right, and on whole models."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T

from pipeline.errors import ModelError, RecipeError
from pipeline.lint.finding import Severity
from pipeline.lint.lint import lint, lint_path
from pipeline.lint.rules import RULES
from tests.lint import placements
from tests.lint.confusion import findings
from tests.lint.draft import Draft
from tests.lint.suites import SM89, SUITES, Case, Suite, generate, sound

ROOT = Path(__file__).parents[2]


def rules_in(model: bytes) -> set[str]:
    return {f.rule for f in findings(Case(model=model))}


def draft(float_type: int = T.FLOAT16) -> Draft:
    return Draft(rng=np.random.default_rng(0), float_type=float_type, opset=21)


@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.rule}-{s.what}")
def test_a_rule_finds_the_faulty_graphs_and_no_others(suite: Suite) -> None:
    for case in generate(suite.faulty, 8, seed=3):
        found = [f for f in findings(case) if f.rule == suite.rule]
        assert found, "faulty and not found"
        serious = any(f.severity is Severity.ERROR for f in found)
        assert serious is (suite.expect != "accepted" and suite.judge != "onnx"), found
        assert all(f.node and f.message and f.reason and f.fix for f in found)
    for case in generate(suite.clean, 8, seed=3):
        assert not [f for f in findings(case) if f.rule == suite.rule]


def test_sound_graphs_have_no_errors_of_any_rule() -> None:
    for case in generate(sound, 40, seed=11):
        assert [f for f in findings(case) if f.severity is Severity.ERROR] == []


def test_ids_and_names_are_unique_and_documented() -> None:
    text = (ROOT / "docs/lint.md").read_text(encoding="utf-8")
    assert len({r.id for r in RULES}) == len({r.name for r in RULES}) == len(RULES) == 28
    for rule in RULES:
        assert rule.reason.endswith("."), rule.id
        assert rule.source, rule.id
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {rule.id} | {rule.name} |")]
        assert row.split("|")[3].strip() == rule.severity, row
        repairs = [line for line in text.splitlines() if line.startswith("|") and f"{rule.id}" in line.split("|")[1]]
        assert (len(repairs) > 1) is (rule.repair is not None and rule.severity is not Severity.NOTE), rule.id


@pytest.mark.parametrize("narrow", [False, True])
def test_attention_is_judged_at_every_placement(narrow: bool) -> None:
    for places in placements.ATTENTION:
        found = findings(Case(model=placements.attention(places, narrow=narrow), capability=SM89))
        breaks = [f for f in found if f.rule == "QDQ209" and "no fused attention" in f.message]
        assert bool(breaks) is not placements.attention_fuses(places, narrow=narrow), places


@pytest.mark.parametrize(
    ("model", "rule", "expected"),
    [
        (placements.concatenated(shared=False), "QDQ205", True),
        (placements.concatenated(shared=True), "QDQ205", False),
        (placements.concatenated(shared=False, again=True), "QDQ205", False),
        (placements.residual(both=True), "QDQ206", True),
        (placements.residual(both=False), "QDQ206", False),
        (placements.product(1, 64, 64), "QDQ207", True),
        (placements.product(64, 64, 1), "QDQ207", True),
        (placements.product(64, 64, 64), "QDQ207", False),
        (placements.product(1, 64, 64, quantized=False), "QDQ207", False),
        (placements.product(64, 15, 64), "QDQ208", True),
        (placements.product(64, 64, 15), "QDQ208", True),
        (placements.product(64, 16, 16), "QDQ208", False),
        (placements.convolution(quantize_input=False), "QDQ210", True),
        (placements.convolution(quantize_weight=False), "QDQ210", True),
        (placements.convolution(), "QDQ210", False),
        (placements.product(64, 64, 64, weight_quantized=False), "QDQ210", True),
        (placements.product(64, 64, 64, quantized=False), "QDQ210", False),
    ],
)
def test_rules_about_speed(model: bytes, rule: str, *, expected: bool) -> None:
    assert (rule in rules_in(model)) is expected


def test_a_wrong_block_size_that_tensorrt_would_read_otherwise() -> None:
    d = draft()
    codes = d.constant(d.codes((192, 16), T.INT4), T.INT4)
    weight = d.dequantize(codes, d.constant(np.full((2, 16), 0.02)), axis=0, block_size=128)
    found = findings(Case(model=d.model((d.node("MatMul", [d.input((4, 192)), weight]), None))))
    (error,) = [f for f in found if f.severity is Severity.ERROR]
    assert (error.rule, "reads blocks of 96" in error.message) == ("QDQ115", True)


def test_pairs_in_subgraphs_are_judged() -> None:
    d = draft(T.FLOAT)
    inner = draft(T.FLOAT)
    inner.count = 100
    x = d.input((2, 4))
    made = inner.pair(x, 0.1, T.INT8, zero=3)
    ends = [onnx.helper.make_tensor_value_info(made, T.FLOAT, [2, 4])]
    branch = onnx.helper.make_graph(inner.nodes, "branch", [], ends, inner.inits)
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [x], ["same"])], "other", [],
        [onnx.helper.make_tensor_value_info("same", T.FLOAT, [2, 4])],
    )  # fmt: skip
    condition = d.input((), T.BOOL)
    made = d.node("If", [condition], then_branch=branch, else_branch=other)
    assert "QDQ101" in rules_in(d.model((made, None)))


def test_dynamic_shapes_do_not_matter() -> None:
    d = draft()
    x = "x"
    d.inputs.append(onnx.helper.make_tensor_value_info(x, d.float_type, ["batch", None]))
    found = findings(Case(model=d.model((d.node("MatMul", [d.pair(x), d.weight((32, 32))]), None))))
    assert found == ()


def test_time_grows_with_the_graph_and_no_faster() -> None:
    def seconds(layers: int) -> float:
        d = draft(T.FLOAT)
        value = d.input((2, 16))
        for _ in range(layers):
            made = d.node("MatMul", [d.pair(value), d.weight((16, 16))])
            value = d.node("Concat", [d.pair(made), d.pair(value)], axis=1)
            value = d.node("Slice", [value, d.ints(0), d.ints(16), d.ints(1)])
        model = ir.serde.deserialize_model(onnx.load_model_from_string(d.model((value, None))))
        best = 9e9
        for _ in range(2):
            started = time.process_time()
            assert lint(model, name="deep").findings is not None
            best = min(best, time.process_time() - started)
        return best

    assert seconds(240) < 4 * 2 * seconds(60)


def test_a_build_directory_is_its_gpu_variants(tmp_path: Path) -> None:
    bad = generate(SUITES[0].faulty, 1, seed=0)[0].model
    for family in ("cpu", "gpu-int8"):
        (tmp_path / "variants" / family).mkdir(parents=True)
        (tmp_path / "variants" / family / "model.onnx").write_bytes(bad)
    (report,) = lint_path(tmp_path)
    assert report.model.endswith("variants/gpu-int8/model.onnx")
    assert report.has_errors


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(generate(sound, 1, seed=0)[0].model)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(RecipeError, match="did you mean a10"):
        lint_path(tmp_path / "m.onnx", target="a101")
    with pytest.raises(RecipeError, match="CPU"):
        lint_path(tmp_path / "m.onnx", target="cpu")
    with pytest.raises(RecipeError, match="no variant for a GPU"):
        lint_path(tmp_path)
    with pytest.raises(ModelError):
        lint_path(tmp_path / "broken.onnx")
