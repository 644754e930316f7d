"""Whether arrays fit a model's inputs: names, types, ranks, fixed dimensions. Each misfit is an error that says where."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.types import Array, Feeds, TensorInfo

Shape = tuple[int, ...]
_INTEGERS = {np.dtype(np.int32), np.dtype(np.int64)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A model's inputs and how samples make up a batch of them.

    Attributes:
        inputs: The model's inputs.
        batch: The model's fixed batch dimension; ``None`` if it takes any.
        complete: The inputs share no batch axis (one is a scalar, or their fixed first dimensions differ or are
            0), so a sample is a complete set of inputs and a batch is one sample.
    """

    inputs: tuple[TensorInfo, ...]
    batch: int | None
    complete: bool

    @classmethod
    def of(cls, inputs: Sequence[TensorInfo]) -> Fit:
        """Return the fit for a model's inputs.

        Raises:
            DataError: The model has no inputs.
        """
        if not inputs:
            raise DataError("The model has no inputs, so there is nothing to feed it.", fix="Leave the data out.")
        first = {info.shape[0] for info in inputs if info.shape and isinstance(info.shape[0], int)}
        complete = len(first) > 1 or 0 in first or any(not info.shape for info in inputs)
        batch = next(iter(first)) if len(first) == 1 and not complete else None
        return cls(inputs=tuple(inputs), batch=batch, complete=complete)

    def batch_size(self, wanted: int) -> int:
        """Return the samples per batch: the model's fixed number, one complete set, or ``wanted``."""
        return 1 if self.complete else self.batch or wanted

    def sample_shape(self, info: TensorInfo) -> tuple[int | str | None, ...]:
        """Return the shape that one sample of an input has."""
        return info.shape if self.complete else info.shape[1:]

    def names(self, have: Iterable[str], where: str) -> None:
        """Check that every input is among ``have``.

        Raises:
            DataError: One is missing; names it, the nearest name there is, and all that there are.
        """
        found = sorted(have)
        for info in self.inputs:
            if info.name in found:
                continue
            near = difflib.get_close_matches(info.name, found, n=1, cutoff=0.5)
            hint = f"Rename {near[0]!r} to {info.name!r}." if near else f"Add an array named {info.name!r}."
            raise DataError(
                f"The model's input {info.name!r} is not in the data; it has {', '.join(map(repr, found)) or 'no arrays'}.",
                where=where,
                fix=hint,
            )

    def batched(self, shapes: Mapping[str, Shape], where: str) -> bool:
        """Return whether arrays of these shapes are several samples (one axis more than a sample) or exactly one.

        Raises:
            DataError: A rank fits neither, some are one sample and others several, or their numbers differ.
        """
        several = {info.name: self._several(info, shapes[info.name], where) for info in self.inputs}
        known = {name: value for name, value in several.items() if value is not None}
        if len(set(known.values())) > 1:
            one, many = (next(n for n, v in known.items() if v is w) for w in (False, True))
            raise DataError(
                f"{one!r} is one sample (shape {list(shapes[one])}), {many!r} is several (shape {list(shapes[many])}).",
                where=where,
                fix="Give every array the same leading samples axis.",
            )
        result = next(iter(known.values()), False)
        counts = {name: shape[0] for name, shape in shapes.items() if result and name in several}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name!r} {count}" for name, count in counts.items())
            raise DataError(
                f"The arrays hold different numbers of samples: {listed}.",
                where=where,
                fix="The first axis counts samples; make it equal in all arrays.",
            )
        return result

    def _several(self, info: TensorInfo, shape: Shape, where: str) -> bool | None:
        rank = len(self.sample_shape(info))
        if len(shape) in (rank, rank + 1):
            return len(shape) == rank + 1
        if not info.shape:  # a scalar, or a rank that the graph does not say: the other inputs decide
            return None
        raise DataError(
            f"{info.name!r} has {len(shape)} dimensions (shape {list(shape)}); the model's input is "
            f"{shown(info.shape)}, so a sample has {rank} and a batch {rank + 1}.",
            where=where,
            fix="Reshape the array; the first axis counts samples.",
        )

    def check(self, info: TensorInfo, dtype: np.dtype[Any], shape: Shape, where: str) -> None:
        """Check the type and shape of one sample of an input.

        Raises:
            DataError: The type cannot be converted safely, or rank or a fixed dimension differs.
        """
        if not convertible(dtype, info.dtype):
            if dtype.kind == "V":
                raise DataError(
                    f"{info.name!r} has no type that numpy knows ({dtype}): numpy files cannot hold bfloat16 or float8; "
                    f"the model takes {info.dtype}.",
                    where=where,
                    fix="Export the model with float32 or float16 inputs and save the array in that type.",
                )
            raise DataError(
                f"{info.name!r} is {dtype}; the model takes {info.dtype}.",
                where=where,
                fix=f"Convert it yourself, for example with .astype('{info.dtype}') after checking the values.",
            )
        wanted = self.sample_shape(info)
        if not info.shape:
            return
        if len(shape) != len(wanted):
            raise DataError(
                f"A sample of {info.name!r} has shape {list(shape)}; the model takes {shown(wanted)}.", where=where
            )
        for axis, (size, want) in enumerate(zip(shape, wanted, strict=True)):
            if isinstance(want, int) and size != want:
                raise DataError(
                    f"A sample of {info.name!r} has shape {list(shape)}: dimension {axis} is {size}, "
                    f"the model's is fixed at {want} ({shown(wanted)}).",
                    where=where,
                    fix="Resize, pad or transpose the data, or export the model with that dimension dynamic.",
                )

    def sample(self, arrays: Mapping[str, Array], where: str) -> Feeds:
        """Return one sample in the model's types, checked; arrays the model has no input for are left out."""
        feeds: Feeds = {}
        for info in self.inputs:
            self.check(info, arrays[info.name].dtype, arrays[info.name].shape, where)
            feeds[info.name] = convert(arrays[info.name], info, where)
        return feeds


def shown(shape: Sequence[int | str | None]) -> str:
    """Return a shape as people write it: ``[batch, 3, ?]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def convertible(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Return whether values convert safely: same type, int32 and int64 both ways, float64 to float32, text to text."""
    native = have.newbyteorder("=")
    if native == want or {native, want} <= _INTEGERS:
        return True
    text = native.kind == "U" and want.kind == "O"  # ONNX Runtime takes both for a string input
    return text or (native == np.float64 and want == np.float32)


def convert(array: Array, info: TensorInfo, where: str) -> Array:
    """Return ``array`` in the input's type.

    Raises:
        DataError: A value does not fit the narrower type.
    """
    if array.dtype == info.dtype or array.dtype.kind == "U":
        return array
    with np.errstate(over="ignore"):
        result = array.astype(info.dtype)
    lost = np.isinf(result) & ~np.isinf(array) if result.dtype.kind == "f" else result != array
    if np.any(lost):
        raise DataError(
            f"{info.name!r} holds {array[lost][0]}, which does not fit the model's {info.dtype}.",
            where=where,
            fix="Check the values, or export the model with a wider input type.",
        )
    return result
