"""Heuristics for data that somebody made up with a random number generator.

*Numbers* look random when they follow a uniform or a normal distribution closely (Kolmogorov-Smirnov distance below
0.02) **and** neighbours along every axis of a sample are uncorrelated (|r| < 0.05). Pictures, sound and real features
fail one of the two by far: they are smooth, sparse, or skewed.

*Token ids* look random when every id between the smallest and the largest is about equally frequent: the chi-squared
statistic against the uniform distribution stays below twice its degrees of freedom. Text follows Zipf's law, which
puts it at five times and more from a few hundred tokens on. Tokens drawn by their true frequency are not noticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.types import Array

MIN_VALUES = 2048
"""Fewer values say too little."""
MIN_TOKENS = 512
_MAX_VALUES = 1 << 16
_MAX_CORRELATED = 1 << 20
"""About how many values the correlations are computed on: whole batches, from the first."""
_KS = 0.02
_CORRELATION = 0.05
_CHI_SQUARED_RATIO = 2.0


def values_look_random(arrays: Sequence[Array]) -> str:
    """Return which noise float arrays ``[batch, …]`` look like (``uniform noise``, ``normal noise``), or nothing."""
    values = np.concatenate([_one_channel(array).ravel() for array in arrays])
    if values.size < MIN_VALUES or not np.all(np.isfinite(values)) or np.ptp(values) == 0:
        return ""
    values = np.sort(values[:: math.ceil(values.size / _MAX_VALUES)].astype(np.float64))
    from scipy import special  # imported here: 0.2 s that token ids do not need

    uniform = (values - values[0]) / np.ptp(values)
    normal = special.ndtr((values - values.mean()) / values.std())
    for name, cumulative in (("uniform", uniform), ("normal", normal)):
        if _ks_distance(cumulative) < _KS:
            return f"{name} noise without structure" if _uncorrelated(arrays) else ""
    return ""


def _one_channel(array: Array) -> Array:
    """Return a picture's first channel: each channel is normalised otherwise, and a mixture hides the distribution."""
    if array.ndim == 4 and array.shape[1] <= 4:
        return array[:, 0]
    return array[..., 0] if array.ndim == 4 and array.shape[3] <= 4 else array


def _ks_distance(cumulative: Array) -> float:
    """Return the Kolmogorov-Smirnov distance, given the model's distribution function at the sorted values."""
    steps = np.arange(cumulative.size + 1) / cumulative.size
    return float(max(np.max(steps[1:] - cumulative), np.max(cumulative - steps[:-1])))


def _uncorrelated(arrays: Sequence[Array]) -> bool:
    """Return whether neighbours along each axis but the batch are uncorrelated."""
    few = max(1, _MAX_CORRELATED * len(arrays) // sum(array.size for array in arrays))
    for axis in range(1, arrays[0].ndim):
        moved = [np.moveaxis(array, axis, -1).astype(np.float64) for array in arrays[:few]]
        first = np.concatenate([array[..., :-1].ravel() for array in moved])
        second = np.concatenate([array[..., 1:].ravel() for array in moved])
        if first.size < MIN_VALUES // 2 or first.std() == 0 or second.std() == 0:
            continue
        covariance = np.mean((first - first.mean()) * (second - second.mean()))
        if abs(covariance / (first.std() * second.std())) > _CORRELATION:
            return False
    return True


def ids_look_random(rows: Sequence[Array]) -> str:
    """Return why token ids (one array ``[tokens]`` a sample, without padding) look random, or nothing.

    The first and last token of each sample are left out: they are often special tokens.
    """
    ids = np.concatenate([row[1:-1] for row in rows]).astype(np.int64)
    if ids.size < MIN_TOKENS:
        return ""
    span = int(ids.max() - ids.min()) + 1
    if span < 2:
        return ""
    # sum over all ids of (count - n/span)^2 / (n/span), without listing those that do not occur
    counts = np.unique(ids, return_counts=True)[1].astype(np.float64)
    chi_squared = float(np.sum(counts**2)) * span / ids.size - ids.size
    return "every token is about equally frequent" if chi_squared < _CHI_SQUARED_RATIO * (span - 1) else ""
