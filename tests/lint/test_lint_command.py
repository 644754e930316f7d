"""The command and its three formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from onnx import TensorProto as T
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.lint.lint import lint_path
from pipeline.lint.rules import RULES
from pipeline.lint.show import as_text
from tests.lint.draft import Draft
from tests.lint.suites import generate, shifted, sound

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
SARIF: dict[str, Any] = {
    "type": "object",
    "required": ["$schema", "version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "properties": {
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "properties": {
                            "driver": {
                                "type": "object",
                                "required": ["name", "rules"],
                                "properties": {
                                    "name": {"type": "string", "minLength": 1},
                                    "version": {"type": "string"},
                                    "rules": {
                                        "type": "array",
                                        "uniqueItems": True,
                                        "items": {
                                            "type": "object",
                                            "required": ["id"],
                                            "properties": {
                                                "id": {"type": "string", "pattern": "^QDQ[12][0-9]{2}$"},
                                                "shortDescription": TEXT,
                                                "help": TEXT,
                                                "defaultConfiguration": {"properties": {"level": LEVEL}},
                                            },
                                        },
                                    },
                                },
                            }
                        },
                    },
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message", "ruleId", "level", "locations"],
                            "properties": {
                                "ruleId": {"type": "string"},
                                "ruleIndex": {"type": "integer", "minimum": 0},
                                "level": LEVEL,
                                "message": TEXT,
                                "locations": {
                                    "type": "array",
                                    "minItems": 1,
                                    "items": {
                                        "type": "object",
                                        "required": ["physicalLocation", "logicalLocations"],
                                        "properties": {
                                            "physicalLocation": {
                                                "required": ["artifactLocation"],
                                                "properties": {
                                                    "artifactLocation": {
                                                        "required": ["uri"],
                                                        "properties": {"uri": {"type": "string", "pattern": "^[^ ]+$"}},
                                                    }
                                                },
                                            },
                                            "logicalLocations": {
                                                "type": "array",
                                                "items": {
                                                    "required": ["name"],
                                                    "properties": {"name": {"type": "string"}},
                                                },
                                            },
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}
"""What a SARIF 2.1.0 log must be, as far as the lint writes one (OASIS SARIF 2.1.0, sections 3.13 to 3.27)."""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("bad one.onnx").write_bytes(generate(shifted, 1, seed=0)[0].model)
    Path("good.onnx").write_bytes(generate(sound, 1, seed=0)[0].model)
    return tmp_path


def call(*args: str) -> Any:
    return CliRunner().invoke(app, ["lint", *args])


@pytest.mark.parametrize(("model", "code"), [("good.onnx", 0), ("bad one.onnx", 3)])
@pytest.mark.parametrize("form", ["text", "json", "sarif"])
def test_exit_code_says_whether_there_are_errors(models: Path, model: str, code: int, form: str) -> None:
    result = call(model, "--format", form, "--target", "a100")
    assert (result.exit_code, result.stderr) == (code, "")
    if form == "text":
        assert ("QDQ101" in result.stdout) is (code == 3)
        assert "for a100" in result.stdout


def test_json_has_every_field(models: Path) -> None:
    (report,) = json.loads(call("bad one.onnx", "--format", "json").stdout)["reports"]
    assert (report["model"], report["target"]) == ("bad one.onnx", None)
    assert report["counts"]["error"] == sum(f["severity"] == "error" for f in report["findings"]) > 0
    for finding in report["findings"]:
        assert set(finding) == {"rule", "severity", "node", "tensor", "message", "reason", "fix"}


def test_sarif_is_sarif(models: Path) -> None:
    log = json.loads(call("bad one.onnx", "--format", "sarif").stdout)
    jsonschema.Draft202012Validator(SARIF).validate(log)
    (live,) = log["runs"]
    ids = [rule["id"] for rule in live["tool"]["driver"]["rules"]]
    assert ids == [rule.id for rule in RULES]
    assert live["results"]
    for result in live["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "bad%20one.onnx"


def test_the_sarif_schema_can_fail() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SARIF).validate({"$schema": "x", "version": "2.1.0", "runs": [{"results": []}]})


def test_fix_writes_a_model_and_judges_that(models: Path) -> None:
    d = Draft(rng=np.random.default_rng(0), opset=21)
    bias = d.dequantize(d.constant(d.codes((8,)), T.INT32), d.constant(1e-3))
    made = d.node("Gemm", [d.pair(d.input((4, 16))), d.weight((16, 8)), bias])
    Path("bias.onnx").write_bytes(d.model((made, None)))
    assert call("bias.onnx").exit_code == 3
    result = call("bias.onnx", "--fix", "-o", "fixed.onnx")
    assert (result.exit_code, "1 x QDQ107" in result.stderr) == (0, True)
    assert call("fixed.onnx").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["good.onnx", "--format", "xml"], "no format 'xml'"),
        (["good.onnx", "--fix"], "go together"),
        (["good.onnx", "-o", "x.onnx"], "go together"),
        ([".", "--fix", "-o", "x.onnx"], "takes one model"),
        (["gone.onnx"], "cannot be read"),
        (["good.onnx", "--target", "cpu"], "CPU does not run"),
    ],
)
def test_bad_input_exits_2(models: Path, args: list[str], message: str) -> None:
    result = call(*args)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert result.stdout == ""


def test_text_shows_a_few_of_many(models: Path) -> None:
    d = Draft(rng=np.random.default_rng(0), opset=21)
    made = d.input((4, 16))
    for _ in range(9):
        made = d.pair(made, zero=1)
    Path("many.onnx").write_bytes(d.model((made, None)))
    text = as_text(lint_path(Path("many.onnx")))
    assert "… and 13 more" in text
    assert text.splitlines()[-1] == "many.onnx: 18 errors, 0 warnings, 0 notes"
