"""The only place that loads or saves ONNX files.

Weights stay where they are: a loaded model holds memory-mapped external tensors or lazily computed ones, and saving
writes them one at a time, so memory follows the largest tensor and not the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pipeline.errors import ModelError, StoreError
from pipeline.stored_tensors import (
    LFS_POINTER,
    check_extent,
    check_size,
    external_size,
    external_tensors,
    location,
    tensors,
)
from pipeline.types import Array, TensorInfo

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what it warns of while it reads a model is an error below

EXTERNAL_DATA_THRESHOLD_BYTES = 1024
"""Initializers at least this large go to ``<name>.onnx.data``; smaller ones stay readable in the protobuf."""

CHUNK_BYTES = 16 << 20
"""Large tensors are streamed in pieces of this size."""

SIMULATION = "simulated_quantization_scheme"
"""Metadata key of a float graph with a scheme's rounding in it (:mod:`pipeline.quantize.simulate`); its value names the scheme."""


def load(path: Path) -> ir.Model:
    """Return the model at ``path``; weights are mapped, not read.

    Raises:
        ModelError: The file is missing, truncated or no ONNX model, is empty or cyclic, or names external data that
            is missing, too short or outside the model's folder.
    """
    proto = read_proto(path)
    if not proto.graph.output:
        raise ModelError("The graph has no outputs, so it computes nothing.", where=str(path))
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # what a malformed protobuf raises here is open-ended: KeyError, IndexError, …
        raise ModelError(
            f"The file is no valid ONNX model: {_first_line(_root(error))}",
            where=str(path),
            fix="Export it again and run `onnx.checker.check_model` on it.",
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.parent.resolve())
    _check_order(model, path)
    return model


def refuse_simulation(model: ir.Model, path: Path) -> None:
    """Refuse a model that only simulates a quantization scheme.

    Raises:
        ModelError: Names the scheme.
    """
    scheme = model.metadata_props.get(SIMULATION)
    if scheme is not None:
        raise ModelError(
            f"The model is a simulation of the scheme {scheme}: it computes in float what the scheme would round, "
            "and is no model to compile or publish.",
            where=str(path),
            fix="Start from the model that was simulated.",
        )


def _check_order(model: ir.Model, path: Path) -> None:
    """Refuse a value that nothing produces, and a cycle; put nodes that are merely out of order in order."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for output in graph.outputs:
            if output.producer() is None and not output.is_graph_input() and not output.is_initializer():
                raise _dangling(output, "The graph's output list", path)
        if not _ordered(graph, path):
            _sort(graph, path)


def _ordered(graph: ir.Graph, path: Path) -> bool:
    seen: set[ir.Value] = set()
    ordered = True
    for node in ir.traversal.RecursiveGraphIterator(graph, enter_graph=lambda g: seen.update(g.inputs)):
        for value in node.inputs:
            if value is None or value.is_initializer() or value in seen:
                continue
            if value.producer() is None and not value.is_graph_input():
                raise _dangling(value, f"Node {node.name or node.op_type!r}", path)
            ordered = False
        seen.update(node.outputs)
    return ordered


def _dangling(value: ir.Value, reader: str, path: Path) -> ModelError:
    return ModelError(
        f"{reader} names {value.name!r}, which nothing in the graph produces.",
        where=str(path),
        fix="Export the model again.",
    )


def _sort(graph: ir.Graph, path: Path) -> None:
    try:
        graph.sort()
    except ValueError as error:
        raise ModelError(
            "The graph has a cycle: a node depends on its own output.", where=str(path), fix="Export the model again."
        ) from error


def read(tensor: ir.TensorProtocol) -> Array:
    """Return a tensor's values; external ones are read, not mapped, so no page of them stays behind.

    Mapped pages count as resident memory until they are released, which fails while a view exists.
    """
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and tensor.size:
        dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
        with Path(tensor.path).open("rb") as stream:
            stream.seek(tensor.offset or 0)
            return np.fromfile(stream, dtype=dtype, count=tensor.size).reshape(tensor.shape.numpy())
    return tensor.numpy()


def chunks(tensor: ir.TensorProtocol, *, piece_bytes: int = CHUNK_BYTES) -> Iterator[Array]:
    """Yield a tensor's values flat, in pieces of at most ``piece_bytes``; external ones are read piece by piece."""
    step = max(1, piece_bytes * 8 // max(1, tensor.dtype.bitwidth))
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8 and tensor.size:
        dtype = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
        with Path(tensor.path).open("rb") as stream:
            stream.seek(tensor.offset or 0)
            for start in range(0, tensor.size, step):
                yield np.fromfile(stream, dtype=dtype, count=min(step, tensor.size - start))
        return
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def read_proto(path: Path) -> onnx.ModelProto:
    """Return the protobuf at ``path`` without its external data, whose entries are checked first.

    Raises:
        ModelError: As for :func:`load`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"The model cannot be read: {error.strerror or error}.", where=str(path), fix="Check the path."
        ) from error
    if not data:
        raise ModelError("The file is empty.", where=str(path), fix="Copy or export it again.")
    if data.startswith(LFS_POINTER):
        raise ModelError(
            "The file is a Git LFS pointer, not the model itself.", where=str(path), fix="Fetch it with `git lfs pull`."
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf raises DecodeError from a C extension whose class differs by version
        raise ModelError(
            "The file is truncated or is no ONNX model (its protobuf cannot be parsed).",
            where=str(path),
            fix="Copy or export it again.",
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise ModelError("The file holds no ONNX graph.", where=str(path), fix="Copy or export it again.")
    del data
    sizes: dict[str, int] = {}  # many tensors share a file, which is looked at once
    for tensor in tensors(proto):
        check_size(tensor, path)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            name = location(tensor)
            if name not in sizes:
                sizes[name] = external_size(tensor, path)
            check_extent(tensor, path, sizes[name])
    return proto


def save(model: ir.Model, path: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``model`` to ``path``, large initializers to ``<path>.data``; the same model gives the same bytes.

    The files are written beside their place and renamed when complete, so a failure leaves what was there before.

    Args:
        model: The model; lazy tensors are evaluated one at a time while writing.
        path: Where the ``.onnx`` file goes; its folder is made.
        progress: Called with (tensors written, tensors in all).

    Raises:
        StoreError: The disk is full or the folder cannot be written.
    """
    data = path.with_name(path.name + ".data")
    # onnx_ir writes the data file's name into the protobuf, so the pair is staged in a folder under its final names.
    staging = path.parent / f".{os.getpid()}.tmp-{path.name}"[:200]
    try:
        staging.mkdir(parents=True, exist_ok=True)
        ir.save(
            model,
            staging / path.name,
            external_data=data.name,
            size_threshold_bytes=EXTERNAL_DATA_THRESHOLD_BYTES,
            callback=(lambda _, info: progress(info.index + 1, info.total)) if progress else None,
        )
        if (staging / data.name).exists():
            (staging / data.name).replace(data)
        else:
            data.unlink(missing_ok=True)
        (staging / path.name).replace(path)
    except OSError as error:
        raise StoreError(
            f"The model could not be written: {error.strerror or error}.",
            where=str(path),
            fix="Free some disk space or choose another -o DIR.",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def files(path: Path) -> list[Path]:
    """Return the model file and every external data file it names, in a stable order."""
    names = sorted({location(tensor) for tensor in external_tensors(read_proto(path))})
    return [path, *(path.parent / name for name in names)]


def size_bytes(path: Path) -> int:
    """Return the size of the model with its external data."""
    return sum(file.stat().st_size for file in files(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of one file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inputs(model: ir.Model) -> tuple[TensorInfo, ...]:
    """Return the model's inputs without those that initializers provide."""
    return tuple(_info(value) for value in model.graph.inputs if value.name not in model.graph.initializers)


def outputs(model: ir.Model) -> tuple[TensorInfo, ...]:
    """Return the model's outputs."""
    return tuple(_info(value) for value in model.graph.outputs)


def _info(value: ir.Value) -> TensorInfo:
    if value.dtype is None:
        raise ModelError(
            "The graph does not say this tensor's type.",
            where=value.name or "?",
            fix="Export the model again with typed inputs and outputs.",
        )
    try:
        dtype = value.dtype.numpy()
    except TypeError:
        dtype = np.dtype(object)  # strings
    dims: tuple[int | str | None, ...] = ()
    if value.shape is not None:
        dims = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorInfo(name=value.name or "", dtype=dtype, shape=dims)


def _root(error: BaseException) -> BaseException:
    """Return the first cause: what onnx_ir raises in the end names only the graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
