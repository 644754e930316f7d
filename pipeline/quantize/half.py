"""FP16 or BF16 everywhere but in the islands that the plan keeps in FP32: a strongly typed graph, its inputs and outputs as before.

A key-value cache alone is an input and output in 16 bits, because nobody but the model reads it.

Casts stand only where the type changes, one for each tensor and type. Constants are cast by value and saturate at
FP16's ±65504, so that an attention mask of the most negative float stays finite and a fully masked row gives no NaN.
"""

from __future__ import annotations

import onnx_ir as ir

from pipeline import kv_cache
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.half_types import (
    FLOAT,
    HALF_TYPES,
    HalfTypes,
    has_subgraph,
    is_float,
    retype_attributes,
    saturated,
)
from pipeline.types import Precision


def cast_to_half(model: ir.Model, plan: PrecisionPlan) -> None:
    """Give every float32 tensor of ``model`` the type its plan asks for; changes the graph in place.

    A node computes in FP32 if its entry in ``plan`` says so, if it has a subgraph or reads a sequence, or if ONNX (or
    ONNX Runtime's CPU provider, where variants are checked) has no such form of it; every other one, Q/DQ pairs
    included, in ``plan.elsewhere``. Tensors that were FP16 before stay so. Scales of Q/DQ pairs have their type already.
    """
    _Caster(model, plan).run()


class _Caster:
    def __init__(self, model: ir.Model, plan: PrecisionPlan) -> None:
        self.graph = model.graph
        self.precisions = plan.precisions()
        self.half = HALF_TYPES[plan.elsewhere]
        self.types = HalfTypes(model.opset_imports.get("", 21), self.half)
        self.short = str(plan.elsewhere)
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}
        self.constants: dict[str, ir.Value] = {}
        self.names = {v.name for n in model.graph.all_nodes() for v in n.outputs} | set(model.graph.initializers)
        self.names |= {v.name for v in model.graph.inputs}
        self.halved: set[ir.Value] = set()

    def run(self) -> None:
        for value in self.graph.inputs:
            if kv_cache.is_past(value.name or "") and is_float(value, FLOAT):
                value.dtype = self.half
                self.halved.add(value)
        for node in list(self.graph):
            self._node(node)
        self._outputs()
        used = {v.name for n in self.graph.all_nodes() for v in n.inputs if v is not None}
        used |= {v.name for v in self.graph.outputs}
        for name in [n for n in self.graph.initializers if n not in used]:
            del self.graph.initializers[name]

    def _node(self, node: ir.Node) -> None:
        island = self.precisions.get(node.name or "") is Precision.FP32 or not self.types.exist(node)
        halves = frozenset[int]() if island else self.types.inputs(node)
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if index in halves and is_float(value, FLOAT):
                node.replace_input_with(index, self._as(value, self.half))
            elif index not in halves and value in self.halved:
                node.replace_input_with(index, self._as(value, FLOAT))
        if has_subgraph(node):
            self._captured(node)
        if not island:
            for index in self.types.outputs(node):
                if is_float(node.outputs[index], FLOAT):
                    node.outputs[index].dtype = self.half
                    self.halved.add(node.outputs[index])
            retype_attributes(node, self.half)

    def _captured(self, owner: ir.Node) -> None:
        """Let subgraphs, which stay FP32, read FP32 of what they take from the main graph."""
        for attribute in owner.attributes.values():
            graphs = (
                [attribute.as_graph()]
                if attribute.type is ir.AttributeType.GRAPH
                else attribute.as_graphs()
                if attribute.type is ir.AttributeType.GRAPHS
                else []
            )
            for graph in graphs:
                for node in ir.traversal.RecursiveGraphIterator(graph):
                    for index, value in enumerate(node.inputs):
                        if value is not None and value in self.halved:
                            node.replace_input_with(index, self._as(value, FLOAT))

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.is_initializer() and dtype is self.half:
            return self._constant(value)
        key = (value.name or "", dtype)
        if key not in self.casts:
            name = self._free(f"{value.name}_{'fp32' if dtype is FLOAT else self.short}")
            node = ir.node("Cast", [value], attributes={"to": dtype.value}, name=self._free(f"{name}_Cast"))
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, value.shape
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, [node])
            else:
                self.graph.insert_before(self.graph[0], [node])
            self.casts[key] = node.outputs[0]
        return self.casts[key]

    def _constant(self, value: ir.Value) -> ir.Value:
        name = value.name or ""
        if name not in self.constants:
            source = value.const_value
            assert source is not None
            lazy = ir.LazyTensor(
                lambda: ir.tensor(saturated(source.numpy(), self.half)),
                dtype=self.half,
                shape=ir.Shape(source.shape.numpy()),
            )
            half = ir.Value(name=self._free(f"{name}_{self.short}"), shape=value.shape, type=ir.TensorType(self.half))
            half.const_value = lazy
            self.graph.register_initializer(half)
            self.constants[name] = half
        return self.constants[name]

    def _outputs(self) -> None:
        for index, value in enumerate(self.graph.outputs):
            producer, name = value.producer(), value.name
            wanted = self.half if kv_cache.is_present(name or "") else FLOAT
            if value.dtype not in (self.half, FLOAT) or value.dtype is wanted or producer is None:
                continue
            if wanted is FLOAT and value not in self.halved:  # it was in 16 bits before
                continue
            value.name = self._free(f"{name}_computed")
            node = ir.node("Cast", [value], attributes={"to": wanted.value}, name=self._free(f"{name}_Cast"))
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, wanted, value.shape
            self.graph.append(node)
            self.graph.outputs[index] = node.outputs[0]

    def _free(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self.names:
            candidate, n = f"{name}_{n}", n + 1
        self.names.add(candidate)
        return candidate
