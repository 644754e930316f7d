"""Remove nodes that return what they were given."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.graph.passes.constants import array_of, ints_of
from pipeline.graph.passes.graph_pass import GraphPass, int_attribute

FAR = 2**31 - 1
"""A Slice end from here on means "to the end"."""


class RemoveNoops(GraphPass):
    """Remove Identity, inference Dropout, and Cast, Reshape, Transpose, Slice, … that change nothing.

    Nodes that produce a graph output stay: the model's outputs were sealed by Identity nodes, which are undone last.
    """

    name = "remove-noops"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes removed."""
        count = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            source = node.inputs[0] if node.inputs else None
            if source is None or node.domain or node.graph is None or node.outputs[0].is_graph_output():
                continue
            if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
                continue
            if not _changes_nothing(node, source):
                continue
            output = node.outputs[0]
            source.type = source.type or output.type
            source.shape = output.shape if source.shape is None else source.shape
            output.replace_all_uses_with(source)
            node.graph.remove(node, safe=True)
            count += 1
        return count


def _changes_nothing(node: ir.Node, source: ir.Value) -> bool:
    output = node.outputs[0]
    match node.op_type:
        case "Identity":
            return True
        case "Dropout":
            flag = array_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
            return len(node.inputs) < 3 or node.inputs[2] is None or (flag is not None and not flag.any())
        case "Cast":
            return source.dtype is not None and source.dtype.value == int_attribute(node, "to", 0)
        case "Transpose":
            perm = node.attributes.get("perm")
            return perm is not None and list(perm.as_ints()) == list(range(len(perm.as_ints())))
        case "Concat" | "Sum" | "Max" | "Min" | "Mean":
            return len(node.inputs) == 1
        case "Reshape" | "Flatten" | "Expand" | "Squeeze" | "Unsqueeze" | "Tile":
            return _same_shape(source, output)
        case "Slice":
            return _whole(node, source, output)
        case "Pad":
            pads = ints_of(node.inputs[1]) if len(node.inputs) > 1 else None
            return pads is not None and not any(pads)
    return False


def _same_shape(source: ir.Value, output: ir.Value) -> bool:
    """Whether two shapes are equal for certain; one named dimension may be dynamic, the others must be numbers."""
    if source.shape is None or output.shape is None or len(source.shape) != len(output.shape):
        return False
    symbols = 0
    for a, b in zip(source.shape, output.shape, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            if a != b:
                return False
            continue
        if isinstance(a, int) or isinstance(b, int) or a.value is None or a.value != b.value:
            return False
        symbols += 1
    return symbols <= 1


def _whole(node: ir.Node, source: ir.Value, output: ir.Value) -> bool:
    parts = [ints_of(value) if value is not None else () for value in node.inputs[1:]]
    if len(parts) < 2 or any(part is None for part in parts):
        return False
    steps = parts[3] if len(parts) > 3 else ()
    if any(step != 1 for step in steps or ()):
        return False
    static = source.shape is not None and source.shape.is_static()
    if static and _same_shape(source, output):
        return True
    return all(start == 0 for start in parts[0] or ()) and all(end >= FAR for end in parts[1] or ())
