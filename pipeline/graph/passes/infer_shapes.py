"""Infer the type and shape of every tensor, without looking at weights, and fail where the graph contradicts itself."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.shape_inference
import onnx_ir as ir

from pipeline.errors import ModelError
from pipeline.graph.passes.graph_pass import GraphPass, is_op
from pipeline.graph.passes.without_weights import without_weights
from pipeline.notices import notice

GEMMS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


class InferShapes(GraphPass):
    """Infer shapes anew (what the file says of inner tensors is used only where inference says nothing)."""

    name = "infer-shapes"

    def __init__(self) -> None:
        super().__init__()
        self.contradiction = ""

    def change(self, model: ir.Model) -> int:
        """Return the number of values whose type or shape became known."""
        values = {
            value.name: value
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            for value in node.outputs
            if value.name and not value.is_graph_output()
        }
        said = {name: (value.type, value.shape) for name, value in values.items()}
        for value in values.values():
            producer = value.producer()
            if producer is not None and producer.domain == "":
                value.type = value.shape = None
        with without_weights(model) as proto:
            inferred = self._infer(proto)
        for info in _infos(inferred.graph):
            if info.name in values:
                values[info.name].type = ir.serde.deserialize_type_proto_for_type(info.type)
                values[info.name].shape = ir.serde.deserialize_type_proto_for_shape(info.type)
        for name, value in values.items():
            if value.type is None:
                value.type = said[name][0]
            if value.shape is None:
                value.shape = said[name][1]
        return sum(1 for name, value in values.items() if (value.type, value.shape) != said[name])

    def _infer(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """Infer strictly first, to learn of contradictions; then whatever can be inferred."""
        self.contradiction = ""
        try:
            return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=True, data_prop=True)
        except Exception as error:  # InferenceError has no public base in every onnx version
            self.contradiction = " ".join(str(error).split())[:300]
        try:
            return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
        except Exception as error:  # see above
            raise ModelError(
                f"The shapes in the graph contradict each other: {' '.join(str(error).split())[:300]}",
                fix="Run `onnx.checker.check_model(path, full_check=True)` and export the model again.",
            ) from error


class RequireShapes(InferShapes):
    """The same, and every matrix product and convolution must then know its operands' types and ranks."""

    name = "require-shapes"

    def change(self, model: ir.Model) -> int:
        """Return as :class:`InferShapes`; raise :class:`ModelError` for a contradiction that leaves ranks unknown."""
        count = super().change(model)
        unknown = [
            node
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
            if is_op(node, *GEMMS) and any(v is not None and (v.shape is None or v.dtype is None) for v in node.inputs)
        ]
        if unknown and self.contradiction:
            raise ModelError(
                f"Shape inference failed: {self.contradiction}",
                where=f"node {unknown[0].name!r} ({unknown[0].op_type}) has an operand of unknown shape",
                fix="Run `onnx.checker.check_model(path, full_check=True)` and export the model again.",
            )
        if unknown:
            notice(
                "unknown-shapes",
                f"{len(unknown)} matrix products or convolutions depend on shapes that only running the model tells "
                "(custom operators, control flow, data-dependent shapes); they stay in high precision.",
                where=f"first: {unknown[0].name}",
            )
        elif self.contradiction:
            notice("shape-inference", f"Shape inference is incomplete: {self.contradiction}")
        return count


def _infos(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    yield from graph.value_info
    yield from graph.output
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _infos(inner)
