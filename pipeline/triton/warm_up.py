"""Warm-up requests: one for every optimization profile, with a real sample where there is one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.tensorrt.profiles import Profile
from pipeline.triton.served import ServedModel
from pipeline.types import Array, TensorInfo

FOLDER = "warmup"
"""In a model's folder: where the server looks for the data of warm-up requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """One request that an instance answers before it is ready.

    Attributes:
        name: What the server calls it.
        batch_size: The server makes so many requests of it and runs them as one batch.
        dims: Input name to its dimensions, without the batch where the server forms batches.
        data: Input name to its values; empty for a request of zeros.
    """

    name: str
    batch_size: int
    dims: Mapping[str, tuple[int, ...]]
    data: Mapping[str, Array]


def warm_ups(model: ServedModel, *, max_batch_size: int) -> tuple[WarmUp, ...]:
    """Return a warm-up request for every profile, or one for a model without; none where the size of an input is not known.

    A sample is cut to a profile's largest size where it is larger; where it is smaller than the smallest, the request is
    zeros of the shape that the profile's kernels were chosen for.

    Args:
        model: What is served.
        max_batch_size: The largest batch that the server forms; 0 for none.
    """
    profiles: tuple[Profile | None, ...] = common_profiles(model) or (None,)
    skip = 1 if max_batch_size else 0
    found = []
    for index, profile in enumerate(profiles):
        dims = {info.name: _dims(info, model, profile, skip) for info in model.inputs}
        known = {name: size for name, size in dims.items() if size is not None}
        if len(known) < len(dims):
            continue
        data = _cut(model, known, skip)
        kind = "sample" if data else "zeros"
        name = kind if len(profiles) == 1 else f"profile {index}: {kind}"
        batch = _batch(model, profile, max_batch_size) if profile is not None else 1
        found.append(WarmUp(name=name, batch_size=batch, dims=known, data=data))
    return tuple(found)


def common_profiles(model: ServedModel) -> tuple[Profile, ...]:
    """Return the profiles of the model's TensorRT engines; :func:`pipeline.triton.config.build_config` demands that all have the same."""
    return next((plan.profiles for _, plan in sorted(model.engines.items())), model.at_load or ())


def data_file(name: str, values: Array) -> tuple[str, bytes]:
    """Return a file name in :data:`FOLDER`, which tells contents apart, and the raw little-endian values."""
    content = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:64]
    return f"{safe}.{hashlib.sha256(content).hexdigest()[:12]}", content


def _dims(info: TensorInfo, model: ServedModel, profile: Profile | None, skip: int) -> tuple[int, ...] | None:
    """Return an input's dimensions in a request: a real sample's, within the profile; ``None`` where one is not known."""
    sample = model.sample.get(info.name, ())
    dims = []
    for axis, dim in enumerate(info.shape[skip:], start=skip):
        usual = sample[axis] if len(sample) == len(info.shape) and sample[axis] > 0 else None
        if isinstance(dim, int):
            dims.append(dim)
        elif profile is not None:
            shapes = profile[info.name]
            fits = usual is not None and usual >= shapes.min[axis]
            dims.append(min(usual or 0, shapes.max[axis]) if fits else shapes.opt[axis])
        elif usual is not None:
            dims.append(usual)
        else:
            return None
    return tuple(dims)


def _cut(model: ServedModel, dims: Mapping[str, tuple[int, ...]], skip: int) -> dict[str, Array]:
    """Return the real sample cut to ``dims``; empty where there is none, it is smaller, or an input is text."""
    cut: dict[str, Array] = {}
    for info in model.inputs:
        values = model.row.get(info.name)
        if values is None or info.dtype.kind == "O" or values.ndim != len(info.shape):
            return {}
        values = values[0] if skip else values
        if any(have < want for have, want in zip(values.shape, dims[info.name], strict=True)):
            return {}
        cut[info.name] = values[tuple(slice(size) for size in dims[info.name])].astype(info.dtype, copy=False)
    return cut


def _batch(model: ServedModel, profile: Profile, max_batch_size: int) -> int:
    usual = [profile[info.name].opt[0] for info in model.inputs if profile[info.name].opt]
    return max(1, min([*usual, max_batch_size])) if max_batch_size else 1
