from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import recipe
from pipeline.errors import RecipeError
from pipeline.recipe import (
    ALIASES,
    DynamicBatching,
    Method,
    Preset,
    Recipe,
    RuleConfig,
    Source,
    TritonConfig,
    load,
    merge,
    parse,
    text,
    to_dict,
)
from pipeline.recipe.reference import reference, template
from pipeline.types import Precision, Role

ONNX = {"onnx": "m.onnx"}
ROOT = Path(__file__).parents[1]


def with_(**keys):
    return {"source": ONNX, **keys}


# ---- wrong keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wrong", "right"),
    [
        (with_(calibraton={}), "calibraton", "calibration"),
        (with_(calibration={"sampels": 3}), "calibration.sampels", "calibration.samples"),
        (
            with_(triton={"dynamic_batching": {"max_delay_us": 3}}),
            "triton.dynamic_batching.max_delay_us",
            "max_queue_delay_us",
        ),
        (
            with_(policy={"rules": [{"rol": "ffn", "precision": "int8"}]}),
            r"policy.rules\[0\].rol",
            r"policy.rules\[0\].role",
        ),
        (with_(samples=3), "samples", "calibration.samples or policy.mixed_precision.samples or validate.samples"),
        (with_(max_batch_size=3), "max_batch_size", "triton.max_batch_size"),
        ({"source": {"onx": "m.onnx"}}, "source.onx", "source.onnx"),
    ],
)
def test_wrong_key_names_the_nearest(values, wrong, right):
    with pytest.raises(RecipeError, match=rf"no key {wrong}; did you mean \S*{right}\?") as error:
        parse(values, where="pipeline.yaml")
    assert error.value.where == "pipeline.yaml"
    assert "are: " in error.value.fix


def test_a_key_like_nothing_lists_what_there_is():
    with pytest.raises(RecipeError, match=r"^There is no key validate.qqqq\.") as error:
        parse(with_(validate={"qqqq": 1}))
    assert "gates" in error.value.fix


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "source: is missing"),
        ({"source": {}}, "source: name exactly one of onnx, huggingface, module, pt2 (found none)"),
        ({"source": {"onnx": "a", "pt2": "b"}}, "(found onnx, pt2)"),
        (with_(threads="many"), "threads: 'many': input should be a valid integer"),
        (with_(calibration={"samples": 0}), "calibration.samples: 0: input should be greater than or equal to 1"),
        (
            with_(policy={"preset": "int9"}),
            "policy.preset: 'int9' is not one of fp32, fp16, bf16, int8, int8-all, fp8, fp8-int8, int4, fp4, w8a16, nf4; did you mean int8?",
        ),
        (with_(calibration={"method": "entrpy"}), "did you mean entropy?"),
        (with_(policy={"rules": [{"role": "ffn_dwn", "precision": "int8"}]}), "did you mean ffn_down?"),
        (
            with_(policy={"rules": [{"precision": "int8"}]}),
            "policy.rules[0]: a rule needs at least one of role, op_type, name",
        ),
        (with_(validate={"gates": {"sqnr_db": 20}}), "gate sqnr_db: '20' is not a condition"),
        (with_(triton=5), "triton: 5: should be a mapping"),
        (with_(name="../x"), "name: '../x': "),
        (with_(calibration=[1]), "calibration: [1]: should be a mapping"),
    ],
)
def test_wrong_value_is_one_clear_line(values, message):
    with pytest.raises(RecipeError) as error:
        parse(values)
    assert message in error.value.what
    assert "\n" not in error.value.what
    assert "pydantic" not in str(error.value)


def test_every_mistake_is_listed_once():
    with pytest.raises(RecipeError) as error:
        parse(
            with_(
                threads=-1,
                calibration={"samples": 0, "sampels": 1},
                policy={"rules": [{"role": "x", "precision": "y"}]},
            )
        )
    lines = error.value.what.splitlines()
    assert [line.split(":")[0].split(";")[0] for line in lines] == [
        "calibration.samples",
        "There is no key calibration.sampels",
        "policy.rules[0].role",
        "policy.rules[0].precision",
        "threads",
    ]


# ---- aliases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "preset"),
    [
        ("W8A8", "int8"),
        ("w16a16", "fp16"),
        ("W32A32", "fp32"),
        ("FP16", "fp16"),
        ("half", "fp16"),
        ("Int8_All", "int8-all"),
    ],
)
def test_aliases(said, preset):
    assert parse(with_(policy={"preset": said})).policy.preset is Preset(preset)


def test_every_alias_is_a_preset():
    assert set(ALIASES.values()) <= set(Preset)


@pytest.mark.parametrize("said", ["w4a8", "mxfp8", "NVFP4"])
def test_schemes_not_made_yet_are_refused_by_name(said):
    with pytest.raises(RecipeError, match=f"policy.preset: {said} is not made by this version"):
        parse(with_(policy={"preset": said}))
    with pytest.raises(RecipeError, match=rf"rules\[0\].precision: {said} is not made by this version"):
        parse(with_(policy={"rules": [{"name": "*", "precision": said}]}))


def test_rule_precision_is_the_shared_type():
    rule = RuleConfig(role="ffn", precision="W8A8")
    assert type(rule.precision) is Precision
    assert str(rule) == "{role: ffn, precision: int8}"
    assert RuleConfig(role="ffn_up", precision="fp16").role is Role.FFN_UP


# ---- files ---------------------------------------------------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_start_at_the_file(tmp_path, monkeypatch):
    (tmp_path / "in/hf").mkdir(parents=True)
    write(tmp_path / "in/hf2.py", "")
    file = write(
        tmp_path / "in/pipeline.yaml",
        """
        source: {huggingface: hf}
        calibration: {data: ../c.npz, tokenizer: tok}
        validate: {data: "my.module:pairs", labels: labels.tsv}
        costs: /abs/costs.json
        """,
    )
    monkeypatch.chdir("/")
    made = load(file)
    assert made.source.huggingface == str(tmp_path / "in/hf")
    assert made.calibration.data == str(tmp_path / "in/../c.npz")
    assert made.calibration.tokenizer == tmp_path / "in/tok"
    assert made.validate_.data == "my.module:pairs"
    assert made.validate_.labels == str(tmp_path / "in/labels.tsv")
    assert made.costs == Path("/abs/costs.json")


@pytest.mark.parametrize(("key", "value"), [("onnx", "m.onnx"), ("pt2", "m.pt2")])
def test_source_files_start_at_the_file(tmp_path, key, value):
    made = load(write(tmp_path / "p.yaml", f"source: {{{key}: {value}}}"))
    assert getattr(made.source, key) == tmp_path / value


def test_hub_ids_and_modules_are_no_paths(tmp_path):
    assert load(write(tmp_path / "p.yaml", "source: {huggingface: org/name}")).source.huggingface == "org/name"
    assert load(write(tmp_path / "p.yaml", "source: {module: 'a.b:c'}")).source.module == "a.b:c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: {onnx: a.onnx}\nthreads: 1\nthreads: 2\n", "'threads' is given twice"),
        ("source: {onnx: a.onnx, onnx: b.onnx}", "'onnx' is given twice"),
        ("source: [", "no valid YAML"),
        ("validate: {gates: {a: >= 3}}", "no valid YAML"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("a: 2001-99-99", "no valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as error:
        load(write(tmp_path / "p.yaml", text))
    assert str(tmp_path / "p.yaml") in error.value.where
    assert error.value.fix


def test_unreadable_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match="no valid YAML"):
        load(tmp_path / "latin.yaml")


def test_empty_headings_are_defaults(tmp_path):
    made = load(write(tmp_path / "p.yaml", f"source: {{onnx: {tmp_path}/m.onnx}}\ncalibration:\ntriton:\n"))
    assert made == Recipe(source=Source(onnx=tmp_path / "m.onnx"))


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "text", "read"),
    [
        ("calibration.samples", "64", lambda r: r.calibration.samples == 64),
        ("calibration.batch-size", "4", lambda r: r.calibration.batch_size == 4),
        ("calibration.method", "entropy-trt", lambda r: r.calibration.method is Method.ENTROPY_TRT),
        ("source.trust_source", "true", lambda r: r.source.trust_source is True),
        ("source.revision", "0123", lambda r: r.source.revision == "0123"),
        ("name", "007", lambda r: r.name == "007"),
        ("calibration.template", "{a}: {b}", lambda r: r.calibration.template == "{a}: {b}"),
        ("calibration.tokenizer", "null", lambda r: r.calibration.tokenizer is None),
        ("validate.gates.task.f1", ">= 99% of fp32", lambda r: r.validate_.gates == {"task.f1": ">= 99% of fp32"}),
        ("validate.latency_batches", "1,16", lambda r: r.validate_.latency_batches == (1, 16)),
        ("validate.latency_batches", "4", lambda r: r.validate_.latency_batches == (4,)),
        ("targets", "cpu, a100", lambda r: r.targets == ("cpu", "a100")),
        ("targets", "[cpu]", lambda r: r.targets == ("cpu",)),
        ("policy.rules", "[{role: ffn, precision: fp16}]", lambda r: r.policy.rules[0].role == "ffn"),
        ("triton.dynamic_batching", "null", lambda r: r.triton.dynamic_batching is None),
        (
            "triton.dynamic_batching.max_queue_delay_us",
            "7",
            lambda r: r.triton.dynamic_batching.max_queue_delay_us == 7,
        ),
        ("calibration.percentile", "99.9", lambda r: r.calibration.percentile == 99.9),
    ],
)
def test_every_key_is_a_flag(flag, text, read):
    assert read(parse(merge(with_(), {flag: text})))


def test_flags_win_and_leave_the_rest_alone():
    values = with_(calibration={"samples": 3, "method": "mse"})
    merged = merge(values, {"calibration.samples": "5"})
    assert merged["calibration"] == {"samples": 5, "method": "mse"}
    assert values["calibration"]["samples"] == 3


def test_all_keys_of_the_types_can_be_set():
    for key in text.dotted_keys(Recipe):
        merge(with_(), {key: "1"})


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("calibration.sampels", "--calibration.samples"),
        ("calibraton.samples", "--calibration.samples"),
        ("thread", "--threads"),
        ("max_batch_size", "--triton.max_batch_size"),
    ],
)
def test_wrong_flag_names_the_nearest(flag, near):
    with pytest.raises(RecipeError, match=f"no key --{flag}; did you mean {near}"):
        merge(with_(), {flag: "1"})


def test_a_value_has_no_keys():
    with pytest.raises(RecipeError, match=r"threads has no keys"):
        merge(with_(), {"threads.x": "1"})


# ---- round trip ----------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
TEXT = st.text(min_size=1, max_size=20)
RULES = st.builds(
    RuleConfig,
    role=st.sampled_from([None, "ffn", "*", *Role]),
    op_type=TEXT,
    name=st.none() | TEXT,
    precision=st.sampled_from(["fp32", "fp16", "int8", "W8A8"]),
)
RECIPES = st.builds(
    Recipe,
    name=NAMES,
    source=st.builds(Source, onnx=TEXT.map(Path), opset=st.integers(21, 23), task=st.none() | TEXT),
    calibration=st.builds(
        recipe.Calibration,
        data=st.none() | TEXT,
        method=st.sampled_from(Method),
        percentile=st.floats(51, 100),
        preprocessing=st.none() | st.dictionaries(TEXT, st.integers() | TEXT | st.lists(st.booleans())),
    ),
    policy=st.builds(recipe.PolicyConfig, preset=st.sampled_from(Preset), rules=st.lists(RULES, max_size=3)),
    targets=st.lists(NAMES, max_size=3),
    validate_=st.builds(recipe.Validation, gates=st.dictionaries(TEXT, st.just(">= 2")), latency_batches=st.just((2,))),
    triton=st.builds(TritonConfig, dynamic_batching=st.none() | st.builds(DynamicBatching)),
    costs=st.none() | st.just(Path("costs.json")),
)


@given(RECIPES)
@settings(deadline=None, max_examples=60)
def test_round_trip(made):
    values = to_dict(made)
    assert parse(values) == made
    assert parse(yaml.safe_load(yaml.safe_dump(values))) == made


# ---- documents -----------------------------------------------------------------------------------------------------


def test_reference_is_up_to_date():
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == reference(), (
        "run: python -m pipeline.recipe.reference > docs/recipe.md"
    )


def test_reference_has_every_key_with_a_meaning():
    rows = dict(re.findall(r"^\| `([\w.\[\]]+)` \|.*\| ([^|]+) \|$", reference().replace(r"\|", "¦"), re.MULTILINE))
    keys = set(text.dotted_keys(Recipe))
    assert keys <= set(rows)
    assert {f"policy.rules[].{k}" for k in RuleConfig.model_fields} <= set(rows)
    assert all(meaning.strip() for meaning in rows.values())


def test_links_in_the_reference_go_somewhere():
    text = reference()
    titles = {re.sub(r"[^\w-]", "", title.lower()) for title in re.findall(r"^## `?([^`\n]+)`?$", text, re.MULTILINE)}
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= titles


def test_template_is_a_recipe_as_it_stands(tmp_path):
    text = template({"source": {"onnx": "a b.onnx"}, "targets": ["cpu"]})
    made = load(write(tmp_path / "pipeline.yaml", text))
    assert made == Recipe(source=Source(onnx=tmp_path / "a b.onnx"))


def test_template_with_every_line_uncommented_still_holds_the_defaults():
    text = template({"source": {"onnx": "m.onnx"}})
    live = re.sub(r"^( *)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)
    assert len(re.findall(r"^ *\w+:", live, re.MULTILINE)) > 40
    assert parse(yaml.safe_load(live)) == Recipe(source=Source(onnx=Path("m.onnx")))
