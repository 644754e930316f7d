"""A few held-out samples kept in the build directory, so that a GPU's machine measures with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.summary import HELD_OUT
from pipeline.stages.run import MASK, Run
from pipeline.types import Array, CalibrationData, Feeds

MOST_BYTES = 32_000_000


def keep_heldout(run: Run, data: CalibrationData) -> Path:
    """Write the first ``validate.kept_samples`` held-out samples into the build directory."""
    count = run.recipe.validate_.kept_samples

    def produce(work: Path) -> None:
        kept: dict[str, Any] = first(data, count, MOST_BYTES)
        np.savez(work / HELD_OUT, **kept)

    return run.stage("validate/heldout", {"data": data.digest(), "samples": count}, [HELD_OUT], produce).paths[HELD_OUT]


def first(data: CalibrationData, count: int, most_bytes: int) -> Feeds:
    """Return at most ``count`` samples as one batch, of at most ``most_bytes`` but never none.

    Batches of different lengths are padded at the end with zeros where an attention mask tells padding from tokens;
    without one the first batch of another shape ends it.
    """
    kept: list[Feeds] = []
    samples = size = 0
    for feeds in data:
        shapes = {name: values.shape[1:] for name, values in feeds.items()}
        if kept and MASK not in feeds and shapes != {name: values.shape[1:] for name, values in kept[0].items()}:
            break
        rows = len(next(iter(feeds.values())))
        each = sum(values.nbytes for values in feeds.values()) // max(rows, 1)
        room = min(rows, count - samples, (most_bytes - size) // max(each, 1))
        room = max(room, 1) if not kept else room
        if room <= 0:
            break
        kept.append({name: values[:room] for name, values in feeds.items()})
        samples, size = samples + room, size + room * each
        if room < rows or samples >= count:
            break
    return {name: np.concatenate(_same_length([feeds[name] for feeds in kept])) for name in kept[0]}


def _same_length(parts: list[Array]) -> list[Array]:
    longest = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    return [np.pad(p, [(0, 0), *((0, n - have) for n, have in zip(longest, p.shape[1:], strict=True))]) for p in parts]
