"""Search every group's smoothing on calibration samples that run through the float network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.moments import Tap
from pipeline.quantize.smoothing import ALPHAS, F32, ChoiceOptions, Group, Smoothing, choose, groups, rows_by_channel
from pipeline.quantize.upstream import gain, is_norm
from pipeline.types import Feeds, Progress, silent

ROWS = 1024
"""Rows of an activation that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search.

    Attributes:
        alpha: The one exponent to use everywhere; ``None`` tries :data:`pipeline.quantize.smoothing.ALPHAS` and none.
        mask: The input that is 0 at padding; padding is left out.
        threads: Threads for ONNX Runtime; 0 is one per core.
        memory_bytes: Activations held at once; more groups are searched in several passes over the samples.
    """

    alpha: float | None = None
    mask: str | None = None
    threads: int = 0
    memory_bytes: int = 1 << 30


def search(
    path: Path,
    plan: PrecisionPlan,
    extremes: Mapping[str, tuple[F32, F32]],
    feeds: Sequence[Feeds],
    options: SearchOptions = SearchOptions(),
    progress: Progress = silent,
) -> tuple[Smoothing, ...]:
    """Return what was chosen for every group of ``plan``.

    Args:
        path: The canonical FP32 model.
        plan: What is quantized, and in which formats.
        extremes: Tensor to the smallest and largest value of each channel on all calibration data, ``[channels]``.
        feeds: A few calibration batches.
        options: Exponents, padding, threads, memory.
        progress: Told of every group under ``smooth``.
    """
    model = models.load(path)
    nodes = {n.name: n for n in model.graph}
    wanted = [g for g in groups(model, plan) if g.tensor in extremes and np.isfinite(extremes[g.tensor]).all()]
    forced = options.alpha is not None
    how = ChoiceOptions(alphas=ALPHAS if options.alpha is None else (options.alpha,), forced=forced)
    chosen = []
    for part in _parts(wanted, extremes, options.memory_bytes):
        samples = _samples(path, [g.tensor for g in part], feeds, options)
        for group in part:
            weights = [rows_by_channel(nodes[name]) for name in group.nodes]
            found = choose(
                group, plan, weights, samples.pop(group.tensor), extremes[group.tensor],
                options=replace(how, apart=not forced and _may_part(nodes, group)),
            )  # fmt: skip
            chosen.append(found)
            progress("smooth", len(chosen), len(wanted))
    return tuple(chosen)


def _may_part(nodes: Mapping[str | None, ir.Node], group: Group) -> bool:
    """Whether a product beside the GEMM fuses with its neighbours.

    Query, key and value projections are one GEMM on a GPU, which it would part; behind a norm it parts the norm's kernel,
    behind an attention the fused attention.
    """
    maker = nodes[group.nodes[0]].inputs[0]
    source = maker.producer() if maker is not None else None
    if len(group.nodes) > 1 or source is None or source.op_type in ("Reshape", "Transpose"):
        return False
    return not is_norm(source) and gain(source) is None


def _parts(
    wanted: Sequence[Group], extremes: Mapping[str, tuple[F32, F32]], memory_bytes: int
) -> Iterator[list[Group]]:
    """Yield the groups whose kept rows fit the memory together."""
    part: list[Group] = []
    used = 0
    for group in wanted:
        size = 4 * ROWS * len(extremes[group.tensor][0])
        if part and used + size > memory_bytes:
            yield part
            part, used = [], 0
        part.append(group)
        used += size
    if part:
        yield part


def _samples(path: Path, tensors: Sequence[str], feeds: Sequence[Feeds], options: SearchOptions) -> dict[str, F32]:
    """Return up to :data:`ROWS` rows of every tensor, float32 ``[rows, channels]``."""
    tap = Tap(path, tensors, mask=options.mask, threads=options.threads)
    kept: dict[str, list[F32]] = {t: [] for t in tensors}
    for feed in feeds:
        for tensor, array in tap.rows(feed):
            room = ROWS - sum(map(len, kept[tensor]))
            if room > 0:
                kept[tensor].append(array[:room].astype(np.float32))
    return {tensor: np.concatenate(rows) for tensor, rows in kept.items()}
