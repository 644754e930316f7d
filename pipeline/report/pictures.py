"""Pictures of the report as SVG and as cells: a tensor's histogram with its ranges, and the model block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipeline.report.contract import NodePrecision, TensorRange
from pipeline.types import Role

WIDTH, HEIGHT = 240, 44
"""Size of a histogram, in CSS pixels."""
_COLUMNS = [str(r) for r in Role if r not in (Role.OTHER,)]


def histogram(item: TensorRange) -> str | None:
    """Return a tensor's histogram as SVG: counts on a logarithmic scale, the chosen range shaded, the others as ticks.

    ``None`` where the build has no histogram of it. The picture spans the values and all ranges.
    """
    found = item.histogram
    if found is None:
        return None
    edges = [found.min, found.max, item.min, item.max, *(e for pair in item.options.values() for e in pair)]
    low, high = min(edges), max(edges)

    def across(value: float) -> float:
        return round((value - low) / (high - low) * WIDTH, 1) if high > low else 0.0

    most = math.log1p(max(found.counts, default=1)) or 1.0
    step = (found.max - found.min) / len(found.counts)
    path = f"M{across(found.min)} {HEIGHT}"
    for index, count in enumerate(found.counts):
        top = round(HEIGHT - (HEIGHT - 4) * math.log1p(count) / most, 1)
        path += f"V{top}H{across(found.min + (index + 1) * step)}"
    path += f"V{HEIGHT}Z"
    ticks = "".join(
        f'<path d="M{across(edge)} 0v{HEIGHT}" class="tick"><title>{escape(name)} {edge:.4g}</title></path>'
        for name, pair in item.options.items()
        if name != item.method
        for edge in pair
    )
    left, right = across(item.min), across(item.max)
    label = f"values from {found.min:.4g} to {found.max:.4g}, kept {item.min:.4g} to {item.max:.4g}"
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<rect x="{left}" width="{max(right - left, 0.5):.1f}" height="{HEIGHT}" class="kept"/>'
        f'<path d="{path}" class="values"/>{ticks}</svg>'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the nodes of one role in one block compute in.

    Attributes:
        precision: Theirs, or ``mixed``; empty where there are none.
        text: Node count and precisions, for people.
    """

    precision: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPicture:
    """A variant as a grid: a row for each block, a column for each role."""

    roles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def blocks(nodes: Sequence[NodePrecision], variant: str) -> BlockPicture:
    """Return the picture of one variant; nodes without a role of their own are left out."""
    found: dict[int | None, dict[str, dict[str, int]]] = {}
    for node in nodes:
        if node.variant == variant and node.role in _COLUMNS:
            counts = found.setdefault(node.block, {}).setdefault(node.role, {})
            counts[node.precision] = counts.get(node.precision, 0) + 1
    roles = tuple(r for r in _COLUMNS if any(r in row for row in found.values()))
    order = sorted(found, key=lambda b: -1 if b is None else b)
    rows = tuple(
        ("outside blocks" if block is None else str(block), tuple(_cell(found[block].get(role, {})) for role in roles))
        for block in order
    )
    return BlockPicture(roles=roles, rows=rows)


def _cell(counts: dict[str, int]) -> Cell:
    text = ", ".join(f"{count} {precision}" for precision, count in sorted(counts.items()))
    return Cell(precision=next(iter(counts)) if len(counts) == 1 else "mixed" if counts else "", text=text)
