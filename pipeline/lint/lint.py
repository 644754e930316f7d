"""Lint a model, or every GPU variant of a build directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from engines.target import Target
from engines.target import target as find_target
from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.graph.passes.remove_unused import RemoveUnused
from pipeline.lint.finding import Report, Severity
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.repair import drop_unread
from pipeline.lint.rule import Rule
from pipeline.lint.rules import RULES


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """What ``fix`` did.

    Attributes:
        changes: (rule id, places repaired), rules without any left out.
        report: What the lint finds in the repaired model.
    """

    changes: tuple[tuple[str, int], ...]
    report: Report


def lint(model: ir.Model, *, name: str, target: Target | None = None, rules: Sequence[Rule] = RULES) -> Report:
    """Return the findings of ``rules`` in a model; its shapes are inferred, nothing else is changed.

    Args:
        model: Any ONNX model.
        name: How the report calls it.
        target: The GPU to judge for; without one, what a GPU lacks is not judged.
        rules: Which rules.
    """
    graph = QdqGraph(model, target)
    found = (finding for rule in rules for finding in rule.findings(graph))
    return Report(model=name, target=None if target is None else target.name, findings=tuple(found))


def lint_path(path: Path, *, target: str | None = None) -> tuple[Report, ...]:
    """Return a report for an ``.onnx`` file, or for each GPU variant of a build directory.

    Args:
        path: A model, or what ``-o`` of a build named. The ``cpu`` variant of a build is ONNX Runtime's, not TensorRT's,
            and is passed over.
        target: Name of a GPU target.

    Raises:
        ModelError: A file is no ONNX model.
        RecipeError: The target is unknown or no GPU, or the folder holds no GPU variant.
    """
    device = gpu(target)
    return tuple(lint(models.load(file), name=str(file), target=device) for file in _files(path))


def fix(
    path: Path,
    out: Path,
    *,
    target: str | None = None,
    severities: Iterable[Severity] = (Severity.ERROR, Severity.WARNING),
) -> Fixed:
    """Repair what can be repaired safely, and write the model to ``out``.

    A note is no fault: what only notes speak of stays as it is.

    Raises:
        ModelError: ``path`` is no ONNX model.
        RecipeError: The target is unknown or no GPU, or ``path`` is no file.
        StoreError: ``out`` cannot be written.
    """
    device = gpu(target)
    if path.is_dir():
        raise RecipeError("--fix takes one model.", where=str(path), fix="Name an .onnx file.")
    model = models.load(path)
    changes = repair(model, device, severities=frozenset(severities))
    models.save(model, out)
    return Fixed(changes=changes, report=lint(models.load(out), name=str(out), target=device))


def repair(model: ir.Model, target: Target | None, *, severities: frozenset[Severity]) -> tuple[tuple[str, int], ...]:
    """Change the model in place and return (rule id, places repaired)."""
    changed: Counter[str] = Counter()
    # What nothing reads goes first, so that what a repair leaves unread is not counted as a finding of its own.
    for rule in sorted((r for r in RULES if r.repair is not None), key=lambda r: (r.repair is not drop_unread, r.id)):
        graph = QdqGraph(model, target)
        for hit in list(rule.check(graph)):
            if (hit.severity or rule.severity) in severities and rule.repair is not None and rule.repair(graph, hit):
                changed[rule.id] += 1
    if changed:
        RemoveUnused().change(model)
    return tuple(sorted(changed.items()))


def gpu(name: str | None) -> Target | None:
    """Return the target of that name.

    Raises:
        RecipeError: There is none, or it is no GPU.
    """
    if name is None:
        return None
    found = find_target(name)
    if found.compute_capability is None:
        raise RecipeError(
            "The lint judges graphs for TensorRT, which the CPU does not run.",
            where="--target",
            fix="Name a GPU, or leave --target out.",
        )
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = [file for file in sorted(path.glob("variants/*/model.onnx")) if file.parent.name.startswith("gpu")]
    if not found:
        raise RecipeError(
            "The folder holds no variant for a GPU.",
            where=str(path),
            fix="Name an .onnx file, or build for a GPU target.",
        )
    return found
