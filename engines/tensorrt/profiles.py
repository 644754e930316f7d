"""Optimization profiles: for every input with a dynamic shape the smallest, the usual and the largest shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import kv_cache
from pipeline.errors import RecipeError
from pipeline.types import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """The shapes that one input may have; kernels are chosen for ``opt``."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = dict[str, ShapeRange]
"""Input name to its range. An engine may have several profiles and runs in one at a time."""


def derive(
    inputs: Sequence[TensorInfo], shapes: Mapping[str, tuple[int, ...]], *, max_batch_size: int = 0
) -> tuple[Profile, ...]:
    """Return the one profile that covers batches from 1 to the largest, other free dimensions from 1 to their usual size.

    The past of a key-value cache begins at 0, which is prefill.

    Args:
        inputs: The model's inputs; the first axis is the batch where its size is free.
        shapes: A usual shape for every input: a calibration batch's.
        max_batch_size: The largest batch to serve; 0 takes the usual one.

    Raises:
        RecipeError: A usual shape is missing or contradicts the model.
    """
    profile: Profile = {}
    for info in inputs:
        usual = shapes.get(info.name)
        if usual is None or len(usual) != len(info.shape):
            raise RecipeError(
                f"No shape of {len(info.shape)} dimensions is known for the input {info.name!r}.",
                where="builder.profiles",
                fix="Give calibration or validation data, or builder.profiles.",
            )
        least, opt, most = [], [], []
        for axis, (size, given) in enumerate(zip(info.shape, usual, strict=True)):
            if isinstance(size, int):
                low = high = best = size
            else:
                low = least_size(info, axis)
                best, high = given, (max_batch_size or given) if axis == 0 else given
            least.append(low)
            opt.append(min(best, high))
            most.append(high)
        profile[info.name] = ShapeRange(min=tuple(least), opt=tuple(opt), max=tuple(most))
    return (profile,)


def check_profiles(profiles: Sequence[Profile], inputs: Sequence[TensorInfo], *, max_batch_size: int = 0) -> None:
    """Refuse profiles that do not fit the model.

    Raises:
        RecipeError: An input is missing or unknown, a dimension is fixed to another size, an end is out of order, or no
            profile takes the largest batch that is served.
    """
    names = {info.name for info in inputs}
    for index, profile in enumerate(profiles):
        where = f"builder.profiles[{index}]"
        if set(profile) != names:
            odd = sorted(set(profile) ^ names)
            raise RecipeError(
                f"The profile and the model disagree on the inputs {', '.join(odd)}.",
                where=where,
                fix=f"Name exactly {', '.join(sorted(names))}.",
            )
        for info in inputs:
            _check_range(profile[info.name], info, where)
    free = [i.name for i in inputs if i.shape and not isinstance(i.shape[0], int)]
    if (
        profiles
        and max_batch_size
        and free
        and not any(p[n].max[0] >= max_batch_size for p in profiles for n in free[:1])
    ):
        raise RecipeError(
            f"No profile takes a batch of {max_batch_size}, which triton.max_batch_size promises.",
            where="builder.profiles",
            fix="Raise a profile's largest batch, or lower triton.max_batch_size.",
        )


def _check_range(given: ShapeRange, info: TensorInfo, where: str) -> None:
    ends = (given.min, given.opt, given.max)
    if any(len(end) != len(info.shape) for end in ends):
        raise RecipeError(
            f"Input {info.name} has {len(info.shape)} dimensions.", where=where, fix=f"Its shape is {list(info.shape)}."
        )
    for axis, size in enumerate(info.shape):
        low, best, high = (end[axis] for end in ends)
        if isinstance(size, int) and (low, best, high) != (size, size, size):
            raise RecipeError(
                f"Input {info.name} has a fixed size of {size} in dimension {axis}.", where=where, fix=f"Write {size}."
            )
        if not least_size(info, axis) <= low <= best <= high:
            raise RecipeError(
                f"Input {info.name}: min {low}, opt {best}, max {high} in dimension {axis} are not in order.",
                where=where,
                fix="Every dimension needs 0 < min <= opt <= max (a cache's past may begin at 0).",
            )


def least_size(info: TensorInfo, axis: int) -> int:
    """Return the least size of a free dimension: 1, or 0 for the length of a key-value cache."""
    return 0 if kv_cache.is_past(info.name) and axis == 2 else 1
