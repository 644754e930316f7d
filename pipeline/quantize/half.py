"""FP16 everywhere but in the islands that the plan keeps in FP32: a strongly typed graph, its inputs and outputs as before.

Casts stand only where the type changes, one for each tensor and type. Constants are cast by value and saturate at
±65504, so that an attention mask of the most negative float stays finite and a fully masked row gives no NaN.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.policy.plan import PrecisionPlan
from pipeline.types import Precision

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

# Inputs that ONNX types as float32 whatever the data's type.
_ALWAYS_FLOAT = {"Resize": (1, 2)}
# Operators without an FP16 form in ONNX or whose float attribute decides their type in ways not handled here.
_NO_HALF = ("NonMaxSuppression", "RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "MelWeightMatrix",
            "HannWindow", "HammingWindow", "BlackmanWindow", "DFT", "STFT", "StringNormalizer", "TfIdfVectorizer")  # fmt: skip


def cast_to_half(model: ir.Model, plan: PrecisionPlan) -> None:
    """Give every float32 tensor of ``model`` the type its plan asks for; changes the graph in place.

    A node computes in FP32 if its entry in ``plan`` says so, if it has a subgraph, or if it is of a custom domain;
    every other one, Q/DQ pairs included, in FP16. Scales of Q/DQ pairs were made in FP16 already.
    """
    _Caster(model, plan).run()


class _Caster:
    def __init__(self, model: ir.Model, plan: PrecisionPlan) -> None:
        self.graph = model.graph
        self.precisions = plan.precisions()
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}
        self.constants: dict[str, ir.Value] = {}
        self.names = {v.name for n in model.graph.all_nodes() for v in n.outputs} | set(model.graph.initializers)
        self.names |= {v.name for v in model.graph.inputs}

    def run(self) -> None:
        for node in list(self.graph):
            self._node(node)
        self._outputs()
        used = {v.name for n in self.graph.all_nodes() for v in n.inputs if v is not None}
        used |= {v.name for v in self.graph.outputs}
        for name in [n for n in self.graph.initializers if n not in used]:
            del self.graph.initializers[name]

    def _wanted(self, node: ir.Node) -> ir.DataType:
        island = (
            self.precisions.get(node.name or "") is Precision.FP32
            or node.domain not in ("", "ai.onnx")
            or node.op_type in _NO_HALF
            or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        )
        return FLOAT if island else HALF

    def _node(self, node: ir.Node) -> None:
        wanted = self._wanted(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, HALF) or index in _ALWAYS_FLOAT.get(node.op_type, ()):
                continue
            if value.dtype is not wanted:
                node.replace_input_with(index, self._as(value, wanted, node))
        for output in node.outputs:
            if output.dtype is FLOAT and wanted is HALF:
                output.dtype = HALF
        if wanted is HALF:
            _retype_attributes(node)

    def _as(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.is_initializer() and dtype is HALF:
            return self._constant(value)
        key = (value.name or "", dtype)
        if key not in self.casts:
            name = self._free(f"{value.name}_{'fp16' if dtype is HALF else 'fp32'}")
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
                lambda: ir.tensor(_saturate(source.numpy())), dtype=HALF, shape=ir.Shape(source.shape.numpy())
            )
            half = ir.Value(name=self._free(f"{name}_fp16"), shape=value.shape, type=ir.TensorType(HALF))
            half.const_value = lazy
            self.graph.register_initializer(half)
            self.constants[name] = half
        return self.constants[name]

    def _outputs(self) -> None:
        for index, value in enumerate(self.graph.outputs):
            if value.dtype is not HALF or value.producer() is None:
                continue
            producer, name = value.producer(), value.name
            assert producer is not None
            value.name = self._free(f"{name}_fp16")
            node = ir.node("Cast", [value], attributes={"to": FLOAT.value}, name=self._free(f"{name}_Cast"))
            node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, FLOAT, value.shape
            self.graph.append(node)
            self.graph.outputs[index] = node.outputs[0]

    def _free(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self.names:
            candidate, n = f"{name}_{n}", n + 1
        self.names.add(candidate)
        return candidate


def _retype_attributes(node: ir.Node) -> None:
    if node.op_type in ("Cast", "EyeLike", "RandomNormalLike", "RandomUniformLike"):
        key = "to" if node.op_type == "Cast" else "dtype"
        attribute = node.attributes.get(key)
        if attribute is not None and attribute.as_int() == FLOAT.value:
            node.attributes[key] = ir.AttrInt64(key, HALF.value)
    if node.op_type == "ConstantOfShape":
        attribute = node.attributes.get("value")
        array = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
        if array.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_saturate(array)))


def _saturate(
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    limit = np.float32(np.finfo(np.float16).max)
    return np.clip(array, -limit, limit).astype(np.float16)
