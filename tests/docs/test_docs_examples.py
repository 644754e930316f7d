"""What the documents show is what happens: examples run, generated pages are up to date, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from pipeline import cli_reference
from pipeline.cli import app
from pipeline.recipe import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in _FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if kind == language]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small network and data for it, as the pages say."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32), name)
        for name, shape in (("w0", (32, 64)), ("w1", (64, 32)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["s"]),
        helper.make_node("Tanh", ["s"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "mlp", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    for name, count in (("calibration", 256), ("heldout", 32)):
        np.savez(tmp_path / f"{name}.npz", x=rng.laplace(size=(count, 32)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", ["docs/python-api.md", "docs/extending.md"])
def test_the_examples_run(folder, page, monkeypatch):
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look their module up
    found = blocks(page, "python")
    assert len(found) >= 5
    for body in found:
        exec(compile(body, page, "exec"), module.__dict__)


def test_the_reference_of_the_command_line_is_up_to_date():
    said = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert said == cli_reference.reference(), "run: python -m pipeline.cli_reference > docs/cli.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if "://" in target or (not target and not anchor):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


READER = """
import numpy as np
class MyReader:
    def __init__(self):
        self.left = [{"x": np.ones((8, 32), np.float32)}] * 4
    def get_next(self):
        return self.left.pop() if self.left else None
"""


def test_builds_that_replace_another_tool_are_planned(folder, monkeypatch):
    """Each command for an ONNX file on the page runs up to its plan, the reader of ONNX Runtime as it is shown."""
    np.savez(folder / "data.npz", **np.load("calibration.npz"))
    scale = np.float32(0.05).view(np.uint32)
    (folder / "model.cache").write_text(f"TRT-100100-EntropyCalibration2\nx: {scale:08x}\nr: {scale:08x}\n")
    (shown,) = [body for body in blocks("docs/migrating.md", "python") if body.startswith("# mydata.py")]
    (folder / "mydata.py").write_text(READER + shown)
    monkeypatch.syspath_prepend(folder)
    text = (ROOT / "docs/migrating.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [shlex.split(line) for line in re.findall(r"^python -m pipeline (build model\.onnx .*)$", text, re.M)]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        done = CliRunner().invoke(app, [*command, "-o", f"build/{number}", "--dry-run"])
        assert done.exit_code == 0, done.output
        assert "int8" in done.output
    # The reader's samples are read, too: dry runs stop before the data.
    (reader,) = [command for command in commands if "mydata:samples" in command]
    done = CliRunner().invoke(app, ["calibrate", *reader[1:], "-o", "build/reader"])
    assert done.exit_code == 0, done.output


def test_whole_recipes_in_the_readme_are_recipes():
    for body in blocks("README.md", "yaml"):
        assert parse(yaml.safe_load(body)).source


def test_the_readme_tests_with_the_command_of_ci():
    _, tests, *_ = blocks("README.md", "bash")
    assert tests.strip() == "make test"
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().splitlines()[-1] == "make test"


def test_every_flag_and_command_that_the_pages_show_exists():
    known = set(re.findall(r"(?<=[`, ])--[a-z][\w.-]+", (ROOT / "docs/cli.md").read_text(encoding="utf-8")))
    known |= {
        f"--{key}" for key in re.findall(r"^\| `([\w.]+)`", (ROOT / "docs/recipe.md").read_text(encoding="utf-8"), re.M)
    }
    commands = set(re.findall(r"^## `?(\w+)`?", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.M))
    assert {"build", "validate"} <= commands
    assert {"--precision", "--policy.smooth"} <= known
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", "")
        for line in re.findall(r"python -m pipeline ([a-z]\w*\b.*?)(?:`|$)", text, re.M):
            command, _, rest = line.partition(" ")
            assert command in commands, f"{page.name}: {line}"
            for flag in re.findall(r"(?<!\S)--[\w.-]+", rest):
                # README shows what a misspelt flag gives.
                assert flag in known | {"--presicion"}, f"{page.name}: {flag}"
