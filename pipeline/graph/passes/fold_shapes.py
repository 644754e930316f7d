"""Replace questions about shapes whose answer is known by the answer."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from pipeline.graph.passes.constants import become_constant, ints_of
from pipeline.graph.passes.graph_pass import GraphPass, int_attribute, is_op, visible_nodes

END = np.iinfo(np.int64).max


class FoldShapes(GraphPass):
    """Fold Shape and Size of static shapes, and a Gather or Slice that picks static dimensions of a Shape."""

    name = "fold-shapes"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes folded. Shapes must have been inferred."""
        count = 0
        for node in list(visible_nodes(model)):
            answer = None if not node.outputs or node.outputs[0].is_graph_output() else _answer(node)
            if answer is not None:
                become_constant(model, node, ir.Tensor(answer))
                count += 1
        return count


def _answer(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    if is_op(node, "Shape"):
        dims = _dims(node)
        return None if dims is None or None in dims else np.array(dims, dtype=np.int64)
    source = node.inputs[0] if node.inputs else None
    if is_op(node, "Size") and source is not None and source.shape is not None and source.shape.is_static():
        return np.array(math.prod(source.shape.numpy()), dtype=np.int64)
    asked = source.producer() if source is not None else None
    if asked is None or not is_op(asked, "Shape"):
        return None
    dims = _dims(asked)
    if dims is None:
        return None
    if is_op(node, "Gather"):
        return _gather(node, dims)
    return _slice(node, dims) if is_op(node, "Slice") else None


def _dims(node: ir.Node) -> list[int | None] | None:
    """Return what a Shape node yields, ``None`` for a dimension that is not static."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    dims = [d if isinstance(d, int) else None for d in value.shape]
    return dims[int_attribute(node, "start", 0) : int_attribute(node, "end", END)]


def _gather(node: ir.Node, dims: list[int | None]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    indices = node.inputs[1]
    wanted = ints_of(indices)
    if (
        wanted is None
        or indices is None
        or indices.shape is None
        or any(not -len(dims) <= i < len(dims) for i in wanted)
    ):
        return None
    picked = [dims[i] for i in wanted]
    return None if None in picked else np.array(picked, dtype=np.int64).reshape(indices.shape.numpy())


def _slice(node: ir.Node, dims: list[int | None]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    starts, ends = ints_of(node.inputs[1]), ints_of(node.inputs[2])
    steps = ints_of(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
    if starts is None or ends is None or steps != (1,):
        return None
    picked = dims[starts[0] : ends[0]]
    return None if None in picked else np.array(picked, dtype=np.int64)
