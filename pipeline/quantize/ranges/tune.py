"""``auto``'s second half: check the calibrators' choice where it counts, at the network's output.

The least error per tensor is not the least error of the network: clipping an outlier that a later layer depends on
costs more than its square says. So a few calibration samples run through the float network with only the activation
Q/DQ pairs in it, whose scales are *inputs* of the graph: one session serves every trial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pipeline import kv_cache
from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insertion.insert import Inserter
from pipeline.quantize.ranges.choose import CANDIDATES, SiteRange, role_groups
from pipeline.running.memory import open_session, stream
from pipeline.running.segmented import in_order
from pipeline.types import Array, Feeds, Precision, Progress, TensorInfo, silent

WORTH = 0.98
"""A trial replaces the choice only if it brings the noise below this share of it; less is chance on a few samples."""
HOPELESS = 8.0
"""A candidate whose summed squared error is this many times the least is not tried at the output."""
PIECE = 2
"""Samples run at a time."""
SLACK = 0.2
"""A trial ends when its noise so far is this share above the best one's at the same point, less as it goes on: 15 %
after a quarter of the samples, nothing at the end. On MiniLM that halves the pieces that are run."""


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
    total = len(methods) + (len(groups) * len(methods) if len(groups) > 1 else 0)
    done = 0
    least = trials.noise(best)

    def attempt(candidate: tuple[SiteRange, ...]) -> None:
        nonlocal best, least, done
        done += 1
        progress("tune", done, total)
        noise = trials.noise(candidate, least) if candidate != best else ()
        if noise and (not least or noise[-1] < least[-1] * WORTH):
            best, least = candidate, noise

    for method in methods:
        attempt(tuple(r.use(method) for r in ranges))
    for indices in groups.values() if len(groups) > 1 else ():
        start = best
        for method in methods:
            attempt(tuple(r.use(method) if i in indices else r for i, r in enumerate(start)))
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
        self.mask = mask
        model = models.load(path)
        self.feeds = _pieces(feeds, models.inputs(model))
        floats = [o.name for o in models.outputs(model) if np.issubdtype(o.dtype, np.floating)]
        self.outputs = [name for name in floats if not kv_cache.is_present(name)]
        reference = open_session(path, threads=threads)
        self.expected = list(in_order(stream(reference, self.outputs, self.feeds)))
        del reference
        self.signal = np.zeros(len(self.outputs))
        for feed, expected in zip(self.feeds, self.expected, strict=True):
            self.signal += [_energy(self._valid(expected[name], feed)) for name in self.outputs]
        # The trials run in FP32: FP16's rounding is not what is being chosen here.
        inserter = Inserter(model, _activations_alone(plan), {(r.site.tensor, r.site.spec): r.range for r in ranges})
        inserter.activations()
        self.inputs = {
            key: _to_inputs(model.graph, pair[:1] if key[1].symmetric else pair) for key, pair in inserter.pairs.items()
        }
        serialized = ir.serde.serialize_model(model)
        assert isinstance(serialized, onnx.ModelProto)
        # The optimizer may not touch pairs whose scales it does not know, and there is nothing else worth its time.
        self.session = open_session(serialized.SerializeToString(), threads=threads, optimize=False, folder=path.parent)

    def noise(self, ranges: Sequence[SiteRange], pace: Sequence[float] = ()) -> tuple[float, ...]:
        """Return noise energy over signal energy, summed over outputs, as it adds up from piece to piece.

        Nothing is returned if it is not finite or ran too far ahead of ``pace``, the best trial's (:data:`SLACK`).
        """
        scales: dict[str, Array] = {}
        for item in ranges:
            scale, zero_point = item.range.scale_zero_point(item.site.spec)
            # A symmetric pair's zero point never changes, and stays a constant of the graph.
            for (name, dtype), value in zip(
                self.inputs[item.site.tensor, item.site.spec], (scale, zero_point), strict=False
            ):
                scales[name] = np.asarray(value, dtype)
        ratios: list[float] = []
        results = in_order(stream(self.session, self.outputs, ({**feed, **scales} for feed in self.feeds)))
        for index, (feed, want, got) in enumerate(zip(self.feeds, self.expected, results, strict=True)):
            noise = [_energy(self._valid(got[name] - want[name], feed)) for name in self.outputs]
            ratios.append(sum(ratios[-1:]) + float(np.sum(noise / np.maximum(self.signal, 1e-30))))
            left = 1 - (index + 1) / len(self.feeds)
            if not math.isfinite(ratios[-1]) or (pace and ratios[-1] > pace[index] * (1 + SLACK * left)):
                return ()
        return tuple(ratios)

    def _valid(self, values: Array, feed: Mapping[str, Array]) -> Array:
        mask = feed.get(self.mask) if self.mask else None
        if mask is not None and values.ndim >= 3 and values.shape[:2] == mask.shape:
            return np.asarray(values[mask != 0])
        return values


def _activations_alone(plan: PrecisionPlan) -> PrecisionPlan:
    """Return the plan in FP32 and without the nodes of which only the weights are quantized."""
    nodes = tuple(
        replace(n, precision=Precision.FP32)
        if n.precision.quantized and plan.formats[n.precision].activations is None
        else n
        for n in plan.nodes
    )
    return replace(plan, elsewhere=Precision.FP32, nodes=nodes)


_Dtype = np.dtype[np.generic]


def _pieces(feeds: Sequence[Feeds], inputs: Sequence[TensorInfo]) -> list[Feeds]:
    """Return the batches cut to :data:`PIECE` samples, or as they are where the model does not leave the batch open."""
    batch = {i.shape[0] if i.shape else 1 for i in inputs}
    if len(batch) > 1 or not isinstance(next(iter(batch), 1), str):
        return list(feeds)
    return [
        {name: values[start : start + PIECE] for name, values in feed.items()}
        for feed in feeds
        for start in range(0, len(next(iter(feed.values()))), PIECE)
    ]


def _energy(values: Array) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _to_inputs(graph: ir.Graph, constants: Sequence[ir.Value]) -> list[tuple[str, _Dtype]]:
    """Turn a pair's constants (scale, and zero point where it can change) into graph inputs; return names and dtypes."""
    found: list[tuple[str, _Dtype]] = []
    for value in constants:
        del graph.initializers[value.name or ""]
        value.const_value = None
        graph.inputs.append(value)
        assert value.dtype is not None
        found.append((value.name or "", value.dtype.numpy()))
    return found
