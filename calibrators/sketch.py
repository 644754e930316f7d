"""A histogram of floats over the upper 16 bits of the float itself.

Sign, 8 exponent bits and 7 mantissa bits name a bin, so a bin is at most 0.8 % wide, no range is needed in advance,
nothing is ever binned again, and merging is addition. Beside the counts it keeps the sum of the lower 16 bits of a
bin's values, hence every bin's mean, and the sum of all values, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from calibrators.distribution import Distribution, distribution
from calibrators.padding import heads_between
from pipeline.errors import DataError
from pipeline.types import Array

_SIGN = 0x8000
_INFINITY = 0x7F80
"""Bins from here to the sign bit hold infinity and NaN."""


class Sketch:
    """Counts by bin, exact extremes and exact sums of float32 values.

    Float16 values are exact in it; float64 values are rounded to float32 first. ``-0`` counts as ``0``; the bin of
    zero also holds magnitudes below 2**-133. NaN and infinity are counted apart.
    """

    def __init__(self) -> None:
        self._bins: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._lows: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._min, self._max = np.float32(np.inf), np.float32(-np.inf)
        self._nonfinite = 0
        self._lanes: npt.NDArray[np.uint64] | None = None
        self._pending = 0
        self._distributions: dict[bool, Distribution] = {}

    @property
    def count(self) -> int:
        """Return how many finite values were seen."""
        self._settle()
        return int(self._counts.sum())

    @property
    def nonfinite(self) -> int:
        """Return how many NaN and infinite values were seen."""
        return self._nonfinite

    @property
    def min(self) -> float:
        """Return the smallest finite value, exactly; infinity if there is none."""
        return float(self._min)

    @property
    def max(self) -> float:
        """Return the largest finite value, exactly; minus infinity if there is none."""
        return float(self._max)

    @property
    def amax(self) -> float:
        """Return the largest magnitude, exactly; 0 if there is no value."""
        return max(-self.min, self.max, 0.0)

    @property
    def total(self) -> Fraction:
        """Return the sum of all finite values, exactly."""
        self._settle()
        return _total(self._bins, self._counts, self._lows)

    @property
    def mean(self) -> float:
        """Return the mean of all finite values; NaN if there is none."""
        return float(self.total / self.count) if self.count else float("nan")

    @property
    def absolute_mean(self) -> float:
        """Return the mean magnitude; NaN if there is no value."""
        return float(_total(*self._folded()) / self.count) if self.count else float("nan")

    def update(self, values: Array, keep: Array | None = None) -> None:
        """Add the values of an array of any shape, of dtype float16, float32 or float64.

        Args:
            values: The values.
            keep: ``[batch, positions]`` bool; values at positions that are not kept are left out, where the array's
                shape shows which those are (:func:`calibrators.padding.heads_between`).
        """
        values = _float32(values)
        heads = None if keep is None else heads_between(values.shape, keep)
        self._distributions.clear()
        from calibrators import sketch_kernels as kernels  # numba: only where values are counted

        flat = values.reshape(-1)
        if keep is not None and heads is not None:
            if flat.size <= kernels.LIMIT:
                self._add(flat, keep, heads)
                return
            rows = flat.reshape(keep.shape[0], heads, keep.shape[1], -1)
            flat = np.moveaxis(rows, 2, 1)[keep].reshape(-1)
        for begin in range(0, flat.size, kernels.LIMIT - 1):  # an even piece keeps the next one aligned
            self._add(flat[begin : begin + kernels.LIMIT - 1], None, 1)

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        other._settle()
        self._settle()
        self._distributions.clear()
        self._insert(other._bins, other._counts, other._lows)
        self._nonfinite += other._nonfinite
        self._min, self._max = min(self._min, other._min), max(self._max, other._max)

    def settle(self) -> None:
        """Free the working memory (1 MB); further updates take it again."""
        self._settle()
        self._lanes = None

    def arrays(self) -> dict[str, Array]:
        """Return ``bins`` [n] uint16 in rising order, ``counts`` and ``lows`` [n] int64, ``extremes`` [2] float32
        (smallest, largest) and ``nonfinite`` [1] int64.
        """  # noqa: D205
        self._settle()
        return {
            "bins": self._bins,
            "counts": self._counts,
            "lows": self._lows,
            "extremes": np.array([self._min, self._max], np.float32),
            "nonfinite": np.array([self._nonfinite], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Return the sketch that :meth:`arrays` described.

        Raises:
            DataError: The arrays are not those of a sketch.
        """
        sketch = cls()
        try:
            sketch._bins = arrays["bins"].astype(np.uint16, casting="equiv")
            sketch._counts = arrays["counts"].astype(np.int64, casting="equiv")
            sketch._lows = arrays["lows"].astype(np.int64, casting="equiv")
            sketch._min, sketch._max = arrays["extremes"].astype(np.float32, casting="equiv")
            (nonfinite,) = arrays["nonfinite"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"The stored statistic is no sketch: {error}.", fix="Calibrate again.") from error
        sketch._nonfinite = int(nonfinite)
        sizes = {sketch._bins.size, sketch._counts.size, sketch._lows.size}
        if len(sizes) > 1 or np.any(np.diff(sketch._bins.astype(np.int64)) <= 0) or np.any(sketch._counts <= 0):
            raise DataError("The stored sketch contradicts itself.", fix="Calibrate again.")
        return sketch

    def distribution(self, *, magnitudes: bool = False) -> Distribution:
        """Return the values, or their magnitudes, as intervals in rising order.

        Raises:
            DataError: There are no values, or NaN or infinity was among them.
        """
        self._settle()
        if self._nonfinite:
            raise DataError(f"The tensor has {self._nonfinite} NaN or infinite values, so it has no range.")
        if not self._counts.size:
            raise DataError("The tensor has no values, so it has no range.", fix="Calibrate with data that reaches it.")
        if magnitudes not in self._distributions:
            if magnitudes:
                low = 0.0 if self.min <= 0 <= self.max else min(abs(self.min), abs(self.max))
                found = distribution(*self._folded(), low, self.amax)
            else:
                found = distribution(self._bins, self._counts, self._lows, self.min, self.max)
            self._distributions[magnitudes] = found
        return self._distributions[magnitudes]

    def _add(self, flat: Array, keep: Array | None, heads: int) -> None:
        from calibrators import sketch_kernels as kernels

        if flat.ctypes.data % 8:
            flat = flat.copy()
        if self._pending + flat.size > kernels.LIMIT:
            self._settle()
        if self._lanes is None:
            self._lanes = np.zeros((2, 1 << 16), np.uint64)
        extremes = np.array([-(1 << 31), (1 << 31) - 1, 0, (1 << 32) - 1], np.int64)
        bits, pairs = flat.view(np.uint32), flat[: flat.size // 2 * 2].view(np.uint64)
        if keep is None:
            kernels.add_all(bits, pairs, self._lanes, extremes)
            added = flat.size
        else:
            added = int(kernels.add_rows(bits, pairs, keep, heads, self._lanes, extremes))
        self._pending += added
        if added:
            self._widen(flat, keep, heads, extremes)

    def _widen(self, flat: Array, keep: Array | None, heads: int, extremes: npt.NDArray[np.int64]) -> None:
        imax, imin, umax, umin = (int(pattern) for pattern in extremes)
        if imax >= _INFINITY << 16 or umax >= (_INFINITY | _SIGN) << 16:
            if keep is not None:
                flat = np.moveaxis(flat.reshape(keep.shape[0], heads, keep.shape[1], -1), 2, 1)[keep].ravel()
            finite = flat[np.isfinite(flat)]
            self._nonfinite += flat.size - finite.size
            low, high = (finite.min(), finite.max()) if finite.size else (self._min, self._max)
        else:
            # As integers, negative floats follow the others and rise as they get smaller.
            low = _from_bits(umax if umax >> 31 else umin)
            high = _from_bits(imax if imax >= 0 else imin)
        # Adding 0 turns -0 into 0, so that it does not matter which of them came first.
        self._min, self._max = min(self._min, low + np.float32(0)), max(self._max, high + np.float32(0))

    def _settle(self) -> None:
        """Move what the lanes hold into the sparse arrays."""
        if not self._pending or self._lanes is None:
            return
        from calibrators.sketch_kernels import drain

        self._insert(*drain(self._lanes))
        self._pending = 0

    def _insert(self, bins: npt.NDArray[Any], counts: npt.NDArray[np.int64], lows: npt.NDArray[np.int64]) -> None:
        if not self._bins.size and np.all(bins[:-1] < bins[1:]):
            self._bins, self._counts, self._lows = bins.astype(np.uint16), counts, lows
            return
        everything = np.concatenate([self._bins.astype(np.int64), bins.astype(np.int64)])
        merged, places = np.unique(everything, return_inverse=True)
        new_counts, new_lows = np.zeros(merged.size, np.int64), np.zeros(merged.size, np.int64)
        np.add.at(new_counts, places, np.concatenate([self._counts, counts]))
        np.add.at(new_lows, places, np.concatenate([self._lows, lows]))
        self._bins, self._counts, self._lows = merged.astype(np.uint16), new_counts, new_lows

    def _folded(self) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return bins, counts and lows of the magnitudes."""
        self._settle()
        folded = Sketch()
        lows = np.where(self._bins == 0, np.abs(self._lows), self._lows)
        folded._insert(self._bins & np.uint16(_SIGN - 1), self._counts, lows)
        return folded._bins, folded._counts, folded._lows


def _float32(values: Array) -> Array:
    if values.dtype.kind != "f":
        raise DataError(f"A sketch is made of floats; this array holds {values.dtype}.")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity, which is counted as such
        return np.ascontiguousarray(values, dtype=np.float32)


def _from_bits(pattern: int) -> np.float32:
    return np.float32(np.array(pattern & 0xFFFFFFFF, np.uint32).view(np.float32))


def _total(bins: npt.NDArray[Any], counts: npt.NDArray[np.int64], lows: npt.NDArray[np.int64]) -> Fraction:
    """Return the exact sum: integers times a power of two for every exponent, added as big integers."""
    total = 0
    for one, count, low in zip(bins.tolist(), counts.tolist(), lows.tolist(), strict=True):
        exponent, mantissa = (one >> 7) & 0xFF, one & 0x7F
        implied = 0x80 if exponent else 0
        magnitude = (count * ((implied | mantissa) << 16) + low) << (max(exponent, 1) - 1)
        total += -magnitude if one & _SIGN else magnitude
    return Fraction(total, 1 << 149)
