"""Write small quantized graphs, right and wrong ones: nothing is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper

CODES = {T.INT8: 127, T.UINT8: 255, T.INT16: 127, T.UINT16: 127, T.INT32: 127, T.INT4: 7, T.UINT4: 15,
         T.FLOAT8E4M3FN: 4, T.FLOAT8E5M2: 4, T.FLOAT8E4M3FNUZ: 4, T.FLOAT8E5M2FNUZ: 4, T.FLOAT4E2M1: 6}  # fmt: skip
"""A large value that each quantized type holds exactly."""
UNSIGNED = {T.UINT8, T.UINT16, T.UINT4}


@dataclass
class Draft:
    """A graph that is being written; ``float_type`` is that of its tensors and scales."""

    rng: np.random.Generator
    float_type: int = T.FLOAT16
    opset: int = 23
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inits: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    count: int = 0

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}_{self.count}"

    def input(self, shape: tuple[int, ...], dtype: int | None = None) -> str:
        name = self.name("x")
        self.inputs.append(helper.make_tensor_value_info(name, self.float_type if dtype is None else dtype, shape))
        return name

    def constant(self, values: Any, dtype: int | None = None, via: str = "initializer") -> str:
        """Add a constant; ``via``: ``initializer``, ``constant`` (a node), ``identity``, ``cast`` (from FP32)."""
        array = np.asarray(values, np.float32)
        kind = self.float_type if dtype is None else dtype
        name = self.name("c")
        stored = T.FLOAT if via == "cast" else kind
        tensor = helper.make_tensor(name, stored, array.shape, array.reshape(-1).tolist())
        if via == "constant":
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
            return name
        self.inits.append(tensor)
        if via == "identity":
            return self.node("Identity", [name])
        return self.node("Cast", [name], to=kind) if via == "cast" else name

    def ints(self, *values: int) -> str:
        name = self.name("i")
        self.inits.append(helper.make_tensor(name, T.INT64, [len(values)], values))
        return name

    def node(self, op: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [self.name(op.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{names[0]}_node", domain=domain, **attributes))
        return names[0]

    def quantize(self, value: str, scale: str, zero: str | None = None, **attributes: Any) -> str:
        return self.node("QuantizeLinear", [value, scale, *([zero] if zero else [])], **attributes)

    def dequantize(self, value: str, scale: str, zero: str | None = None, **attributes: Any) -> str:
        return self.node("DequantizeLinear", [value, scale, *([zero] if zero else [])], **attributes)

    def pair(self, value: str, scale: Any = 0.02, dtype: int = T.INT8, zero: Any = 0, **attributes: Any) -> str:
        """Add a Q/DQ pair with constants of its own."""
        scales = self.constant(scale)
        zeros = self.constant(np.broadcast_to(zero, np.shape(scale)), dtype)
        return self.dequantize(self.quantize(value, scales, zeros, **attributes), scales, zeros, **attributes)

    def codes(self, shape: tuple[int, ...], dtype: int = T.INT8) -> npt.NDArray[np.float32]:
        """Return random values that the quantized type holds exactly."""
        top = CODES[dtype]
        if dtype in (T.FLOAT4E2M1, T.FLOAT8E4M3FN, T.FLOAT8E5M2, T.FLOAT8E4M3FNUZ, T.FLOAT8E5M2FNUZ):
            return self.rng.choice(np.array([-4, -2, -1, 0, 1, 2, 4], np.float32), shape)
        return self.rng.integers(0 if dtype in UNSIGNED else -top, top + 1, shape).astype(np.float32)

    def weight(self, shape: tuple[int, ...], dtype: int = T.INT8, axis: int | None = None) -> str:
        """Add a weight behind a DQ, with one scale, or one for each element of ``axis``."""
        scale = 0.01 if axis is None else self.rng.uniform(0.005, 0.02, shape[axis])
        attributes = {} if axis is None else {"axis": axis}
        return self.dequantize(self.constant(self.codes(shape, dtype), dtype), self.constant(scale), **attributes)

    def model(self, *outputs: tuple[str, int | None], shape: tuple[int, ...] | None = None) -> bytes:
        """Return the serialized model; an output is (name, type), the type ``None`` for the graph's float type."""
        made = [helper.make_tensor_value_info(n, self.float_type if t is None else t, shape) for n, t in outputs]
        graph = helper.make_graph(self.nodes, "draft", self.inputs, made, self.inits)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        version = 11 if self.opset >= 23 else 10
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=version).SerializeToString())
