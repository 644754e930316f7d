"""``auto``'s second half: check the calibrators' choice where it counts, at the network's output.

The least error per tensor is not the least error of the network: clipping an outlier that a later layer depends on
costs more than its square says. So a few calibration samples run through the float network with only the activation
Q/DQ pairs in it, whose scales are *inputs* of the graph: one session serves every trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insert import Inserter
from pipeline.quantize.ranges import CANDIDATES, SiteRange, role_groups
from pipeline.session import run, session
from pipeline.types import Array, Feeds, Precision, Progress, silent

WORTH = 0.98
"""A trial replaces the choice only if it brings the noise below this share of it; less is chance on a few samples."""
HOPELESS = 8.0
"""A candidate whose summed squared error is this many times the least is not tried at the output."""


def tune(
    path: Path,
    plan: PrecisionPlan,
    ranges: Sequence[SiteRange],
    feeds: Sequence[Feeds],
    *,
    mask: str | None = None,
    threads: int = 0,
    progress: Progress = silent,
) -> tuple[SiteRange, ...]:
    """Return ``ranges`` with the calibrator that leaves the least noise at the outputs, first overall, then per role.

    Args:
        path: The canonical FP32 model.
        plan: Its precision plan.
        ranges: Per tensor the candidate of least error, with all candidates as options.
        feeds: A few batches of calibration data.
        mask: Input that is 0 at padding positions, which do not count.
        threads: For ONNX Runtime.
        progress: Told of every trial.
    """
    best = tuple(ranges)
    methods = _worth_trying(ranges)
    groups = role_groups(ranges)
    if not best or not feeds or len(methods) < 2:
        return best
    trials = _Trials(path, plan, best, feeds, mask, threads)
    if not trials.outputs:
        return best
    total = 1 + len(methods) + (len(groups) * len(methods) if len(groups) > 1 else 0)
    done = 0

    def attempt(candidate: tuple[SiteRange, ...]) -> float:
        nonlocal done
        done += 1
        noise = trials.noise(candidate)
        progress("tune", done, total)
        return noise

    least = attempt(best)
    for method in methods:
        candidate = tuple(r.use(method) for r in ranges)
        if (noise := attempt(candidate)) < least * WORTH:
            best, least = candidate, noise
    for indices in groups.values() if len(groups) > 1 else ():
        start = best
        for method in methods:
            candidate = tuple(r.use(method) if i in indices else r for i, r in enumerate(start))
            if candidate != start and (noise := attempt(candidate)) < least * WORTH:
                best, least = candidate, noise
    progress("tune", total, total)
    return best


def _worth_trying(ranges: Sequence[SiteRange]) -> list[str]:
    totals = {
        str(m): sum(r.errors[m] / max(min(r.errors.values()), 1e-30) for r in ranges)
        for m in CANDIDATES
        if all(m in r.errors for r in ranges)
    }
    return [m for m, t in totals.items() if t <= HOPELESS * min(totals.values())]


class _Trials:
    """One session whose activation scales and zero points are graph inputs."""

    def __init__(
        self,
        path: Path,
        plan: PrecisionPlan,
        ranges: Sequence[SiteRange],
        feeds: Sequence[Feeds],
        mask: str | None,
        threads: int,
    ) -> None:
        self.feeds = feeds
        self.mask = mask
        model = models.load(path)
        self.outputs = [o.name for o in models.outputs(model) if np.issubdtype(o.dtype, np.floating)]
        reference = session(path, threads=threads)
        self.expected = [run(reference, self.outputs, dict(f)) for f in feeds]
        del reference
        # The trials run in FP32: FP16's rounding is not what is being chosen here.
        inserter = Inserter(
            model, replace(plan, elsewhere=Precision.FP32), {(r.site.tensor, r.site.spec): r.range for r in ranges}
        )
        inserter.activations()
        self.inputs = {key: _to_inputs(model.graph, pair) for key, pair in inserter.pairs.items()}
        serialized = ir.serde.serialize_model(model)
        assert isinstance(serialized, onnx.ModelProto)
        # The optimizer may not touch pairs whose scales it does not know, and there is nothing else worth its time.
        self.session = session(serialized.SerializeToString(), threads=threads, optimize=False, folder=path.parent)

    def noise(self, ranges: Sequence[SiteRange]) -> float:
        """Return the sum over outputs of noise energy over signal energy."""
        scales: dict[str, Array] = {}
        for item in ranges:
            scale, zero_point = item.range.scale_zero_point(item.site.spec)
            scale_name, scale_dtype, zero_name, dtype = self.inputs[item.site.tensor, item.site.spec]
            scales |= {scale_name: np.asarray(scale, scale_dtype), zero_name: np.asarray(zero_point, dtype)}
        noise = np.zeros(len(self.outputs))
        signal = np.zeros(len(self.outputs))
        for feed, expected in zip(self.feeds, self.expected, strict=True):
            got = run(self.session, self.outputs, {**feed, **scales})
            for index, (want, have) in enumerate(zip(expected, got, strict=True)):
                difference, reference = self._valid(have - want, feed), self._valid(want, feed)
                noise[index] += np.sum(np.square(difference, dtype=np.float64))
                signal[index] += np.sum(np.square(reference, dtype=np.float64))
        ratio = noise / np.maximum(signal, 1e-30)
        return float(ratio.sum()) if np.all(np.isfinite(ratio)) else float("inf")

    def _valid(self, values: Array, feed: Mapping[str, Array]) -> Array:
        mask = feed.get(self.mask) if self.mask else None
        if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
            return np.asarray(values[mask != 0])
        return values


_Dtype = np.dtype[np.generic]


def _to_inputs(graph: ir.Graph, pair: tuple[ir.Value, ir.Value]) -> tuple[str, _Dtype, str, _Dtype]:
    """Turn the constants of a pair into graph inputs; return the name and dtype of the scale and of the zero point."""
    found: list[tuple[str, _Dtype]] = []
    for value in pair:
        del graph.initializers[value.name or ""]
        value.const_value = None
        graph.inputs.append(value)
        assert value.dtype is not None
        found.append((value.name or "", value.dtype.numpy()))
    return *found[0], *found[1]
