"""Work on a weight in tiles, one a core at a time: numpy and compiled loops release the GIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

TILE_VALUES = 1 << 18
"""Values of a tile: as float32 they are 1 MB, which stays in a core's second-level cache from step to step."""


def tiles(shape: tuple[int, ...]) -> list[slice]:
    """Return slices (at least one) of the first axis that are all of it, of about :data:`TILE_VALUES` values each."""
    rows, row = shape[0], 1
    for size in shape[1:]:
        row *= size
    step = max(1, TILE_VALUES // max(row, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def on_all_cores(function: Callable[[slice], T], parts: list[slice]) -> list[T]:
    """Return what ``function`` makes of every part, in order; it must write only what belongs to its part."""
    if len(parts) == 1:
        return [function(parts[0])]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(parts))) as pool:
        return list(pool.map(function, parts))
