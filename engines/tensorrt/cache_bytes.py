"""Ranges as the calibration cache that the installed TensorRT 10 reads back."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from calibrators import cache_file


def cache_bytes(scales: Mapping[str, float], algorithm: str, version: str) -> bytes:
    """Return a calibration cache as the installed TensorRT writes it.

    Args:
        scales: Tensor to scale.
        algorithm: One of :data:`calibrators.cache_file.ALGORITHMS`: TensorRT passes over another class's cache.
        version: TensorRT's version; 10.13.3.9 is ``101303`` in a cache's first line.
    """
    major, minor, patch = (int(part) for part in version.split(".")[:3])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.cache"
        cache_file.write(path, scales, algorithm=algorithm, trt_version=f"{major * 10000 + minor * 100 + patch}")
        return path.read_bytes()
