"""Rules of warm-up requests that need no engine to be seen."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig, type_name
from pipeline.triton.served import numpy_type
from pipeline.triton.warm_up import FOLDER


def check_warm_up(config: ModelConfig, warmup: ModelConfig, where: str) -> Iterator[Problem]:
    """Yield what is wrong with one warm-up request by itself."""
    inputs = {tensor.name: tensor for tensor in config.input}
    wrong = sorted(set(inputs) ^ set(warmup.inputs))
    if wrong:
        yield Problem(
            rule="warm-up-inputs",
            severity="error",
            where=where,
            message=f"The warm-up request and the configuration differ in the inputs {', '.join(wrong)}.",
            fix="Give each input once.",
        )
    largest = max(config.max_batch_size, 1)
    if not 1 <= warmup.batch_size <= largest:
        yield Problem(
            rule="warm-up-batch",
            severity="error" if warmup.batch_size else "warning",
            where=f"{where}: batch_size",
            message=f"A batch of {warmup.batch_size} does not lie between 1 and {largest}; the server skips a batch of 0.",
            fix="Set batch_size to 1.",
        )
    for name in sorted(set(inputs) & set(warmup.inputs)):
        yield from _warmup_input(inputs[name], warmup.inputs[name], f"{where}: {name!r}")


def _warmup_input(tensor: ModelConfig, data: ModelConfig, where: str) -> Iterator[Problem]:
    if data.data_type != tensor.data_type:
        yield Problem(
            rule="warm-up-type",
            severity="error",
            where=where,
            message=f"The warm-up data is {type_name(data.data_type)}, the input {type_name(tensor.data_type)}.",
            fix="Give both the same type.",
        )
    fits = len(data.dims) == len(tensor.dims) and all(
        d >= 1 and t in (d, -1) for d, t in zip(data.dims, tensor.dims, strict=True)
    )
    if not fits:
        yield Problem(
            rule="warm-up-dims",
            severity="error",
            where=where,
            message=f"The warm-up shape {list(data.dims)} does not fit the input's {list(tensor.dims)}.",
            fix="Give each dimension a size; it is the input's where that is fixed.",
        )
    if data.WhichOneof("input_data_type") != "input_data_file" and not data.zero_data:
        yield Problem(
            rule="warm-up-data",
            severity="warning",
            where=where,
            message="The warm-up request is random bytes: ids beyond the vocabulary, NaN and infinity.",
            fix="Use zero_data: true.",
        )


def check_data_files(folder: Path, config: ModelConfig, *, where: str) -> Iterator[Problem]:
    """Yield the data files of warm-up requests that are not there, or not of the size of the request.

    Args:
        folder: The model's folder.
        config: Its configuration.
        where: The configuration's file.
    """
    for warmup in config.model_warmup:
        for name, data in sorted(warmup.inputs.items()):
            path = folder / FOLDER / data.input_data_file
            dtype = numpy_type(type_name(data.data_type)) if data.data_type else None
            if not data.input_data_file or dtype is None or dtype.kind == "O" or any(d < 1 for d in data.dims):
                continue
            want, have = prod(data.dims) * dtype.itemsize, path.stat().st_size if path.is_file() else None
            if have != want:
                yield Problem(
                    rule="warm-up-data",
                    severity="error",
                    where=f"{where}: model_warmup {warmup.name!r}: {name!r}",
                    message=f"The data file {FOLDER}/{data.input_data_file} "
                    + (
                        "is not there."
                        if have is None
                        else f"has {have} bytes, the shape {list(data.dims)} needs {want}."
                    ),
                    fix="Write the raw values of one sample there, or use zero_data: true.",
                )
