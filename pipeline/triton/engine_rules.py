"""Rules that compare a configuration with the ONNX engine it serves, as the onnxruntime backend does at load.

The comparison is the backend's own (``ValidateInputs``, ``ValidateOutputs`` and ``CompareDimsSupported`` in its
``onnxruntime.cc`` and ``onnxruntime_utils.cc``): an input may leave open or fix what the engine leaves open; an output
must say exactly what ONNX Runtime reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import EngineError
from pipeline.running.session import Session, run
from pipeline.triton.problem import Problem
from pipeline.triton.protobuf import ModelConfig, type_name
from pipeline.triton.served import TYPE_OF_ORT, numpy_type
from pipeline.triton.warm_up import FOLDER
from pipeline.types import Array, Feeds

if TYPE_CHECKING:
    import onnxruntime as ort

Shape = list[int]


class OnnxEngine:
    """A live session with its inputs and outputs: name to (Triton type, shape with -1 for open dimensions)."""

    def __init__(self, live: Session) -> None:
        self.live = live
        self.inputs = {v.name: _seen(v) for v in live.get_inputs()}
        self.outputs = {v.name: _seen(v) for v in live.get_outputs()}


def _seen(value: ort.NodeArg) -> tuple[str, Shape]:
    return TYPE_OF_ORT.get(value.type, value.type), [d if isinstance(d, int) else -1 for d in value.shape]


def check_against_engine(config: ModelConfig, engine: OnnxEngine, *, folder: Path, where: str) -> list[Problem]:
    """Return the differences between ``config`` and ``engine``, and what its warm-up requests do to the engine.

    Args:
        config: The model's configuration.
        engine: The engine.
        folder: The model's folder, which holds the data of warm-up requests.
        where: The configuration's file.
    """
    problems = [*_names(config, engine, where)]
    batched = config.max_batch_size > 0
    for kind, tensors, actual in (("input", config.input, engine.inputs), ("output", config.output, engine.outputs)):
        for tensor in tensors:
            if tensor.name in actual:
                problems += _tensor(tensor, actual[tensor.name], batched, kind == "output", f"{where}: {kind}")
    if not problems:
        problems += _warmups(config, engine, folder, where)
    return problems


def _names(config: ModelConfig, engine: OnnxEngine, where: str) -> Iterator[Problem]:
    inputs, outputs = {t.name for t in config.input}, {t.name for t in config.output}
    wrong = [*sorted(inputs ^ set(engine.inputs)), *sorted(outputs - set(engine.outputs))]
    if wrong or not outputs:
        yield Problem(
            rule="tensor-names",
            severity="error",
            where=where,
            message=f"Configuration and engine differ in {', '.join(map(repr, wrong)) or 'the outputs'}; "
            f"the engine has inputs {sorted(engine.inputs)} and outputs {sorted(engine.outputs)}.",
            fix="List every input, and only outputs that the engine has.",
        )


def _tensor(
    tensor: ModelConfig, actual: tuple[str, Shape], batched: bool, exact: bool, where: str
) -> Iterator[Problem]:
    kind, shape = actual
    where = f"{where} {tensor.name!r}"
    if type_name(tensor.data_type) != kind:
        yield Problem(
            rule="data-type",
            severity="error",
            where=where,
            message=f"The configuration says {type_name(tensor.data_type)}, the engine {kind}.",
            fix=f"Set data_type: {kind}.",
        )
    if batched and (not shape or shape[0] != -1):
        yield Problem(
            rule="max-batch-size",
            severity="error",
            where=where,
            message=f"max_batch_size is above 0, but the engine's shape {shape} has no open first dimension.",
            fix="Set max_batch_size: 0, or export the model with a dynamic batch dimension.",
        )
        return
    dims = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    wanted = shape[1:] if batched else shape
    scalar = not shape and all(d == 1 for d in dims)  # travels as [1]
    if not scalar and not _fits(dims, wanted, exact):
        yield Problem(
            rule="dims",
            severity="error",
            where=where,
            message=f"The configuration's shape {dims} is not the engine's {wanted}"
            f"{' (batch dimension left out)' if batched else ''}.",
            fix=f"Set dims: {wanted}.",
        )


def _fits(dims: Shape, engine: Shape, exact: bool) -> bool:
    return len(dims) == len(engine) and all(
        d == e or (e == -1 and not exact) for d, e in zip(dims, engine, strict=True)
    )


def _warmups(config: ModelConfig, engine: OnnxEngine, folder: Path, where: str) -> Iterator[Problem]:
    for warmup in config.model_warmup:
        feeds = _feeds(config, warmup, engine, folder)
        if feeds is None:
            continue
        try:
            run(engine.live, None, feeds)
        except EngineError as error:
            yield Problem(
                rule="warm-up-runs",
                severity="error",
                where=f"{where}: model_warmup {warmup.name!r}",
                message=f"The engine fails on the warm-up request: {error.what}",
                fix="Give the warm-up the shapes of a real sample, or delete it.",
            )


def _feeds(config: ModelConfig, warmup: ModelConfig, engine: OnnxEngine, folder: Path) -> Feeds | None:
    """Return the arrays of a warm-up request, ``None`` where it is random or does not fit the inputs (other rules say why)."""
    feeds: Feeds = {}
    for tensor in config.input:
        data = warmup.inputs.get(tensor.name)
        if data is None or any(d < 1 for d in data.dims) or warmup.batch_size < 1:
            return None
        values = _values(data, folder)
        if values is None:
            return None
        dims = list(tensor.reshape.shape if tensor.HasField("reshape") else data.dims)
        shape = [1, *dims] if config.max_batch_size > 0 else dims
        if not engine.inputs[tensor.name][1]:
            shape = []
        row = values.reshape(shape)
        feeds[tensor.name] = np.repeat(row, warmup.batch_size, axis=0) if config.max_batch_size > 0 else row
    return feeds


def _values(data: ModelConfig, folder: Path) -> Array | None:
    """Return the flat values of one input of a warm-up request, ``None`` where they are random, absent or of another size."""
    dtype, count = numpy_type(type_name(data.data_type)), prod(data.dims)
    if data.zero_data:
        return np.zeros(count, dtype)
    path = folder / FOLDER / data.input_data_file
    if not data.input_data_file or dtype.kind == "O" or not path.is_file():
        return None
    content = path.read_bytes()
    return np.frombuffer(content, dtype.newbyteorder("<")) if len(content) == count * dtype.itemsize else None
