"""Nodes that a builder refused: kept in a file of the build directory, read by the next planning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.content import write_atomically
from pipeline.errors import RecipeError
from pipeline.policy.rules import Rule
from pipeline.types import Precision


def override_rules(overrides: Mapping[str, str], elsewhere: Precision) -> list[Rule]:
    """Return the rules that give some nodes the precision of the rest, whatever the recipe says.

    Args:
        overrides: Node name to why: a builder refused it, or it was measured to cost too much.
        elsewhere: What the rest of the graph computes in.
    """
    return [
        Rule(text=why, precision=elsewhere, matches=lambda c, node=node: c.name == node)  # type: ignore[misc]
        for node, why in overrides.items()
    ]


def read_overrides(path: Path) -> dict[str, dict[str, str]]:
    """Return variant to node to reason; empty where there is no file.

    Raises:
        RecipeError: The file is no such JSON.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(family): {str(n): str(w) for n, w in nodes.items()} for family, nodes in values.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            "The file of refused nodes cannot be read.",
            where=str(path),
            fix="Delete it: the builds that follow find the nodes again.",
        ) from error


def add_override(path: Path, family: str, node: str, why: str) -> bool:
    """Note that a builder refused ``node`` in this variant; return whether that is new."""
    known = read_overrides(path)
    if node in known.get(family, {}):
        return False
    known.setdefault(family, {})[node] = why
    write_atomically(path, json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return True
