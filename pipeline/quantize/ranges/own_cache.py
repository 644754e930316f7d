"""Our chosen ranges as a TensorRT calibration cache, for TensorRT 10 and for tools that read one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibrators import cache_file
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.types import QuantDType


def cache_scales(ranges: Sequence[SiteRange]) -> dict[str, float]:
    """Return tensor to scale for every symmetric INT8 range per tensor, in the order of the sites."""
    return {
        item.site.tensor: item.range.scale_zero_point(item.site.spec)[0]
        for item in ranges
        if item.site.spec.dtype is QuantDType.INT8 and item.site.spec.symmetric and item.site.spec.axis is None
    }


def write_cache(path: Path, ranges: Sequence[SiteRange]) -> None:
    """Write the cache; the same ranges give the same bytes.

    Its first line names TensorRT's min/max calibrator where every range is one, otherwise the entropy calibrator: a
    reader of the other class passes the file over.

    Raises:
        DataError: A tensor's name holds a line break.
        StoreError: The file cannot be written.
    """
    plain = all(item.method == "minmax" for item in ranges)
    cache_file.write(path, cache_scales(ranges), algorithm="MinMaxCalibration" if plain else "EntropyCalibration2")
