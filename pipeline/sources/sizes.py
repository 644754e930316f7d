"""Which dimensions of the inputs are dynamic, and inputs of other sizes to check that they really are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.errors import SourceError
from pipeline.types import Array, Feeds

Dims = dict[str, dict[int, Any]]
"""Input name to axis to a name or a ``torch.export`` dimension."""


def default_dims(sample: Feeds) -> Dims:
    """Return axis 0 as ``batch`` for every input whose axis 0 has the first input's size."""
    first = [value.shape[0] for value in sample.values() if value.ndim]
    return {name: {0: "batch"} for name, value in sample.items() if value.ndim and value.shape[0] == first[0]}


def parse(given: Any, sample: Feeds, where: str) -> Dims:
    """Return a factory's ``dynamic_shapes`` (input name to axis to a name) after checking it.

    Raises:
        SourceError: It is no such mapping, or names an input or an axis that is not there.
    """
    fix = "Use {input name: {axis: dimension name}}; {} keeps every size fixed."
    if not isinstance(given, Mapping):
        raise SourceError(f"dynamic_shapes is a {type(given).__name__} and not a dict.", where=where, fix=fix)
    dims: Dims = {}
    for name, axes in given.items():
        if name not in sample:
            raise SourceError(
                f"dynamic_shapes names an input {name!r}; the inputs are {', '.join(sample)}.", where=where, fix=fix
            )
        if not isinstance(axes, Mapping):
            raise SourceError(f"dynamic_shapes[{name!r}] is no dict of axes.", where=where, fix=fix)
        for axis in axes:
            if not isinstance(axis, int) or not 0 <= axis < sample[name].ndim:
                raise SourceError(
                    f"dynamic_shapes gives input {name!r} an axis {axis!r}, but it has {sample[name].ndim} axes.",
                    where=where,
                    fix=fix,
                )
        dims[name] = {axis: dim for axis, dim in axes.items() if dim is not None and not isinstance(dim, int)}
    return dims


def label(dim: Any, name: str, axis: int) -> str:
    """Return the name that a dimension gets in the graph."""
    text = dim if isinstance(dim, str) else str(getattr(dim, "__name__", ""))
    return text if text.isidentifier() else f"{name}_{axis}"


def at_least_two(sample: Feeds, dims: Dims) -> Feeds:
    """Return ``sample`` with every dynamic axis at least 2 long, as torch takes a size of 1 for a constant."""
    return {
        name: resize(value, {axis: 2 for axis in dims.get(name, {}) if value.shape[axis] == 1})
        for name, value in sample.items()
    }


def others(sample: Feeds, dims: Dims) -> Feeds:
    """Return inputs with another size on every dynamic axis: a batch of 1, and 3 more elsewhere, within bounds."""
    sizes: dict[str, int] = {}
    for name, axes in dims.items():
        for axis, dim in axes.items():
            size = 1 if axis == 0 else sample[name].shape[axis] + 3
            low, high = getattr(dim, "min", 0), getattr(dim, "max", size)
            sizes.setdefault(label(dim, name, axis), max(low, min(size, high)))
    return {
        name: resize(value, {axis: sizes[label(dim, name, axis)] for axis, dim in dims.get(name, {}).items()})
        for name, value in sample.items()
    }


def resize(value: Array, sizes: Mapping[int, int]) -> Array:
    """Return ``value`` with the given sizes: its own values cut or repeated, so that they stay valid."""
    for axis, size in sizes.items():
        start = 1 if size < value.shape[axis] else 0  # not just the same values again
        value = np.take(value, (np.arange(size) + start) % value.shape[axis], axis=axis)
    return np.ascontiguousarray(value) if sizes else value
