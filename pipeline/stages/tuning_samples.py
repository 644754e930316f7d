"""The few calibration samples that choices are tried on."""

from __future__ import annotations

from pipeline.types import CalibrationData, Feeds, TensorInfo

TUNING_SAMPLES = 8


def first_batches(data: CalibrationData | None, samples: int, inputs: tuple[TensorInfo, ...]) -> list[Feeds]:
    """Return the first batches that hold ``samples`` samples, the last one cut where the model takes any batch."""
    fixed = any(not info.shape or isinstance(info.shape[0], int) for info in inputs)
    feeds: list[Feeds] = []
    left = samples
    for batch in data if data is not None else ():
        size = next((len(v) for v in batch.values() if v.ndim), 1)
        feeds.append({k: v[:left] for k, v in batch.items()} if size > left and not fixed else batch)
        left -= max(size, 1)
        if left <= 0:
            break
    return feeds
