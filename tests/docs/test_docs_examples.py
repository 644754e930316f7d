"""What the documents show is what happens: examples run, generated pages are up to date, links lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from pipeline import cli_reference
from pipeline.recipe import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
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
        for line in re.findall(r"python -m pipeline ([a-z]\w*\b.*?)(?:`|$)", page.read_text(encoding="utf-8"), re.M):
            command, _, rest = line.partition(" ")
            assert command in commands, f"{page.name}: {line}"
            for flag in re.findall(r"(?<!\S)--[\w.-]+", rest):
                # README shows what a misspelt flag gives.
                assert flag in known | {"--presicion"}, f"{page.name}: {flag}"
