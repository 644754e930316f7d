"""Search AWQ's scale of every input of weights that are quantized alone, on the second moments of all calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.products import Product, product_of
from pipeline.quantize.transforms.groups import Group, absorbable, groups
from pipeline.quantize.transforms.smoothing import F32, WORTH, Smoothing
from pipeline.quantize.weights.awq import COLUMNS, search_scale
from pipeline.quantize.weights.moments import Moments, Tap, fitting, moment_bytes, second_moments
from pipeline.quantize.weights.rounding import RoundingOptions
from pipeline.types import Feeds, Progress, QuantSpec, silent


def scaled_groups(model: ir.Model, plan: PrecisionPlan) -> tuple[Group, ...]:
    """Return the products that AWQ scales, by the input they read: those that the plan rounds by it.

    An input that other nodes quantize gets their scale.
    """
    smoothed = {g.tensor for g in groups(model, plan)}
    rounding = {n.node: n.rounding for n in plan}
    found = groups(model, plan, weights_alone=True)
    return tuple(g for g in found if g.tensor not in smoothed and rounding[g.nodes[0]] == "awq")


def search(
    path: Path,
    plan: PrecisionPlan,
    data: Iterable[Feeds],
    options: RoundingOptions,
    progress: Progress = silent,
) -> tuple[Smoothing, ...]:
    """Return what was chosen for every input of :func:`scaled_groups`.

    An input whose scale nothing in front takes in is left as it is unless a Mul of its own saves a tenth of the error.

    Args:
        path: The canonical model.
        plan: What is quantized.
        data: Calibration batches, read once for every part that fits the memory.
        options: Padding, threads, memory.
        progress: Told of every input under ``awq``.
    """
    model = models.load(path)
    nodes = {n.name: n for n in model.graph}
    wanted = {g.tensor: g for g in scaled_groups(model, plan)}
    products = {tensor: [product_of(nodes[name]) for name in g.nodes] for tensor, g in wanted.items()}
    chosen: list[Smoothing] = []
    for part in fitting({t: moment_bytes(found[0]) for t, found in products.items()}, options.memory_bytes):
        tap = Tap(path, part, mask=options.mask, threads=options.threads)
        moments = second_moments(tap, data, {t: [products[t][0].reading] for t in part})
        for tensor in part:
            seen = moments.pop((tensor, products[tensor][0].reading))
            chosen.append(_chosen(wanted[tensor], plan, products[tensor], seen))
            progress("awq", len(chosen), len(products))
    return tuple(chosen)


def _chosen(group: Group, plan: PrecisionPlan, products: Sequence[Product], seen: Moments) -> Smoothing:
    """Return the scale of one input; alpha ``None`` leaves it as it is."""
    first = products[0]
    found = search_scale(_columns(products, plan), seen.centred[0], seen.magnitude[0] / max(seen.count, 1))
    value, channels = first.node.inputs[0], len(found.scale)
    assert value is not None
    free = absorbable(value, group, channels, shifted=False)
    kept = found.error < (1.0 if free else WORTH) * found.plain_error
    return Smoothing(
        group=group,
        alpha=found.alpha if kept else None,
        shifted=False,
        scale=found.scale if kept else np.ones(channels, np.float32),
        shift=np.zeros(channels, np.float32),
        error=found.error if kept else found.plain_error,
        plain_error=found.plain_error,
    )


def _columns(products: Sequence[Product], plan: PrecisionPlan) -> list[tuple[F32, QuantSpec]]:
    """Return evenly spread output channels of all products together, ``[channels in, columns]``, by how they are stored."""
    specs = {n.node: plan.weight_spec(n) for n in plan.quantized()}
    widths = [p.shape[p.what.channel_axis or 0] for p in products]
    ends = np.cumsum([0, *widths])
    picked = np.unique(np.linspace(0, ends[-1] - 1, min(COLUMNS, int(ends[-1]))).astype(np.int64))
    parts: dict[QuantSpec, list[F32]] = {}
    for made, start, end in zip(products, ends[:-1], ends[1:], strict=True):
        own = picked[(picked >= start) & (picked < end)] - start
        parts.setdefault(specs[made.node.name or ""], []).append(made.weight()[0][:, own])
    return [(np.concatenate(part, axis=1), spec) for spec, part in parts.items()]
