"""Constant tensors of a graph: reading small ones, making new ones, computing large ones only while saving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from pipeline import model as files
from pipeline.types import Array

SMALL_BYTES = 1 << 20
"""Constants up to here are computed at once; larger ones become lazy tensors."""


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of a value that never changes (an initializer that is no input), else ``None``."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def array_of(value: ir.Value | None, *, limit: int = 4096) -> Array | None:
    """Return a constant's values if it has at most ``limit`` elements, else ``None``."""
    tensor = tensor_of(value)
    if tensor is None or tensor.size > limit or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """Return the value of a constant with one element."""
    array = array_of(value, limit=1)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def ints_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a small constant integer tensor as a tuple."""
    array = array_of(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(item) for item in array.reshape(-1))


def lazy(compute: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.LazyTensor:
    """Return a tensor whose values are computed each time it is read, so that only one is in memory at a time."""
    return ir.LazyTensor(
        lambda: ir.Tensor(np.asarray(compute(), order="C").reshape(shape), dtype=dtype),
        dtype=dtype,
        shape=ir.Shape(shape),
        name=name,
    )


def read(tensor: ir.TensorProtocol) -> Array:
    """Return a tensor's values without leaving mapped pages behind."""
    return files.read(tensor)


class ValueNames:
    """The names of all values in a model, to draw unused ones from."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = {
            value.name for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())
        }
        self._taken.update(o.name for n in ir.traversal.RecursiveGraphIterator(model.graph) for o in n.outputs)

    def fresh(self, base: str) -> str:
        """Return ``base``, or ``base_1``, ``base_2``, … if it is taken, and take it."""
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register ``tensor`` as an initializer of ``graph`` under ``name``, which must be free."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    tensor.name = name
    graph.register_initializer(value)
    return value


def become_constant(model: ir.Model, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    """Replace a node of one output by an initializer of the main graph, of the same name.

    The output must be no graph output; outer values are visible in subgraphs, so the node may be in one.
    """
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    assert output.name
    name, users = output.name, output.uses()
    output.name = None
    constant = add_constant(model.graph, name, tensor)
    for user, index in users:
        user.replace_input_with(index, constant)
    graph.remove(node, safe=True)
