"""Compiled quantization error of a distribution, and the search for the range that makes it least."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from calibrators.jit import kernel

F64 = npt.NDArray[np.float64]

FINE, ROUNDS = 9, 4
"""Points of one search step, and steps at each end."""


@kernel
def _antiderivative(t: float, lowest: float, highest: float) -> float:
    """Return the integral of ``(t - nearest integer level)**2`` from ``lowest`` to ``t``."""
    if t < lowest:
        return (t - lowest) ** 3 / 3.0
    if t > highest:
        return (highest - lowest) / 12.0 + (t - highest) ** 3 / 3.0
    level = float(np.rint(t))
    return (level - lowest) / 12.0 + (t - level) ** 3 / 3.0


@kernel
def _interval_error(low: float, high: float, mean: float, lowest: float, highest: float) -> float:
    """Return the mean squared error of values spread evenly from ``low`` to ``high``, all in steps."""
    width = high - low
    if width < 0.01:
        level = min(max(float(np.rint(mean)), lowest), highest)
        return (mean - level) ** 2 + width * width / 12.0
    return (_antiderivative(high, lowest, highest) - _antiderivative(low, lowest, highest)) / width


@kernel
def uniform_error(low: F64, high: F64, mean: F64, count: F64, scale: float, lowest: float, highest: float) -> float:
    """Return the sum of squared errors with the levels ``scale * k`` for whole ``lowest <= k <= highest``.

    Args:
        low: Lower ends of the intervals, ``[n]``.
        high: Upper ends, ``[n]``.
        mean: Middles, ``[n]``.
        count: Values in each, ``[n]``.
        scale: Step.
        lowest: First level in steps: ``qmin - zero_point``.
        highest: Last level in steps: ``qmax - zero_point``.
    """
    inverse = 1.0 / scale
    total = 0.0
    for i in range(mean.size):
        total += count[i] * _interval_error(low[i] * inverse, high[i] * inverse, mean[i] * inverse, lowest, highest)
    return total * scale * scale


@kernel
def e4m3_error(low: F64, high: F64, mean: F64, count: F64, scale: float) -> float:
    """Return the sum of squared errors with the FP8 E4M3 values (largest 448, 3 mantissa bits) times ``scale``.

    Arguments are those of :func:`uniform_error`. Between two powers of two E4M3 is a uniform grid, and an interval of
    a sketch crosses no power of two by more than a sixteenth of a step.
    """
    inverse = 1.0 / scale
    total = 0.0
    for i in range(mean.size):
        middle = mean[i] * inverse
        exponent = max(math.frexp(abs(middle))[1] - 1, -6)
        step = 2.0 ** (min(exponent, 8) - 3)
        fit = inverse / step
        error = _interval_error(low[i] * fit, high[i] * fit, mean[i] * fit, -448.0 / step, 448.0 / step)
        total += count[i] * error * step * step
    return total * scale * scale


@kernel
def _scaled_error(low: F64, high: F64, mean: F64, count: F64, amax: float, levels: F64) -> float:
    """Return the error of a symmetric range; ``levels`` is (lowest, highest, amax in steps, whether FP8)."""
    scale = float(np.float32(amax / levels[2]))
    if scale <= 0.0:
        return math.inf
    if levels[3] > 0:
        return e4m3_error(low, high, mean, count, scale)
    return uniform_error(low, high, mean, count, scale, levels[0], levels[1])


@kernel
def search_symmetric(low: F64, high: F64, mean: F64, count: F64, amax: float, levels: F64) -> float:
    """Return the ``amax`` whose symmetric range has the least error.

    First every eighth of an octave below the largest magnitude, then ever finer around the best. FP8, whose error goes
    up and down with every octave and hardly falls by clipping, is tried every 24th of an octave for four octaves.

    Args:
        low: As for :func:`uniform_error`.
        high: As for :func:`uniform_error`.
        mean: As for :func:`uniform_error`.
        count: As for :func:`uniform_error`.
        amax: Largest magnitude.
        levels: First and last level, amax in steps, and 1 for FP8 (0 for whole steps), ``[4]``.
    """
    best = amax
    least = _scaled_error(low, high, mean, count, amax, levels)
    per_octave, tries = (24, 96) if levels[3] > 0 else (8, 160)
    rising = 0
    for i in range(1, tries):
        candidate = amax * 2.0 ** (-i / per_octave)
        error = _scaled_error(low, high, mean, count, candidate, levels)
        rising += 1
        if error < least:
            best, least, rising = candidate, error, 0
        # The clipping error only grows from here; two octaves show that it has taken over.
        if rising >= 2 * per_octave and error > 8.0 * least:
            break
    ratio = 2.0 ** (1.0 / per_octave)
    for _ in range(3):
        centre, step = best, ratio ** (2.0 / FINE)
        for i in range(-(FINE // 2), FINE // 2 + 1):
            candidate = min(centre * step**i, amax)
            error = _scaled_error(low, high, mean, count, candidate, levels)
            if error < least:
                best, least = candidate, error
        ratio = step
    return best


@kernel
def affine_error(low: F64, high: F64, mean: F64, count: F64, ends: F64, levels: F64) -> float:
    """Return the error of an asymmetric range ``ends`` [2] with quantized values from ``levels[0]`` to ``levels[1]``.

    Scale and zero point are made as :meth:`pipeline.types.Range.scale_zero_point` makes them.
    """
    bottom, top = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = float(np.float32((top - bottom) / (levels[1] - levels[0])))
    if scale <= 0.0:
        return math.inf
    zero = min(max(float(np.rint(levels[0] - bottom / scale)), levels[0]), levels[1])
    return uniform_error(low, high, mean, count, scale, levels[0] - zero, levels[1] - zero)


@kernel
def search_affine(low: F64, high: F64, mean: F64, count: F64, ends: F64, levels: F64) -> F64:
    """Return the asymmetric range with the least error, ``[2]``.

    Both ends shrink together first; then each in turn, ever finer.

    Args:
        low: As for :func:`uniform_error`.
        high: As for :func:`uniform_error`.
        mean: As for :func:`uniform_error`.
        count: As for :func:`uniform_error`.
        ends: Smallest and largest value, widened to hold 0, ``[2]``.
        levels: Smallest and largest quantized value, ``[2]``.
    """
    best = ends.copy()
    least = affine_error(low, high, mean, count, best, levels)
    trial = ends.copy()
    amax = max(-ends[0], ends[1])
    for i in range(1, 64):
        # The same limit for both ends: it reaches the longer tail first.
        limit = amax * 2.0 ** (-i / 6.0)
        trial[0], trial[1] = max(ends[0], -limit), min(ends[1], limit)
        error = affine_error(low, high, mean, count, trial, levels)
        if error < least:
            least = error
            # Element by element: compiling an array assignment takes 2.5 s, most of it for its error message.
            best[0], best[1] = trial[0], trial[1]
        if error > 64.0 * least:
            break
    reach = 0.5
    for _ in range(ROUNDS):
        for end in range(2):
            centre = best[end]
            if ends[end] == 0.0:
                continue
            for i in range(-FINE, FINE + 1):
                trial[0], trial[1] = best[0], best[1]
                moved = centre * (1.0 + reach * i / FINE)
                trial[end] = min(max(moved, ends[0]), ends[1])
                error = affine_error(low, high, mean, count, trial, levels)
                if error < least:
                    least = error
                    best[0], best[1] = trial[0], trial[1]
        reach /= 3.0
    return best
