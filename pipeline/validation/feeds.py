"""Fits a batch of data to the runner that gets it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from pipeline import kv_cache
from pipeline.errors import DataError
from pipeline.types import Array, Feeds, Runner, TensorInfo

MASK = "attention_mask"
"""The input that says which positions are padding (0)."""


class Fed(Protocol):
    """Something that takes inputs."""

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The inputs, with their types and shapes."""
        ...


def fit(runner: Fed, feeds: Mapping[str, Array]) -> Feeds:
    """Return the feeds that ``runner`` takes, floats in its own float type (an FP16 variant may want FP16 inputs).

    Raises:
        DataError: An input is missing.
    """
    fitted: Feeds = {}
    for info in runner.inputs:
        if info.name not in feeds:
            raise DataError(
                "The validation data lacks an input of the model.",
                where=f"input {info.name}",
                fix=f"The data has {', '.join(feeds) or 'no arrays'}.",
            )
        values = feeds[info.name]
        if kv_cache.is_past(info.name) and values.dtype != info.dtype:
            fitted[info.name] = _cache(info, values)
            continue
        both_float = np.issubdtype(values.dtype, np.floating) and np.issubdtype(info.dtype, np.floating)
        fitted[info.name] = values.astype(info.dtype) if both_float and values.dtype != info.dtype else values
    return fitted


def _cache(info: TensorInfo, values: Array) -> Array:
    """Return a cache in the variant's own type, which only an empty one or another float type can be put in."""
    if values.size and not (np.issubdtype(values.dtype, np.floating) and np.issubdtype(info.dtype, np.floating)):
        raise DataError(
            f"The variant stores its cache in {info.dtype}, and the data gives {values.dtype} values.",
            where=f"input {info.name}",
            fix="Give data whose cache is empty (past length 0), as texts are.",
        )
    return values.astype(info.dtype)


def mask_of(feeds: Mapping[str, Array]) -> Array | None:
    """Return the padding mask ``[batch, seq]``, if the data has one."""
    mask = feeds.get(MASK)
    return mask if mask is not None and mask.ndim == 2 else None


def size_of(feeds: Mapping[str, Array]) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(feeds.values()))) if feeds else 0


def fixed_batch(runner: Runner) -> int | None:
    """Return the batch size if the model's first axis is a fixed number, else ``None``."""
    firsts = [info.shape[0] for info in runner.inputs if info.shape]
    first = firsts[0] if firsts else None
    return first if isinstance(first, int) and all(dim == first for dim in firsts) else None
