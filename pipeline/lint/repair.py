"""Changes to a graph that are safe: what they leave computes the same, or comes closer to the float model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from pipeline.graph.passes.constants import ValueNames, add_constant, become_constant, lazy, read
from pipeline.graph.passes.strip_quantization import dequantize
from pipeline.lint.operators import MOVES
from pipeline.lint.qdq_graph import LONGEST_WALK, QdqGraph
from pipeline.lint.quantizer import DEQUANTIZE, Quantizer
from pipeline.lint.rule import Hit
from pipeline.types import Array


def drop_unread(graph: QdqGraph, hit: Hit) -> bool:
    """Remove a Q or DQ that nothing reads."""
    node = hit.node
    if node.outputs[0].uses() or node.outputs[0].is_graph_output() or node.graph is None:
        return False
    node.graph.remove(node, safe=True)
    return True


def dequantize_constant(graph: QdqGraph, hit: Hit) -> bool:
    """Replace a DQ of a constant by the float values that it makes (of a constant behind a Q: by that constant)."""
    q = graph.quantizers[hit.node]
    source = q.data.producer()
    if source is not None and source in graph.quantizers:
        return _readers_take(q, graph.quantizers[source].data, graph)
    stored, scale = graph.stored(q.data), graph.stored(q.scale.value)
    zero = None if q.zero_point is None else graph.stored(q.zero_point.value)
    unknown = q.zero_point is not None and zero is None
    if stored is None or scale is None or unknown or q.output.is_graph_output() or q.output_dtype is not None:
        return False

    def compute() -> Array:
        zeros = None if zero is None else zero.numpy()
        return dequantize(read(stored), scale.numpy(), zeros, axis=q.axis, block_size=q.block_size)

    shape = [int(d) for d in stored.shape.numpy()]
    become_constant(graph.model, q.node, lazy(compute, scale.dtype, shape, q.output.name or ""))
    return True


def _readers_take(q: Quantizer, value: ir.Value, graph: QdqGraph) -> bool:
    if graph.dtype(value) is not q.made or q.output.is_graph_output():
        return False
    for user, index in q.output.uses():
        user.replace_input_with(index, value)
    return True


def bypass(graph: QdqGraph, reader: ir.Node, index: int) -> bool:
    """Let one input of a node read what was quantized instead of what was dequantized.

    Nodes between the DQ and ``reader`` that only move values read it too, so they must have no other reader.
    """
    for _ in range(LONGEST_WALK):
        value = reader.inputs[index]
        producer = None if value is None else value.producer()
        if value is None or producer is None:
            return False
        if producer.op_type == DEQUANTIZE and producer in graph.quantizers:
            before = graph.quantizers[producer].data.producer()
            if before is None or before not in graph.quantizers:
                return False
            source = graph.quantizers[before].data
            if graph.dtype(source) is not graph.quantizers[producer].made:
                return False
            reader.replace_input_with(index, source)
            return True
        if producer.op_type not in MOVES or producer.op_type == "Concat" or len(value.uses()) != 1:
            return False
        reader, index = producer, 0
    return False


def rescale(graph: QdqGraph, q: Quantizer, scale: float) -> bool:
    """Give a Q and all of its DQs one new scale; only where nothing else reads what the Q makes."""
    pairs = [user for user, _ in q.output.uses()]
    if any(user not in graph.quantizers for user in pairs) or q.output.is_graph_output() or q.scale.dtype is None:
        return False
    array = np.full([d or 1 for d in q.scale.shape or ()], scale, dtype=q.scale.dtype.numpy())
    name = ValueNames(graph.model).fresh(f"{q.data.name}_shared_scale")
    value = add_constant(graph.model.graph, name, ir.tensor(array, name=name))
    for node in (q.node, *pairs):
        node.replace_input_with(1, value)
    return True


def silence_dead_channels(graph: QdqGraph, hit: Hit) -> bool:
    """Store 0 with the scale 1 where a weight's scale is 0: both say 0, and this one TensorRT takes."""
    q = graph.quantizers[hit.node]
    stored, scale, array = graph.stored(q.data), graph.stored(q.scale.value), q.scale.array
    if (
        q.quantizes
        or stored is None
        or scale is None
        or array is None
        or np.any(array < 0)
        or not np.isfinite(array).all()
    ):
        return False
    dead = array == 0

    def compute() -> Array:
        ones = np.ones(stored.shape.numpy(), dtype=np.float32)
        alive = dequantize(ones, (~dead).astype(np.float32), None, axis=q.axis, block_size=q.block_size)
        return np.where(alive > 0, read(stored), np.zeros((), dtype=stored.dtype.numpy()))

    names = ValueNames(graph.model)
    shape = [int(d) for d in stored.shape.numpy()]
    quiet = lazy(compute, stored.dtype, shape, names.fresh(f"{q.data.name}_silent"))
    raised = np.where(dead, 1.0, array).astype(scale.dtype.numpy()).reshape(scale.shape.numpy())
    base = names.fresh(f"{q.scale.value.name}_positive")
    q.node.replace_input_with(0, add_constant(graph.model.graph, quiet.name or "", quiet))
    q.node.replace_input_with(1, add_constant(graph.model.graph, base, ir.tensor(raised, name=base)))
    return True


def any_of(done: Iterable[bool]) -> bool:
    """Return whether any change was made, after trying them all."""
    return any([*done])
