"""Tensors as a protobuf stores them: where their values are, and whether they are whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from pipeline.errors import ModelError

LFS_POINTER = b"version https://git-lfs"
"""How the small text file begins that stands for a large one in a clone without Git LFS."""


def external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return those whose values are in a file of their own."""
    return [t for t in tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL]


def tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return every tensor of a model: initializers and attributes, inner graphs and functions included."""
    found: list[onnx.TensorProto] = []

    def walk(nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto]) -> None:
        found.extend(initializers)
        for node in nodes:
            for attribute in node.attribute:
                found.extend([attribute.t] if attribute.HasField("t") else [])
                found.extend(attribute.tensors)
                for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                    walk(graph.node, graph.initializer)

    walk(proto.graph.node, proto.graph.initializer)
    for function in proto.functions:
        walk(function.node, [])
    return found


def location(tensor: onnx.TensorProto) -> str:
    """Return the external data file that ``tensor`` names, relative to the model's folder."""
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def check_size(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse a tensor whose type is unknown or whose data is not as long as its shape says."""
    where = f"{path}: tensor {tensor.name!r}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except (ValueError, TypeError) as error:
        raise ModelError("A tensor has an unknown data type.", where=where, fix="Export the model again.") from error
    if dtype == ir.DataType.UNDEFINED or any(d < 0 for d in tensor.dims):
        raise ModelError("A tensor has no data type or a negative size.", where=where, fix="Export the model again.")
    wanted = nbytes(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        fields = {e.key: e.value for e in tensor.external_data}
        length = fields.get("length", "")
        given = int(length) if length.isdigit() and int(length) else wanted
    elif tensor.HasField("raw_data"):
        given = len(tensor.raw_data)
    else:
        _check_values(tensor, ir.DataType(tensor.data_type), where)
        return
    if given != wanted:
        raise ModelError(
            f"A tensor of {wanted} bytes by its shape has {given} bytes of data.",
            where=where,
            fix="Copy or export the model again; it may be truncated.",
        )


_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}
"""Where a tensor's values are if they are not raw bytes; the other types' are in ``int32_data``."""


def _check_values(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    """Refuse a tensor whose list of values is not as long as its shape says."""
    elements = math.prod(tensor.dims)
    wanted = 2 * elements if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else elements
    if dtype is not ir.DataType.STRING and dtype.bitwidth in (2, 4):  # several share a number
        wanted = math.ceil(elements * dtype.bitwidth / 8)
    given = len(getattr(tensor, _FIELDS.get(dtype, "int32_data")))
    if given != wanted:
        raise ModelError(
            f"A tensor of {wanted} values by its shape has {given}.",
            where=where,
            fix="Copy or export the model again; it may be truncated.",
        )


def nbytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor by its type and shape; strings count as none."""
    dtype = ir.DataType(tensor.data_type)
    return math.ceil(math.prod(tensor.dims) * (0 if dtype == ir.DataType.STRING else dtype.bitwidth) / 8)


def external_size(tensor: onnx.TensorProto, path: Path) -> int:
    """Return the bytes of the file that a tensor names, which must be an ordinary one inside the model's folder."""
    name = location(tensor)
    where = _external(tensor, path)
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
    with target.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                "External data is a Git LFS pointer, not the data itself.",
                where=where,
                fix="Fetch it with `git lfs pull`.",
            )
    if target.stat().st_nlink > 1:
        raise ModelError(
            "External data has several hard links, which could hide a file from outside.",
            where=where,
            fix="Copy the file instead of linking it.",
        )
    return target.stat().st_size


def _external(tensor: onnx.TensorProto, path: Path) -> str:
    return f"{path}: initializer {tensor.name!r}, location {location(tensor)!r}"


def check_extent(tensor: onnx.TensorProto, path: Path, file_bytes: int) -> None:
    """Refuse a tensor that lies outside its file of ``file_bytes``."""
    where = _external(tensor, path)
    fields = {e.key: e.value for e in tensor.external_data}
    try:
        offset, length = int(fields.get("offset", 0)), int(fields.get("length", 0)) or nbytes(tensor)
    except ValueError as error:
        raise ModelError(
            "External data has an offset or length that is no number.",
            where=where,
            fix="Save the model again.",
        ) from error
    if offset < 0 or length < 0 or offset + length > file_bytes:
        raise ModelError(
            "External data is shorter than the model says.",
            where=where,
            fix="Copy it again; it may be truncated.",
        )
