"""The largest magnitude of every channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from calibrators.channels import channel_bits, require_same
from pipeline.errors import DataError
from pipeline.types import Array

_INFINITY = 0x7F800000


class ChannelAbsmax:
    """Exact ``max |x|`` over everything but one axis.

    Args:
        axis: The channel axis; -1 is the last.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self._count = 0
        self._nonfinite = 0
        self._amax: npt.NDArray[np.float32] | None = None

    @property
    def count(self) -> int:
        """Return how many finite values were seen."""
        return self._count

    @property
    def nonfinite(self) -> int:
        """Return how many NaN and infinite values were seen."""
        return self._nonfinite

    @property
    def amax(self) -> npt.NDArray[np.float32]:
        """Return the largest magnitude of each channel, ``[channels]``; empty if nothing was seen."""
        return np.zeros(0, np.float32) if self._amax is None else self._amax

    def update(self, values: Array, keep: Array | None = None) -> None:
        """Add the values of a float array.

        Args:
            values: The values; the channel axis has the same size every time.
            keep: Positions that count, ``[batch, positions]`` bool.

        Raises:
            DataError: The axis does not exist or changed its size, or the array holds no floats.
        """
        from calibrators.channel_kernels import fold_absmax  # numba: only where values are seen

        bits = channel_bits(values, self.axis, keep)
        largest = np.zeros(bits.shape[1], np.int32)
        fold_absmax(bits, largest)
        bad = 0
        if (largest >= _INFINITY).any():
            magnitudes = np.abs(bits.view(np.float32))
            finite = np.isfinite(magnitudes)
            bad = int(finite.size - np.count_nonzero(finite))
            largest = np.where(finite, magnitudes, np.float32(0)).max(axis=(0, 2)).view(np.int32)
        self._fold(largest.view(np.float32), bits.size - bad, bad)

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        require_same((self.axis, self.amax.size), (other.axis, other.amax.size))
        if other._amax is not None:
            self._fold(other._amax, other._count, other._nonfinite)

    def arrays(self) -> dict[str, Array]:
        """Return ``amax`` [channels] float32 and ``seen`` [4] int64 (axis, count, nonfinite, whether anything was)."""
        seen = np.array([self.axis, self._count, self._nonfinite, self._amax is not None], np.int64)
        return {"amax": self.amax, "seen": seen}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Return the statistic that :meth:`arrays` described.

        Raises:
            DataError: The arrays are not those of this statistic.
        """
        try:
            axis, count, nonfinite, anything = (int(value) for value in arrays["seen"])
            amax = arrays["amax"].astype(np.float32, casting="equiv")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"The stored statistic is no channel_absmax: {error}.", fix="Calibrate again.") from error
        statistic = cls(axis)
        statistic._count, statistic._nonfinite = count, nonfinite
        statistic._amax = amax if anything else None
        return statistic

    def _fold(self, amax: npt.NDArray[np.float32], count: int, nonfinite: int) -> None:
        require_same((self.axis, self.amax.size), (self.axis, amax.size))
        self._amax = amax if self._amax is None else np.maximum(self._amax, amax)
        self._count += count
        self._nonfinite += nonfinite
