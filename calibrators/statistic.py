"""What the collector gathers about a tensor: an algebra of empty, update and merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self, runtime_checkable

from pipeline.types import Array


@runtime_checkable
class Statistic(Protocol):
    """A summary of values whose result does not depend on how they were split or in which order they came.

    ``a.merge(b)`` leaves in ``a`` what one statistic would hold after both had been updated, bit for bit.
    The constructor makes the empty one.
    """

    @property
    def count(self) -> int:
        """Return how many finite values were seen."""
        ...

    @property
    def nonfinite(self) -> int:
        """Return how many NaN and infinite values were seen; they count in nothing else."""
        ...

    def update(self, values: Array, keep: Array | None = None) -> None:
        """Add the values of a float array.

        Args:
            values: Any float dtype and shape.
            keep: Which positions count, ``[batch, positions]`` bool, where the array has such axes
                (see :mod:`calibrators.padding`); ``None`` counts everything.
        """
        ...

    def merge(self, other: Self) -> None:
        """Add everything that ``other`` has seen."""
        ...

    def arrays(self) -> dict[str, Array]:
        """Return the whole state as named arrays, the same bytes for the same values."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Return the statistic that :meth:`arrays` described."""
        ...
