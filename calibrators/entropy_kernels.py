"""Compiled loops of the entropy calibrators: a linear histogram from a sketch, and the divergence of every range."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from calibrators.jit import kernel

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@kernel
def linear_histogram(low: F64, high: F64, count: F64, first: float, width: float, bins: int) -> F64:
    """Return the values of a distribution in ``bins`` bins of equal ``width`` from ``first`` on.

    Values are spread evenly over their interval; fewer values than bins it covers stay whole, so that sparse tails
    stay sparse.

    Args:
        low: Lower ends, ``[n]``.
        high: Upper ends, ``[n]``.
        count: Values in each, ``[n]``.
        first: Lower end of the first bin.
        width: Of a bin.
        bins: How many; values at or beyond the last edge count in the last bin.
    """
    histogram = np.zeros(bins)
    for i in range(low.size):
        start, stop = (low[i] - first) / width, (high[i] - first) / width
        covered = int(stop) - int(start) + 1
        if covered <= 1:
            histogram[min(max(int(start), 0), bins - 1)] += count[i]
        elif count[i] < covered:
            pieces = int(count[i])
            for k in range(pieces):
                at = int(start + (stop - start) * (k + 0.5) / pieces)
                histogram[min(max(at, 0), bins - 1)] += 1.0
        else:
            density = count[i] / (stop - start)
            for at in range(int(start), int(stop) + 1):
                part = min(stop, at + 1.0) - max(start, float(at))
                histogram[min(max(at, 0), bins - 1)] += part * density
    return histogram


@kernel
def divergences(histogram: F64, starts: I64, stops: I64, edges: F64, shift: float, floor: float) -> F64:
    """Return the KL divergence of every kept part ``histogram[starts[c]:stops[c]]``, ``[candidates]``.

    P is the kept part with what lies outside added to its end bins. Q gives every nonempty bin of a level the level's
    mean, without what lies outside. With running sums a candidate costs one step a level, and no step a bin.

    Args:
        histogram: Counts, ``[bins]``.
        starts: First bin kept by each candidate.
        stops: One past the last.
        edges: Where levels begin, as shares of the kept part, ``[levels + 1]`` from 0 to 1.
        shift: Subtracted from an edge in bins before it is rounded up: 0 puts a bin in the level of its lower end,
            0.5 in that of its middle.
        floor: Stands for Q where a level is empty but for what was clipped into it; 0 makes that divergence infinite,
            also where only the end bin itself is empty.
    """
    bins = histogram.size
    sums, filled, logs = np.zeros(bins + 1), np.zeros(bins + 1), np.zeros(bins + 1)
    for i in range(bins):
        value = histogram[i]
        sums[i + 1] = sums[i] + value
        filled[i + 1] = filled[i] + (1.0 if value > 0 else 0.0)
        logs[i + 1] = logs[i] + (value * math.log(value) if value > 0 else 0.0)
    found = np.empty(starts.size)
    for c in range(starts.size):
        found[c] = _divergence(histogram, sums, filled, logs, starts[c], stops[c], edges, shift, floor)
    return found


@kernel
def _xlogx(value: float) -> float:
    return value * math.log(value) if value > 0 else 0.0


@kernel
def _divergence(
    histogram: F64,
    sums: F64,
    filled: F64,
    logs: F64,
    start: int,
    stop: int,
    edges: F64,
    shift: float,
    floor: float,
) -> float:
    total = sums[-1]
    kept = sums[stop] - sums[start]
    below, above = sums[start], total - sums[stop]
    if kept <= 0.0:
        return math.inf
    strict = floor == 0.0
    first, last = histogram[start], histogram[stop - 1]
    if strict and ((below > 0 and first == 0) or (above > 0 and last == 0)):
        return math.inf
    entropy = logs[stop] - logs[start]
    entropy += _xlogx(first + below) - _xlogx(first)
    if stop - start > 1 or below == 0:
        entropy += _xlogx(last + above) - _xlogx(last)
    cross = 0.0
    for level in range(edges.size - 1):
        a = start + max(math.ceil(edges[level] * (stop - start) - shift), 0)
        b = start + max(math.ceil(edges[level + 1] * (stop - start) - shift), 0)
        if level == edges.size - 2 or b > stop:
            b = stop
        if a >= b:
            continue
        inside, wanted, spread = sums[b] - sums[a], sums[b] - sums[a], filled[b] - filled[a]
        if a == start:
            wanted += below
            spread += 1.0 if below > 0 and first == 0 else 0.0
        if b == stop:
            wanted += above
            spread += 1.0 if above > 0 and last == 0 and not (a == start and stop - start == 1 and below > 0) else 0.0
        if wanted <= 0:
            continue
        cross += wanted * math.log(inside / spread if inside > 0 else floor * total)
    divergence: float = (entropy - cross) / total - math.log(total) + math.log(kept)
    return divergence
