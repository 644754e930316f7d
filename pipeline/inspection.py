"""What a model's nodes are for, and what a build decided about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.table import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The same facts as JSON and as tables for a terminal."""

    facts: list[dict[str, Any]]
    tables: tuple[RichTable, ...]


def inspect_path(path: Path, *, verbose: bool = False) -> Inspection:
    """Return the roles in an ``.onnx`` file, or the precision plans of a build directory.

    Args:
        path: A model, or what ``-o`` named.
        verbose: Show every node of a model; without it equal blocks are shown once.

    Raises:
        ModelError: The file is no ONNX model.
        PipelineError: ``path`` is neither a model nor a build directory.
    """
    if not path.is_dir():
        return _roles(path, verbose)
    tables = precision_plans(path)
    if tables:
        return Inspection(facts=[t.to_dict() for t in tables], tables=tuple(t.render() for t in tables))
    if (path / "model.fp32.onnx").is_file():
        return _roles(path / "model.fp32.onnx", verbose)
    raise PipelineError(
        "The folder holds no build.", where=str(path), fix="Name an .onnx file or the -o directory of a build."
    )


def precision_plans(directory: Path) -> list[Table]:
    """Return the precision plan of every variant in a build directory; none if nothing was planned there."""
    return [_plan(file) for file in sorted(directory.glob("variants/*/precision_plan.json"))]


def _roles(path: Path, verbose: bool) -> Inspection:
    from pipeline.graph.inspect import inspect_table, render
    from pipeline.graph.roles import find_roles
    from pipeline.model import load

    model = load(path)
    rows = inspect_table(model, find_roles(model))
    return Inspection(facts=[row.to_dict() for row in rows], tables=(render(rows, verbose=verbose),))


def _plan(file: Path) -> Table:
    from pipeline.policy.plan import PrecisionPlan

    plan = PrecisionPlan.from_json(file.read_text(encoding="utf-8"))
    return Table(
        title=f"{plan.family}: " + ", ".join(f"{count} nodes {name}" for name, count in plan.counts().items()),
        columns=("node", "op type", "role", "block", "precision", "rule"),
        rows=tuple((n.node, n.op_type, n.role, n.block, n.precision, n.rule) for n in plan),
    )
