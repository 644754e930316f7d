"""The only place that loads or saves ONNX files.

Weights stay where they are: a loaded model holds memory-mapped external tensors or lazily computed ones, and saving
writes them one at a time, so memory follows the largest tensor and not the model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from pipeline.errors import ModelError, StoreError
from pipeline.types import TensorInfo

EXTERNAL_DATA_THRESHOLD_BYTES = 1024
"""Initializers at least this large go to ``<name>.onnx.data``; smaller ones stay readable in the protobuf."""


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
    except (ValueError, TypeError, KeyError, RuntimeError, ir.serde.SerdeError) as error:
        raise ModelError(
            f"The file is no valid ONNX model: {_first_line(error)}",
            where=str(path),
            fix="Export it again and run `onnx.checker.check_model` on it.",
        ) from error
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, path.parent.resolve())
    return model


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
    for tensor in _external_tensors(proto):
        _check_external(tensor, path)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + ".data")
    # onnx_ir writes the data file's name into the protobuf, so the pair is staged in a folder under its final names.
    staging = path.parent / f".{path.name}.{os.getpid()}.tmp"
    staging.mkdir(exist_ok=True)
    try:
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
        for left in staging.iterdir():
            left.unlink()
        staging.rmdir()


def files(path: Path) -> list[Path]:
    """Return the model file and every external data file it names, in a stable order."""
    names = sorted({location(tensor) for tensor in _external_tensors(read_proto(path))})
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


def _external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    found: list[onnx.TensorProto] = []

    def walk(nodes: object, initializers: object) -> None:
        found.extend(t for t in initializers if t.data_location == onnx.TensorProto.EXTERNAL)  # type: ignore[attr-defined]
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                tensors = [attribute.t, *attribute.tensors] if attribute.HasField("t") else attribute.tensors
                found.extend(t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL)
                for graph in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                    walk(graph.node, graph.initializer)

    walk(proto.graph.node, proto.graph.initializer)
    for function in proto.functions:
        walk(function.node, [])
    return found


def location(tensor: onnx.TensorProto) -> str:
    """Return the external data file that ``tensor`` names, relative to the model's folder."""
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    name = location(tensor)
    where = f"{path}: initializer {tensor.name!r}, location {name!r}"
    folder = path.parent.resolve()
    target = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or not target.resolve().is_relative_to(folder):
        raise ModelError(
            "External data must stay inside the model's folder.",
            where=where,
            fix="Save the model again with its data beside it.",
        )
    if target.is_symlink():
        raise ModelError("External data may not be a symbolic link.", where=where, fix="Replace the link by the file.")
    if not target.is_file():
        raise ModelError("External data is missing.", where=where, fix=f"Put {name} beside the model.")
    fields = {e.key: e.value for e in tensor.external_data}
    try:
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", 0))
    except ValueError as error:
        raise ModelError(
            "External data has an offset or length that is no number.",
            where=where,
            fix="Save the model again.",
        ) from error
    if offset < 0 or length < 0 or offset + length > target.stat().st_size:
        raise ModelError(
            "External data is shorter than the model says.",
            where=where,
            fix="Copy it again; it may be truncated.",
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
