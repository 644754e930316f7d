"""Compiled loops of the per-channel statistics; import this only where values are seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from calibrators.jit import kernel

I32 = npt.NDArray[np.int32]


@kernel
def fold_absmax(bits: Any, largest: I32) -> None:
    """Raise ``largest`` [channels] to the largest magnitude's bit pattern.

    Args:
        bits: Float32 values as int32, ``[outer, channels, inner]``.
        largest: Bit patterns without the sign, updated. Their order is that of the magnitudes, NaN above infinity.
    """
    outer, channels, inner = bits.shape
    magnitude = np.int32(0x7FFFFFFF)
    for o in range(outer):
        if inner == 1:
            for c in range(channels):
                largest[c] = max(largest[c], bits[o, c, 0] & magnitude)
            continue
        for c in range(channels):
            top = largest[c]
            row = bits[o, c]
            for i in range(inner):
                top = max(top, row[i] & magnitude)
            largest[c] = top


@kernel
def fold_range(bits: Any, lowest: I32, highest: I32) -> None:
    """Widen ``lowest`` and ``highest`` [channels] to hold every value.

    Args:
        bits: Float32 values as int32, ``[outer, channels, inner]``.
        lowest: Sortable patterns (the bits, with those below the sign flipped for negatives), updated.
        highest: The same.
    """
    outer, channels, inner = bits.shape
    magnitude = np.int32(0x7FFFFFFF)
    for o in range(outer):
        if inner == 1:
            for c in range(channels):
                one = bits[o, c, 0]
                key = one ^ ((one >> 31) & magnitude)
                lowest[c] = min(lowest[c], key)
                highest[c] = max(highest[c], key)
            continue
        for c in range(channels):
            low, high = lowest[c], highest[c]
            row = bits[o, c]
            for i in range(inner):
                key = row[i] ^ ((row[i] >> 31) & magnitude)
                low = min(low, key)
                high = max(high, key)
            lowest[c] = low
            highest[c] = high
