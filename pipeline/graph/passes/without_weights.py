"""Call onnx's C++ functions on a model without its weights: they serialize it, and a protobuf ends at 2 GB."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir

KEPT_BYTES = 4096
"""Small initializers stay: shapes, axes and scales decide what onnx infers and converts."""


@contextlib.contextmanager
def without_weights(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """Yield the model's protobuf with large initializers turned into inputs; the model is unchanged afterwards."""
    graph = model.graph
    everything = list(graph.initializers.values())
    heavy = [v for v in everything if v.const_value is not None and v.const_value.nbytes > KEPT_BYTES]
    count = len(graph.inputs)
    tensors = [v.const_value for v in heavy]
    try:
        for value in heavy:
            assert value.name is not None
            graph.initializers.pop(value.name)
            value.const_value = None
            if not value.is_graph_input():
                graph.inputs.append(value)
        proto = ir.serde.serialize_model(model)
    finally:
        inputs = list(graph.inputs)[:count]
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        for value, tensor in zip(heavy, tensors, strict=True):
            value.const_value = tensor
        graph.initializers.clear()
        for value in everything:
            graph.initializers.add(value)
    yield proto


def through_onnx(model: ir.Model, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    """Replace the model's graph by what ``change`` makes of its protobuf, with the same weights."""
    inputs = len(model.graph.inputs)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    with without_weights(model) as proto:
        changed = ir.serde.deserialize_model(change(proto))
    graph = changed.graph
    kept = list(graph.inputs)[:inputs]
    extra = list(graph.inputs)[inputs:]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    for value in extra:
        value.const_value = tensors[value.name or ""]
        graph.initializers.add(value)
    model.graph = graph
    model.functions.clear()
    model.functions.update(changed.functions)
