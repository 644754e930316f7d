"""A copy of the model whose outputs are the tensors to observe."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from pipeline.errors import DataError, ModelError
from pipeline.model import read_proto
from pipeline.stored_tensors import location
from pipeline.types import Array

_REARRANGING = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators whose output holds exactly the values of their first input, so that a histogram is the same."""

_LARGE_BYTES = 16 << 20

_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """What the collector must know about a model's graph.

    Attributes:
        path: The ``.onnx`` file.
        files: That file and its external data.
        inputs: Names of the graph's inputs that data must provide.
        constants: Names of its initializers.
        outputs: Names of its outputs.
        order: Position of every node output in the graph, by name.
        same_values: For the output of a rearranging node, the tensor it rearranges.
    """

    path: Path
    files: tuple[Path, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]
    constants: frozenset[str]
    order: dict[str, int]
    same_values: dict[str, str]

    def origin(self, tensor: str) -> str:
        """Return the first tensor that holds the same values in another arrangement."""
        while tensor in self.same_values:
            tensor = self.same_values[tensor]
        return tensor

    def check(self, tensors: Sequence[str]) -> None:
        """Refuse tensors that the graph does not have.

        Raises:
            ModelError: Names the tensor and the nearest right one.
        """
        for tensor in tensors:
            if tensor not in self.inputs and tensor not in self.constants and tensor not in self.order:
                near = difflib.get_close_matches(tensor, [*self.order, *self.inputs, *self.constants], n=1)
                raise ModelError(
                    "The graph has no such tensor.",
                    where=f"{self.path}: tensor {tensor}",
                    fix=f"Did you mean {near[0]}?" if near else "Name a tensor of the main graph.",
                )


def read_graph(path: Path) -> Graph:
    """Return what the collector must know about the model at ``path``; weights are not kept.

    Raises:
        ModelError: The file is missing or broken.
    """
    proto = read_proto(path)
    graph = proto.graph
    constants = frozenset(tensor.name for tensor in graph.initializer) | frozenset(
        tensor.values.name for tensor in graph.sparse_initializer
    )
    order = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    same_values = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type in _REARRANGING and node.domain in ("", "ai.onnx") and node.input and node.input[0]
    }
    return Graph(
        path=path,
        files=(path, *_external_files(proto, path.parent)),
        inputs=frozenset(value.name for value in graph.input) - constants,
        outputs=frozenset(value.name for value in graph.output),
        constants=constants,
        order=order,
        same_values=same_values,
    )


def expose(graph: Graph, tensors: Sequence[str]) -> bytes:
    """Return the model with ``tensors`` among its outputs, serialized.

    If its weights are in files of their own, they are the only outputs, and ONNX Runtime drops what they do not need.
    A file that holds its weights itself is not taken apart (that would cost as much as a batch): protobuf messages
    merge when one follows the other, so the outputs are added at the end.
    External data stays where it is: give the session the model's folder.
    """
    # Without a type: ONNX Runtime infers it, while a declared one that is out of date would be an error.
    if graph.path.stat().st_size > _LARGE_BYTES:
        added = [onnx.ValueInfoProto(name=name) for name in tensors if name not in graph.outputs]
        more = onnx.ModelProto(graph=onnx.GraphProto(output=added))
        return graph.path.read_bytes() + more.SerializeToString()
    proto = read_proto(graph.path)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    data: bytes = proto.SerializeToString()
    return data


def constant(path: Path, name: str) -> Array:
    """Return the value of an initializer.

    Raises:
        DataError: It does not hold floats.
    """
    for tensor in read_proto(path).graph.initializer:
        if tensor.name == name:
            if tensor.data_type not in _FLOATS:
                kind = onnx.TensorProto.DataType.Name(tensor.data_type)
                raise not_float(name, kind.lower())
            return np.asarray(onnx.numpy_helper.to_array(tensor, str(path.parent)))
    raise not_float(name, "a sparse tensor")


def not_float(tensor: str, kind: str) -> DataError:
    """Return the error for a tensor that has no range because it holds no floats."""
    return DataError(
        f"Statistics are made of float16, float32 or float64 values; this tensor is {kind}.",
        where=f"tensor {tensor}",
        fix="Leave it out of the requests.",
    )


def _external_files(proto: onnx.ModelProto, folder: Path) -> list[Path]:
    tensors = [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return [folder / name for name in sorted({location(tensor) for tensor in tensors})]
