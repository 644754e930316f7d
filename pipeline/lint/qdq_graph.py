"""The graph as the lint sees it: Q/DQ nodes, types as TensorRT gives them, and where quantized values come from and go.

Made in one pass over the nodes forwards and one backwards, so the lint is linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.target import Target
from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import all_nodes
from pipeline.graph.passes.infer_shapes import InferShapes
from pipeline.lint.operators import MOVES, SAME_TYPE, moved
from pipeline.lint.quantizer import DEQUANTIZE, Parameter, Quantizer, is_quantizer, numbers, quantizer, rounded
from pipeline.notices import notice
from pipeline.types import Array

MOST_ORIGINS = 8
"""Q nodes that are remembered behind one value: a Concat of more is not looked into."""
LONGEST_WALK = 16
"""Nodes that only move values, one after the other."""

Dims = tuple[int | None, ...]


class QdqGraph:
    """An index of a model.

    Args:
        model: The model; its shapes are inferred.
        target: Which GPU it is judged for; ``None`` for any.

    Attributes:
        model: The model.
        target: The target.
        opset: Version of the ONNX operator set.
        nodes: Every node, those of subgraphs and local functions included, in topological order.
        quantizers: The Q and DQ nodes among them.
    """

    def __init__(self, model: ir.Model, target: Target | None = None) -> None:
        try:
            InferShapes().change(model)
        except ModelError as error:
            notice("shape-inference", f"Rules that need shapes may miss something: {error.what}")
        self.model = model
        self.target = target
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        self.nodes: tuple[ir.Node, ...] = tuple(all_nodes(model))
        self.quantizers: dict[ir.Node, Quantizer] = {}
        self._constants: set[ir.Value] = set()
        self._arrays: dict[ir.Value, Array | None] = {}
        self._dtypes: dict[ir.Value, ir.DataType | None] = {}
        self._origins: dict[ir.Value, tuple[Quantizer, ...]] = {}
        for node in self.nodes:
            self._see(node)
        self._ends: dict[ir.Value, tuple[ir.Node, ...]] = {}

    def _see(self, node: ir.Node) -> None:
        read = [value for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (read and all(self.is_constant(v) for v in read) and not is_quantizer(node)):
            self._constants.update(node.outputs)
        if is_quantizer(node):
            found = quantizer(node, self.opset, self._parameter)
            self.quantizers[node] = found
            self._dtypes[found.output] = found.made
            if found.quantizes:
                self._origins[found.output] = (found,)
            return
        if node.op_type in SAME_TYPE and read:
            first = self.dtype(read[-1] if node.op_type == "Where" else read[0])
            for output in node.outputs:
                self._dtypes[output] = first or output.dtype
        sources = dict.fromkeys(q for value in moved(node) for q in self._origins.get(value, ()))
        for output in node.outputs if sources else ():
            self._origins[output] = tuple(sources)[:MOST_ORIGINS]

    def _parameter(self, value: ir.Value) -> Parameter:
        return Parameter(
            value=value,
            dtype=self.dtype(value),
            shape=self.shape(value),
            constant=self.is_constant(value),
            array=self.array(value),
            checked=self.stored(value) is not None,
        )

    def of_kind(self, *, quantizes: bool) -> Iterator[Quantizer]:
        """Yield the Q nodes, or the DQ nodes, in order."""
        return (q for q in self.quantizers.values() if q.quantizes is quantizes)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is known before the engine runs."""
        return value in self._constants or self.stored(value) is not None

    def stored(self, value: ir.Value) -> ir.TensorProtocol | None:
        """Return the tensor of an initializer or of a Constant node, else ``None``."""
        if value.is_graph_input():
            return None
        if value.is_initializer():
            return value.const_value
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            return None
        attribute = producer.attributes.get("value")
        return attribute.as_tensor() if attribute is not None else value.const_value

    def array(self, value: ir.Value) -> Array | None:
        """Return a small constant's values as float64; the importer sees through Identity and Cast, and so does this."""
        if value not in self._arrays:
            tensor, producer = self.stored(value), value.producer()
            found: Array | None = None
            if tensor is not None:
                found = numbers(tensor)
            elif producer is not None and producer.op_type in ("Identity", "Cast") and producer.inputs[0] is not None:
                found = self.array(producer.inputs[0])
                if found is not None and producer.op_type == "Cast" and value.dtype is not None:
                    found = rounded(found, value.dtype)
            self._arrays[value] = found
        return self._arrays[value]

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Return the type that TensorRT gives a value, where it is known."""
        if value in self._dtypes:
            return self._dtypes[value]
        tensor = self.stored(value)
        return tensor.dtype if tensor is not None else value.dtype

    def shape(self, value: ir.Value) -> Dims | None:
        """Return a value's shape; a dimension that only running tells is ``None``."""
        tensor = self.stored(value)
        if tensor is not None:
            return tuple(int(d) for d in tensor.shape.numpy())
        if value.shape is None:
            return None
        return tuple(d if isinstance(d, int) else None for d in value.shape)

    def origins(self, value: ir.Value) -> tuple[Quantizer, ...]:
        """Return the Q nodes whose values ``value`` holds, moved but not changed."""
        return self._origins.get(value, ())

    def dequantizer(self, value: ir.Value | None) -> Quantizer | None:
        """Return the DQ that ``value`` comes from, through nodes that only move values."""
        for _ in range(LONGEST_WALK):
            producer = None if value is None else value.producer()
            if producer is None:
                return None
            if producer.op_type == DEQUANTIZE and producer in self.quantizers:
                return self.quantizers[producer]
            if producer.op_type not in MOVES or not producer.inputs:
                return None
            value = producer.inputs[0]
        return None

    def readers(self, value: ir.Value) -> tuple[ir.Node, ...]:
        """Return the nodes that use a value, behind nodes that only move it; each once."""
        if value not in self._ends:
            found: dict[ir.Node, None] = {}
            pending, seen = [value], {value}
            while pending:
                for user, index in pending.pop().uses():
                    if user.op_type in MOVES and (index == 0 or user.op_type == "Concat"):
                        fresh = [o for o in user.outputs if o not in seen]
                        seen.update(fresh)
                        pending.extend(fresh)
                    else:
                        found[user] = None
            self._ends[value] = tuple(found)
        return self._ends[value]

    def leaves(self, value: ir.Value) -> bool:
        """Whether a value is an output of the graph, as it is or moved."""
        pending, seen = [value], {value}
        while pending:
            current = pending.pop()
            if current.is_graph_output():
                return True
            for user, index in current.uses():
                if user.op_type in MOVES and (index == 0 or user.op_type == "Concat"):
                    fresh = [o for o in user.outputs if o not in seen]
                    seen.update(fresh)
                    pending.extend(fresh)
        return False
