"""The smallest and largest value of every channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from calibrators.channels import channel_bits, require_same
from pipeline.errors import DataError
from pipeline.types import Array

F32 = npt.NDArray[np.float32]
_INFINITY = 0x7F800000
_MAGNITUDE = np.int32(0x7FFFFFFF)


class ChannelRange:
    """Exact minimum and maximum over everything but one axis.

    Args:
        axis: The channel axis; -1 is the last.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._count = 0
        self._nonfinite = 0
        self._ends: tuple[F32, F32] | None = None

    @property
    def count(self) -> int:
        """Return how many finite values were seen."""
        return self._count

    @property
    def nonfinite(self) -> int:
        """Return how many NaN and infinite values were seen."""
        return self._nonfinite

    @property
    def min(self) -> F32:
        """Return the smallest value of each channel, ``[channels]``; infinity where there was none finite."""
        return np.zeros(0, np.float32) if self._ends is None else self._ends[0]

    @property
    def max(self) -> F32:
        """Return the largest value of each channel, ``[channels]``; minus infinity where there was none finite."""
        return np.zeros(0, np.float32) if self._ends is None else self._ends[1]

    def update(self, values: Array, keep: Array | None = None) -> None:
        """Add the values of a float array.

        Args:
            values: The values; the channel axis has the same size every time.
            keep: Positions that count, ``[batch, positions]`` bool.

        Raises:
            DataError: The axis does not exist or changed its size, or the array holds no floats.
        """
        from calibrators.channel_kernels import fold_range  # numba: only where values are seen

        bits = channel_bits(values, self.axis, keep)
        channels = bits.shape[1]
        if not bits.size:
            self._fold(np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32), 0, 0)
            return
        lowest, highest = np.full(channels, 2**31 - 1, np.int32), np.full(channels, -(2**31), np.int32)
        fold_range(bits, lowest, highest)
        bad = 0
        if (highest >= _INFINITY).any() or (lowest <= -_INFINITY - 1).any():
            floats = bits.view(np.float32)
            finite = np.isfinite(floats)
            bad = int(finite.size - np.count_nonzero(finite))
            low = floats.min(axis=(0, 2), where=finite, initial=np.inf)
            high = floats.max(axis=(0, 2), where=finite, initial=-np.inf)
        else:
            low, high = _unsorted(lowest), _unsorted(highest)
        self._fold(low, high, bits.size - bad, bad)

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        require_same((self.axis, self.min.size), (other.axis, other.min.size))
        if other._ends is not None:
            self._fold(*other._ends, other._count, other._nonfinite)

    def arrays(self) -> dict[str, Array]:
        """Return ``ends`` [2, channels] float32 (smallest, largest) and ``seen`` [4] int64 (axis, count, nonfinite,
        whether anything was seen).
        """  # noqa: D205
        seen = np.array([self.axis, self._count, self._nonfinite, self._ends is not None], np.int64)
        return {"ends": np.stack([self.min, self.max]), "seen": seen}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Return the statistic that :meth:`arrays` described.

        Raises:
            DataError: The arrays are not those of this statistic.
        """
        try:
            axis, count, nonfinite, anything = (int(value) for value in arrays["seen"])
            low, high = arrays["ends"].astype(np.float32, casting="equiv")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"The stored statistic is no channel_range: {error}.", fix="Calibrate again.") from error
        statistic = cls(axis)
        statistic._count, statistic._nonfinite = count, nonfinite
        statistic._ends = (low, high) if anything else None
        return statistic

    def _fold(self, low: F32, high: F32, count: int, nonfinite: int) -> None:
        require_same((self.axis, self.min.size), (self.axis, low.size))
        low, high = low + np.float32(0), high + np.float32(0)  # -0 becomes 0
        if self._ends is not None:
            low, high = np.minimum(self._ends[0], low), np.maximum(self._ends[1], high)
        self._ends = (low, high)
        self._count += count
        self._nonfinite += nonfinite


def _unsorted(keys: npt.NDArray[np.int32]) -> F32:
    return (keys ^ ((keys >> 31) & _MAGNITUDE)).view(np.float32)
