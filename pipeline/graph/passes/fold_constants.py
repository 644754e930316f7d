"""Compute once what depends on constants only.

Small constants are computed at once, in one ONNX Runtime session for the whole constant part of the graph: the
numerics are those of the runtime that would have computed them. Large ones (a transposed or cast weight) become lazy
tensors, computed while the model is saved, so that no two are in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from pipeline.errors import EngineError
from pipeline.graph.passes.constants import SMALL_BYTES, become_constant, ints_of, lazy, read, tensor_of
from pipeline.graph.passes.graph_pass import GraphPass, has_subgraph, int_attribute, is_random
from pipeline.running.session import run, session
from pipeline.types import Array

GROWTH_BYTES = 1 << 20
"""A folded tensor may be at most this much larger than its inputs: a broadcast must not fill the disk."""

FOLDABLE = frozenset(
    ["FLOAT", "FLOAT16", "DOUBLE", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL"]
)
NEVER = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Identity"})


class FoldConstants(GraphPass):
    """Replace nodes whose inputs are all constant by initializers."""

    name = "fold-constants"

    def change(self, model: ir.Model) -> int:
        """Return the number of nodes folded. Shapes must have been inferred; unknown ones are not folded."""
        count = _fold_small(model, _region(model.graph))
        for node in list(model.graph):
            count += _fold_large(model, node)
        return count


def _bytes(value: ir.Value) -> int | None:
    """Return the size that inference gives a value, ``None`` if unknown or of a type that is not folded."""
    if not isinstance(value.type, ir.TensorType) or value.shape is None or not value.shape.is_static():
        return None
    if value.type.dtype.name not in FOLDABLE:
        return None
    return int(np.prod(value.shape.numpy(), dtype=np.int64)) * value.type.dtype.bitwidth // 8


def _candidate(node: ir.Node, known: set[ir.Value]) -> tuple[int, int] | None:
    """Return (input bytes, output bytes) of a node that may be folded."""
    if node.op_type in NEVER or is_random(node) or has_subgraph(node):
        return None
    given = [value for value in node.inputs if value is not None]
    if any(tensor_of(v) is None and v not in known for v in given) or any(o.is_graph_output() for o in node.outputs):
        return None
    sizes = [_bytes(v) for v in given]
    made = [_bytes(v) for v in node.outputs if v.name]
    if not made or None in sizes or None in made:
        return None
    total_in, total_out = sum(s or 0 for s in sizes), sum(s or 0 for s in made)
    return (total_in, total_out) if total_out <= total_in + GROWTH_BYTES else None


def _region(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes, in order, that depend on small constants only."""
    known: set[ir.Value] = set()
    region = []
    for node in graph:
        size = _candidate(node, known)
        if size is not None and max(size) <= SMALL_BYTES:
            region.append(node)
            known.update(node.outputs)
    return region


def _fold_small(model: ir.Model, region: list[ir.Node]) -> int:
    if not region:
        return 0
    inside = set(region)
    wanted = [
        value
        for node in region
        for value in node.outputs
        if value.name and any(user not in inside for user in value.consumers())
    ]
    results = _evaluate(model, region, wanted)
    if results is None:  # one node that ONNX Runtime does not have: fold the others
        return 0 if len(region) == 1 else sum(_fold_small(model, [node]) for node in region if _still(node))
    for value, array in zip(wanted, results, strict=True):
        _replace(model, value, array)
    for node in reversed(region):
        model.graph.remove(node, safe=True)
    return len(region)


def _still(node: ir.Node) -> bool:
    return node.graph is not None and _candidate(node, set()) is not None


def _replace(model: ir.Model, value: ir.Value, array: Array) -> None:
    """Let the users of ``value`` read a new initializer of its name; the producing node stays, unused."""
    name, users = value.name, value.uses()
    value.name = None
    constant = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=value.type, const_value=ir.Tensor(array, name=name)
    )
    model.graph.register_initializer(constant)
    for user, index in users:
        user.replace_input_with(index, constant)


def _evaluate(model: ir.Model, nodes: Sequence[ir.Node], wanted: list[ir.Value]) -> list[Array] | None:
    """Compute ``wanted`` with ONNX Runtime as it stands; ``None`` if it cannot."""
    if not wanted:
        return []
    constants = {v.name: v for node in nodes for v in node.inputs if v is not None and tensor_of(v) is not None}
    graph = onnx.GraphProto(name="constants")
    graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    for name, value in constants.items():
        tensor = tensor_of(value)
        assert tensor is not None
        graph.initializer.append(ir.serde.serialize_tensor(ir.Tensor(np.asarray(read(tensor), order="C"), name=name)))
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in wanted)
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    try:
        live = session(proto.SerializeToString(), threads=1, optimize=False)
        return run(live, None, {})
    except EngineError:
        return None


def _fold_large(model: ir.Model, node: ir.Node) -> int:
    """Replace a node over large constants by a lazy tensor."""
    if node.domain or node.op_type not in LARGE or len(node.outputs) != 1:
        return 0
    size = _candidate(node, set())
    shape = node.outputs[0].shape
    compute = LARGE[node.op_type](node) if size is not None and max(size) > SMALL_BYTES else None
    tensors = [tensor_of(value) for value in node.inputs]
    first, dtype = tensors[0], node.outputs[0].dtype
    if compute is None or first is None or shape is None or dtype is None:
        return 0

    def values() -> Array:
        return compute([read(t) for t in tensors if t is not None])

    become_constant(model, node, lazy(values, dtype, [int(d) for d in shape.numpy()], ""))
    return 1


Compute = Callable[[list[Array]], Array]


def _transpose(node: ir.Node) -> Compute:
    perm = node.attributes.get("perm")
    axes = None if perm is None else tuple(perm.as_ints())
    return lambda arrays: np.transpose(arrays[0], axes)


def _cast(node: ir.Node) -> Compute | None:
    dtype = node.outputs[0].dtype
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    floats = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
    if dtype is None or not kinds <= floats:
        return None  # float to integer is undefined beyond the range
    target = dtype.numpy()
    return lambda arrays: arrays[0].astype(target)


def _same_values(node: ir.Node) -> Compute | None:
    return lambda arrays: arrays[0]  # the caller reshapes to the inferred shape


def _concat(node: ir.Node) -> Compute:
    axis = int_attribute(node, "axis", 0)
    return lambda arrays: np.concatenate(arrays, axis=axis)


def _elementwise(function: Callable[[Array, Array], Array]) -> Callable[[ir.Node], Compute | None]:
    def build(node: ir.Node) -> Compute | None:
        if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs):
            return None
        return lambda arrays: function(arrays[0], arrays[1])

    return build


def _slice(node: ir.Node) -> Compute | None:
    parts = [ints_of(value) for value in node.inputs[1:]]
    if len(parts) < 2 or any(part is None for part in parts):
        return None
    starts, ends = parts[0] or (), parts[1] or ()
    axes = parts[2] if len(parts) > 2 else tuple(range(len(starts)))
    steps = parts[3] if len(parts) > 3 else (1,) * len(starts)
    if axes is None or steps is None or any(step != 1 for step in steps):
        return None
    where = dict(zip(axes, (slice(a, b) for a, b in zip(starts, ends, strict=True)), strict=True))

    def compute(arrays: list[Array]) -> Array:
        rank = arrays[0].ndim
        cut = {axis % rank: part for axis, part in where.items()}
        return arrays[0][tuple(cut.get(i, slice(None)) for i in range(rank))]

    return compute


LARGE: dict[str, Callable[[ir.Node], Compute | None]] = {
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _same_values,
    "Flatten": _same_values,
    "Squeeze": _same_values,
    "Unsqueeze": _same_values,
    "Concat": _concat,
    "Slice": _slice,
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(np.divide),
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
}
"""How numpy computes each operator exactly as ONNX defines it; other operators over large constants stay."""
