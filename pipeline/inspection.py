"""What a model's nodes are for, and what a build decided about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.table import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from pipeline.policy.plan import NodePlan, PrecisionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The same facts as JSON and as tables for a terminal."""

    facts: list[dict[str, Any]]
    tables: tuple[RichTable, ...]


def inspect_path(path: Path, *, verbose: bool = False) -> Inspection:
    """Return the roles in an ``.onnx`` file, or the precision plans of a build directory.

    Args:
        path: A model, or what ``-o`` named.
        verbose: Show every node; without it equal blocks of a model, and nodes that one rule treats alike, are one row.

    Raises:
        ModelError: The file is no ONNX model.
        PipelineError: ``path`` is neither a model nor a build directory.
    """
    if not path.is_dir():
        return _roles(path, verbose)
    # A build directory, or the folder of a dry run in one.
    folder = "variants" if (path / "variants").is_dir() else ""
    every = precision_plans(path, folder=folder, verbose=True)
    if every:
        shown = every if verbose else precision_plans(path, folder=folder)
        return Inspection(facts=[t.to_dict() for t in every], tables=tuple(t.render() for t in shown))
    if (path / "model.fp32.onnx").is_file():
        return _roles(path / "model.fp32.onnx", verbose)
    raise PipelineError(
        "The folder holds no build.", where=str(path), fix="Name an .onnx file or the -o directory of a build."
    )


def precision_plans(directory: Path, *, folder: str = "variants", verbose: bool = False) -> list[Table]:
    """Return the precision plan of every variant in a build directory; none if nothing was planned there.

    Args:
        directory: What ``-o`` named.
        folder: Where the plans are in it.
        verbose: A row for every node; without it one for all nodes of a role that the same rule decided.
    """
    table = _every_node if verbose else _by_rule
    return [table(_read(file)) for file in sorted(directory.glob(f"{folder}/*/precision_plan.json".removeprefix("/")))]


def _roles(path: Path, verbose: bool) -> Inspection:
    from pipeline.graph.inspect import inspect_table, render
    from pipeline.graph.roles import find_roles
    from pipeline.model import load

    model = load(path)
    rows = inspect_table(model, find_roles(model))
    return Inspection(facts=[row.to_dict() for row in rows], tables=(render(rows, verbose=verbose),))


def _read(file: Path) -> PrecisionPlan:
    from pipeline.policy.plan import PrecisionPlan

    return PrecisionPlan.from_json(file.read_text(encoding="utf-8"))


def _title(plan: PrecisionPlan) -> str:
    return f"{plan.family}: " + ", ".join(f"{count} nodes {name}" for name, count in plan.counts().items())


def _every_node(plan: PrecisionPlan) -> Table:
    return Table(
        title=_title(plan),
        columns=("node", "op type", "role", "block", "precision", "rule"),
        rows=tuple((n.node, n.op_type, n.role, n.block, n.precision, n.rule) for n in plan),
    )


def _by_rule(plan: PrecisionPlan) -> Table:
    groups: dict[tuple[str, ...], list[NodePlan]] = {}
    for node in plan:
        groups.setdefault((node.precision, node.role, node.rule), []).append(node)
    ordered = sorted(groups.items(), key=lambda item: not item[1][0].precision.quantized)
    return Table(
        title=_title(plan),
        columns=("precision", "nodes", "role", "op types", "blocks", "rule"),
        rows=tuple(
            (precision, len(nodes), role, _op_types(nodes), _blocks(nodes), rule)
            for (precision, role, rule), nodes in ordered
        ),
    )


def _op_types(nodes: list[NodePlan]) -> str:
    names = [name for name, _ in Counter(node.op_type for node in nodes).most_common()]
    return ", ".join(names[:3]) + (f", {len(names) - 3} more" if len(names) > 3 else "")


def _blocks(nodes: list[NodePlan]) -> str:
    """Return the blocks as text: ``0-5``, ``0, 2-3``."""
    numbers = sorted({node.block for node in nodes if node.block is not None})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
