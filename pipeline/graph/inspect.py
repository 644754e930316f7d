"""The table behind ``inspect``: every node with its role, block, weight and sizes, repeated blocks shown once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipeline.graph.roles.flow import Flow, initializer, is_floating, node_key, static_shape
from pipeline.types import NodeRole, Role

if TYPE_CHECKING:
    import onnx_ir as ir
    from rich.table import Table

Dims = tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One node.

    Attributes:
        node: Its name.
        op_type: Its operator, with the domain before it where it is not ONNX's own.
        role: What it is for.
        block: The repeated block it belongs to.
        weight_shape: Shape of the weight of a matrix product, convolution or lookup, as stored.
        parameters: Numbers in its floating-point constants (a tensor that several nodes read counts in each).
        inputs: Shapes of the inputs that carry data; a dimension is a number, a symbol or unknown.
    """

    node: str
    op_type: str
    role: Role
    block: int | None
    weight_shape: tuple[int, ...] | None
    parameters: int
    inputs: tuple[Dims | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {
            "node": self.node,
            "op_type": self.op_type,
            "role": self.role.value,
            "block": self.block,
            "weight_shape": None if self.weight_shape is None else list(self.weight_shape),
            "parameters": self.parameters,
            "inputs": [None if dims is None else list(dims) for dims in self.inputs],
        }

    @property
    def kind(self) -> tuple[object, ...]:
        """Everything but the name and the block: equal for the same node of two equal blocks."""
        return (self.op_type, self.role, self.weight_shape, self.parameters, self.inputs)


def inspect_table(model: ir.Model, roles: Mapping[str, NodeRole]) -> list[Row]:
    """Return one row for each node of the main graph, in topological order; nodes that only hold constants are left out.

    Args:
        model: The graph that ``roles`` describes.
        roles: What :func:`pipeline.graph.roles.find_roles` returned.
    """
    flow = Flow(model.graph)
    rows: list[Row] = []
    for node in flow.nodes:
        if all(flow.is_constant(value) for value in node.outputs):
            continue
        found = roles[node_key(node)]
        rows.append(
            Row(
                node=node_key(node),
                op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
                role=found.role,
                block=found.block,
                weight_shape=_weight_shape(flow, node, found.role),
                parameters=_parameters(flow, node),
                inputs=tuple(_dims(value) for value in flow.data(node)),
            )
        )
    return rows


def render(rows: Sequence[Row], *, verbose: bool = False) -> Table:
    """Return the rows as a table grouped by block, with a run of equal blocks shown once and counted.

    Args:
        rows: What :func:`inspect_table` returned.
        verbose: Show every node of every block, also those with no role.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Nodes by role", title_justify="left")
    for name in ("block", "node", "op", "role"):
        table.add_column(name, overflow="fold")
    for name in ("weight", "parameters", "inputs"):
        table.add_column(name, justify="right")
    groups = [(block, list(group)) for block, group in groupby(_ordered(rows), key=lambda row: row.block)]
    for label, group in _labelled(groups, collapse=not verbose):
        shown = [row for row in group if verbose or row.role is not Role.OTHER]
        for index, row in enumerate(shown):
            cells = [label if index == 0 else "", row.node, row.op_type, row.role.value]
            sizes = [_show(row.weight_shape), f"{row.parameters:,}" if row.parameters else ""]
            inputs = " ".join(_show(dims) for dims in row.inputs)
            # Text, because names with brackets would be read as markup.
            table.add_row(*(Text(cell) for cell in (*cells, *sizes, inputs)), end_section=index == len(shown) - 1)
    return table


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Sort by block: what comes before the first block, the blocks, then what comes after the first."""
    numbered = [index for index, row in enumerate(rows) if row.block is not None]
    first = numbered[0] if numbered else len(rows)

    def place(item: tuple[int, Row]) -> tuple[int, int, int]:
        index, row = item
        if row.block is not None:
            return (1, row.block, index)
        return (0 if index < first else 2, 0, index)

    return [row for _, row in sorted(enumerate(rows), key=place)]


def _labelled(groups: Iterable[tuple[int | None, list[Row]]], *, collapse: bool) -> list[tuple[str, list[Row]]]:
    """Return each group with its label, such as ``0-5 (x6)`` for six equal blocks in a row."""
    runs: list[tuple[int | None, int, list[Row]]] = []
    for block, rows in groups:
        if runs and collapse and block is not None:
            first, count, earlier = runs[-1]
            if first is not None and [row.kind for row in earlier] == [row.kind for row in rows]:
                runs[-1] = (first, count + 1, earlier)
                continue
        runs.append((block, 1, rows))
    return [(_label(first, count), rows) for first, count, rows in runs]


def _label(first: int | None, count: int) -> str:
    if first is None:
        return "-"
    return str(first) if count == 1 else f"{first}-{first + count - 1} (x{count})"


def _weight_shape(flow: Flow, node: ir.Node, role: Role) -> tuple[int, ...] | None:
    weight = flow.weights.get(node)
    if weight is None and role is Role.EMBEDDING and node.op_type == "Gather":
        weight = node.inputs[0]
    return None if weight is None else static_shape(initializer(weight))


def _parameters(flow: Flow, node: ir.Node) -> int:
    total = 0
    for value in dict.fromkeys(v for v in node.inputs if v is not None and flow.is_constant(v)):
        shape = static_shape(initializer(value))
        if shape is not None and is_floating(value):
            total += math.prod(shape)
    return total


def _dims(value: ir.Value) -> Dims | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else _symbol(dim.value) for dim in value.shape)


def _symbol(name: str | None) -> str | None:
    """Return a dimension's name; one that shape inference made up (``unk__7``) says nothing, and differs in each block."""
    return None if name is None or re.fullmatch(r"unk__\d+", name) else name


def _show(dims: Dims | None) -> str:
    return "" if dims is None else "×".join("?" if dim is None else str(dim) for dim in dims) or "scalar"
