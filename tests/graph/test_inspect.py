"""The inspect table: rows against the graph itself, and repeated blocks shown once."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from rich.console import Console

from pipeline.graph.inspect import Row, inspect_table, render
from pipeline.graph.roles import find_roles
from pipeline.types import Role
from tests import zoo


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    model = ir.load(zoo.exported("fused_qkv", "legacy"))
    return inspect_table(model, find_roles(model))


def _text(rows: list[Row], *, verbose: bool) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(render(rows, verbose=verbose))
    return capture.get()


def test_parameters_and_shapes_are_the_modules(rows: list[Row]) -> None:
    module = zoo.build("fused_qkv").module
    found = {row.role: row for row in rows}
    assert found[Role.EMBEDDING].weight_shape == (zoo.VOCABULARY, zoo.HIDDEN)
    assert found[Role.ATTENTION_QKV].weight_shape == (zoo.HIDDEN, 3 * zoo.HIDDEN)
    assert found[Role.FFN_DOWN].parameters == 4 * zoo.HIDDEN * zoo.HIDDEN
    # Beside the parameters an exporter writes scalar constants (scale, GELU) and the mask's bounds.
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters <= sum(row.parameters for row in rows) <= parameters + 100


def test_no_row_only_holds_a_constant(rows: list[Row]) -> None:
    assert not [row for row in rows if row.op_type == "Constant"]


def test_equal_blocks_are_shown_once_unless_verbose(rows: list[Row]) -> None:
    short, long = _text(rows, verbose=False), _text(rows, verbose=True)
    assert "0-1 (x2)" in short
    assert short.count(Role.ATTENTION_SOFTMAX.value) == 1
    assert "(x2)" not in long
    assert long.count(Role.ATTENTION_SOFTMAX.value) == zoo.LAYERS
    assert Role.OTHER.value not in short
    assert long.count("│ ") > short.count("│ ")


def test_blocks_that_differ_stay_apart(rows: list[Row]) -> None:
    wider = [
        Row(
            node=row.node,
            op_type=row.op_type,
            role=row.role,
            block=row.block,
            weight_shape=(1, 1) if row.block == 1 and row.role is Role.FFN_UP else row.weight_shape,
            parameters=row.parameters,
            inputs=row.inputs,
        )
        for row in rows
    ]
    assert "(x2)" not in _text(wider, verbose=False)


def test_names_with_brackets_are_no_markup() -> None:
    row = Row(
        node="layer[0][bold]x",
        op_type="MatMul",
        role=Role.LINEAR,
        block=None,
        weight_shape=(2, 3),
        parameters=6,
        inputs=((None, "batch", 2), None),
    )
    assert "layer[0][bold]x" in _text([row], verbose=False)
    assert "?×batch×2" in _text([row], verbose=False)


def test_rows_are_json(rows: list[Row]) -> None:
    text = json.dumps([row.to_dict() for row in rows])
    assert {item["role"] for item in json.loads(text)} >= {"attention_qkv", "ffn_up", "norm", "embedding"}
