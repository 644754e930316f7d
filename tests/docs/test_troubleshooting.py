"""The page of error texts: ours are in the source, and those of others that a CPU can provoke are what they say."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.compile_check import available
from tests.lint.oracle import Oracle
from tests.lint.suites import SUITES, generate

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"## From {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[tuple[str, str]]:
    """The error text of every row, and the rest of the row."""
    found = [re.match(r"\| (``?)(?P<text>.*?)\1 (?P<rest>.*)$", line) for line in text.splitlines()]
    return [(row["text"].strip(), row["rest"]) for row in found if row is not None]


def matches(shown: str, said: str) -> bool:
    """Whether a message has the pieces of a text between its ellipses, in their order."""
    pieces = [re.escape(piece.strip()) for piece in shown.split("…") if piece.strip()]
    return re.search(".*?".join(pieces), " ".join(said.split())) is not None


OURS = rows(section("this pipeline"))
TENSORRT = [row for row in rows(section("TensorRT")) if "[QDQ" in row[1]]
RUNTIME = [text for text, rest in rows(section("ONNX Runtime")) if "[report]" not in rest]


def strings() -> Iterator[str]:
    """Every text in the source, f-strings with ``…`` for what is filled in."""
    for folder in ("pipeline", "calibrators", "engines"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


SOURCE = tuple(strings())


def test_every_table_was_read() -> None:
    assert len(OURS) >= 20
    assert len(TENSORRT) >= 8
    assert len(RUNTIME) >= 10
    assert PAGE.count("\n| `") == sum(
        len(rows(section(title))) for title in ("this pipeline", "ONNX Runtime", "TensorRT", "Triton")
    )


@pytest.mark.parametrize("text", [text for text, _ in OURS])
def test_our_texts_are_in_the_source(text: str) -> None:
    assert any(matches(text, said) for said in SOURCE)


def test_a_text_that_nobody_says_would_be_noticed() -> None:
    assert not any(matches("The file is a Git LFS … that was eaten.", said) for said in SOURCE)


def test_what_was_not_provoked_names_its_report() -> None:
    quoted = [row for row in [*rows(section("TensorRT")), *rows(section("Triton"))] if row not in TENSORRT]
    assert len(quoted) >= 12
    assert [text for text, rest in quoted if "([report](https://github.com/" not in rest] == []


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------


def model(
    *nodes: onnx.NodeProto,
    dtype: int = TensorProto.FLOAT,
    weights: list[onnx.TensorProto] | None = None,
    ir_version: int = 10,
) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], weights or [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("else", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def load(model: onnx.ModelProto | str | bytes, provider: str = "CPUExecutionProvider") -> ort.InferenceSession:
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    return ort.InferenceSession(given, providers=[provider])


RELU = model(helper.make_node("Relu", ["x"], ["y"]))
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])
RESHAPE = helper.make_node("Reshape", ["x", "s"], ["y"])


def no_data(folder: Path) -> None:
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")]
    onnx.save_model(
        model(PRODUCT, weights=weights), folder / "m.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    (folder / "w").unlink()
    load(str(folder / "m.onnx"))


def no_model(folder: Path) -> None:
    (folder / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    load(str(folder / "m.onnx"))


PROVOKED: tuple[Callable[[Path], object], ...] = (
    lambda _: load(RELU).run(None, {"x": np.zeros((1, 5), np.float32)}),
    lambda _: load(RELU).run(None, {"x": np.zeros(4, np.float32)}),
    lambda _: load(RELU).run(None, {"x": np.zeros((1, 4))}),
    lambda _: load(RELU).run(None, {"z": np.zeros((1, 4), np.float32)}),
    lambda _: load(
        model(PRODUCT, dtype=TensorProto.BFLOAT16, weights=[helper.make_tensor("w", 16, [4, 4], [0.0] * 16)])
    ),
    lambda _: load(model(helper.make_node("Foo", ["x"], ["y"], domain="else"))),
    lambda _: load(model(helper.make_node("Relu", ["x"], ["y"]), ir_version=99)),
    no_model,
    no_data,
    lambda _: load(model(RESHAPE, weights=[numpy_helper.from_array(np.array([1, 4]), "s")])).run(
        None, {"x": np.zeros((3, 4), np.float32)}
    ),
    lambda _: load(RELU, "TensorrtExecutionProvider"),
)
"""What provokes the texts of ONNX Runtime's table, in the table's order."""


@pytest.mark.parametrize(("text", "provoke"), list(zip(RUNTIME, PROVOKED, strict=True)), ids=RUNTIME)
def test_onnx_runtime_says_so(text: str, provoke: Callable[[Path], object], tmp_path: Path) -> None:
    if "TensorrtExecutionProvider" in text and "TensorrtExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(Exception, match=r".") as said:  # warnings are errors here
        provoke(tmp_path)
    assert matches(text, str(said.value))


# ---- TensorRT ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as live:
        yield live


@pytest.mark.skipif(not available(), reason="needs TensorRT for RTX: pip install '.[rtx]'")
@pytest.mark.parametrize(("text", "rest"), TENSORRT, ids=[text for text, _ in TENSORRT])
def test_tensorrt_says_so(text: str, rest: str, oracle: Oracle) -> None:
    rule = re.search(r"QDQ\d+", rest)
    assert rule is not None
    suites = [suite for suite in SUITES if suite.rule == rule[0] and suite.expect == "refused"]
    cases = [case for suite in suites for case in generate(suite.faulty, 12, seed=0)]
    said = (oracle.ask(case.model, case.capability).message for case in cases)
    assert any(matches(text, message) for message in said)
