"""TensorRT 10's implicit quantization: builder flags, and a calibrator fed by our ranges or by our data.

TensorRT 11 removed all of it, so this module is imported only after
:func:`engines.tensorrt.options.check_options` allowed ``builder.quantization: implicit``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engines.tensorrt.binding import trt
from engines.tensorrt.buffers import DeviceBuffers
from engines.tensorrt.cache_bytes import cache_bytes
from engines.tensorrt.options import Implicit, ImplicitCalibrator
from pipeline.errors import EngineError
from pipeline.types import Feeds, Precision

FLAGS = {Precision.FP16: "fp16", Precision.INT8: "int8", Precision.FP8: "fp8"}
"""Polygraphy's argument for each builder flag (``BuilderFlag.FP16``, ``INT8``, ``FP8``)."""
ALGORITHMS: dict[ImplicitCalibrator, str] = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}


def arguments(asked: Implicit, calibrator: ImplicitCalibrator) -> dict[str, Any]:
    """Return Polygraphy's arguments for an implicitly quantized build.

    Raises:
        EngineError: INT8 is asked for with neither ranges nor data.
    """
    found: dict[str, Any] = {FLAGS[p]: True for p in sorted(asked.precisions) if p in FLAGS}
    if Precision.INT8 in asked.precisions:
        if not asked.scales and asked.data is None:
            raise EngineError(
                "Implicit INT8 quantization needs ranges or calibration data.",
                where="builder.quantization",
                fix="Give calibration.data or calibration.cache.",
            )
        made = EntropyCalibrator if calibrator == "entropy" else MinMaxCalibrator
        found["calibrator"] = made(_Source(asked, ALGORITHMS[calibrator]))
    return found


class _Source:
    """Where a calibrator's answers come from: a cache made of ranges, or batches in device memory."""

    def __init__(self, asked: Implicit, algorithm: str) -> None:
        self._batches: Iterator[Feeds] = iter(asked.data if asked.data is not None and not asked.scales else ())
        self._buffers: DeviceBuffers | None = None
        self._cache = cache_bytes(asked.scales, algorithm, trt.__version__) if asked.scales else None
        self.batch_size = 1
        if self._cache is None and asked.data is not None:
            first = next(iter(asked.data), {})
            self.batch_size = max((v.shape[0] for v in first.values() if v.ndim), default=1)

    def batch(self, names: list[str]) -> list[int] | None:
        feeds = next(self._batches, None)
        if feeds is None:
            return None
        if self._buffers is None:
            self._buffers = DeviceBuffers()
        return [self._buffers.upload(name, feeds[name]) for name in names]

    def cache(self) -> bytes | None:
        return self._cache

    def keep(self, cache: Any) -> None:
        self._cache = bytes(cache)


class EntropyCalibrator(trt.IInt8EntropyCalibrator2):
    """TensorRT's entropy calibrator over our ranges or data."""

    def __init__(self, source: _Source) -> None:
        trt.IInt8EntropyCalibrator2.__init__(self)
        self._source = source

    def get_batch_size(self) -> int:
        """Return the samples of a batch."""
        return self._source.batch_size

    def get_batch(self, names: list[str]) -> list[int] | None:  # type: ignore[override]  # None ends the data
        """Return a device address for each input, ``None`` after the last batch."""
        return self._source.batch(names)

    def read_calibration_cache(self) -> bytes | None:
        """Return our ranges as a calibration cache; ``None`` calibrates on the data."""
        return self._source.cache()

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep what TensorRT found."""
        self._source.keep(cache)


class MinMaxCalibrator(trt.IInt8MinMaxCalibrator):
    """TensorRT's min/max calibrator over our ranges or data."""

    def __init__(self, source: _Source) -> None:
        trt.IInt8MinMaxCalibrator.__init__(self)
        self._source = source

    def get_batch_size(self) -> int:
        """Return the samples of a batch."""
        return self._source.batch_size

    def get_batch(self, names: list[str]) -> list[int] | None:  # type: ignore[override]  # None ends the data
        """Return a device address for each input, ``None`` after the last batch."""
        return self._source.batch(names)

    def read_calibration_cache(self) -> bytes | None:
        """Return our ranges as a calibration cache; ``None`` calibrates on the data."""
        return self._source.cache()

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep what TensorRT found."""
        self._source.keep(cache)
