"""Search every group's smoothing on calibration samples that run through the float network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.products import Product, Reading, product_of
from pipeline.quantize.transforms.groups import Group, absorbable, groups
from pipeline.quantize.transforms.smoothing import (
    F32,
    WORTH,
    WORTH_EXPLICIT,
    ChoiceOptions,
    Part,
    Smoothing,
    choose,
)
from pipeline.quantize.transforms.upstream import gain, is_norm
from pipeline.quantize.weights.moments import MOST_TAPPED, Tap
from pipeline.types import Feeds, Progress, silent

ROWS = 1024
"""Rows that are kept of what a node multiplies."""
TRIED = 3 << 19
"""Weights that one trial multiplies, about: a trial then takes as long on a large GEMM as on BERT's."""
LEAST_OUTPUTS = 256
"""Outputs that are tried at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search.

    Attributes:
        mask: The input that is 0 at padding; padding is left out.
        threads: Threads for ONNX Runtime; 0 is one per core.
        memory_bytes: Rows held at once; more groups are searched in several passes over the samples.
    """

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
    """Return what was chosen for every group of ``plan`` that is smoothed.

    A group takes the alpha that the plan gives it, or of :data:`pipeline.quantize.transforms.smoothing.ALPHAS` and none the
    one of least error.

    Args:
        path: The canonical FP32 model.
        plan: What is quantized, and in which formats.
        extremes: Tensor to the smallest and largest value of each channel on all calibration data, ``[channels]``.
        feeds: A few calibration batches.
        options: Padding, threads, memory.
        progress: Told of every group under ``smooth``.
    """
    model = models.load(path)
    nodes = {n.name: n for n in model.graph}
    found = [g for g in groups(model, plan) if g.smooth != "off"]
    wanted = [g for g in found if g.tensor in extremes and np.isfinite(extremes[g.tensor]).all()]
    products = {g.tensor: [product_of(nodes[name]) for name in g.nodes] for g in wanted}
    chosen = []
    for part in _parts(wanted, products, options.memory_bytes):
        samples = _samples(path, {g.tensor: products[g.tensor] for g in part}, feeds, options)
        for group in part:
            chosen.append(
                choose(
                    group, plan, list(_multiplied(products[group.tensor], samples)), extremes[group.tensor],
                    options=_options(nodes, group, products[group.tensor]),
                )
            )  # fmt: skip
            progress("smooth", len(chosen), len(wanted))
    return tuple(chosen)


def _options(nodes: Mapping[str | None, ir.Node], group: Group, products: Sequence[Product]) -> ChoiceOptions:
    """Return what may be tried for one group."""
    how = ChoiceOptions(alphas=(group.smooth,), forced=True) if isinstance(group.smooth, float) else ChoiceOptions()
    if group.axis == -1:
        return replace(how, apart=not how.forced and _may_part(nodes, group))
    value = products[0].node.inputs[0]
    assert value is not None
    channels = int(products[0].channels.max()) + 1
    unpadded = not any(p.reading.window is not None and p.reading.window.padded for p in products)
    free = absorbable(value, group, channels, shifted=False)
    shifts = unpadded and (not free or absorbable(value, group, channels, shifted=True))
    return replace(how, shifts=shifts, worth=WORTH if free else WORTH_EXPLICIT)


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
    wanted: Sequence[Group], products: Mapping[str, Sequence[Product]], memory_bytes: int
) -> Iterator[list[Group]]:
    """Yield the groups whose kept rows fit the memory together."""
    part: list[Group] = []
    used = maps = 0
    for group in wanted:
        size = 4 * ROWS * sum({p.reading: p.channels.size for p in products[group.tensor]}.values())
        if part and (used + size > memory_bytes or maps == MOST_TAPPED):
            yield part
            part, used, maps = [], 0, 0
        part.append(group)
        used, maps = used + size, maps + (group.axis == 1)
    if part:
        yield part


def _samples(
    path: Path, products: Mapping[str, Sequence[Product]], feeds: Sequence[Feeds], options: SearchOptions
) -> dict[tuple[str, Reading], F32]:
    """Return up to :data:`ROWS` rows of what is multiplied, by tensor and how it is read, float32 ``[groups, rows, products summed]``."""
    tap = Tap(path, list(products), mask=options.mask, threads=options.threads)
    readings = {tensor: list(dict.fromkeys(p.reading for p in found)) for tensor, found in products.items()}
    kept: dict[tuple[str, Reading], list[F32]] = {(t, r): [] for t, found in readings.items() for r in found}
    for tensor, array, mask in tap.arrays(feeds):
        for reading in readings[tensor]:
            room = ROWS - sum(rows.shape[1] for rows in kept[tensor, reading])
            limit = room if reading.window is None else min(room, -(-ROWS // len(feeds)))
            if room > 0:
                kept[tensor, reading].append(reading.rows(array, mask, limit))
    return {key: np.concatenate(rows, axis=1) for key, rows in kept.items()}


def _multiplied(products: Sequence[Product], samples: dict[tuple[str, Reading], F32]) -> Iterator[Part]:
    """Yield what the products of one tensor multiply, those that read it alike together; takes their rows out of ``samples``.

    Of a large weight only some outputs are tried, evenly spread: the errors of outputs are alike and add up.
    """
    tensor = products[0].node.inputs[0]
    name = (tensor.name if tensor is not None else None) or ""
    for reading in dict.fromkeys(p.reading for p in products):
        alike = [p for p in products if p.reading == reading]
        tried, largest = zip(*(_tried(p.weight(), len(alike)) for p in alike), strict=True)
        yield Part(
            samples=samples.pop((name, reading)),
            weight=np.concatenate(tried, axis=2),
            largest=np.max(largest, axis=0),
            channels=alike[0].channels,
        )


def _tried(weight: F32, shared: int) -> tuple[F32, F32]:
    """Return the outputs of a weight that are tried, and every row's largest magnitude over all outputs."""
    outputs = weight.shape[2]
    most = max(LEAST_OUTPUTS, TRIED // (weight.shape[0] * weight.shape[1]))
    count = min(outputs, -(-most // shared))
    columns = np.linspace(0, outputs - 1, count).round().astype(np.int64)
    return weight[:, :, columns], np.abs(weight).max(axis=2)
