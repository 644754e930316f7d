"""A Llama-shaped ONNX model of any size, in FP16 or FP32 with external data; its weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

VOCABULARY = 32000
HEAD = 128
TOKENS = 32
"""Positions that the model takes."""
POOL = 1 << 24
"""Normal values that are drawn once; every weight is cut from them, at an offset of its own."""
FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a model.

    Attributes:
        width: Features of a token, a multiple of 128.
        layers: Blocks.
    """

    width: int
    layers: int

    @property
    def ffn(self) -> int:
        """Return the features inside the FFN: 8/3 of the width, a multiple of 256."""
        return -(-8 * self.width // 3 // 256) * 256

    @property
    def parameters(self) -> int:
        """Return how many weights the matrices have, embedding and head included."""
        block = 4 * self.width**2 + 3 * self.width * self.ffn
        return self.layers * block + 2 * VOCABULARY * self.width


def shape_of(parameters: float) -> Shape:
    """Return the shape nearest to so many parameters, a layer for every 128 features: 6.7e9 is Llama 7B's."""
    shapes = (Shape(width=HEAD * layers, layers=layers) for layers in range(1, 129))
    return min(shapes, key=lambda shape: abs(shape.parameters - parameters))


def write(path: Path, shape: Shape, dtype: ir.DataType = FP16) -> None:
    """Write the model: input ``input_ids`` ``[batch, 32]`` int64, output ``logits`` ``[batch, 32, 32000]`` of ``dtype``."""
    made = _Writer(shape, dtype)
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", TOKENS]), type=ir.TensorType(ir.DataType.INT64))
    x = made.op("Gather", [made.weight("embed_tokens.weight", (VOCABULARY, shape.width)), ids], "/embed_tokens")
    for index in range(shape.layers):
        x = made.block(x, f"/layers.{index}")
    logits = made.linear(made.norm(x, "/norm"), VOCABULARY, "/lm_head")
    logits.name, logits.shape, logits.type = "logits", ir.Shape(["batch", TOKENS, VOCABULARY]), ir.TensorType(dtype)
    graph = ir.Graph([ids], [logits], nodes=made.nodes, initializers=made.weights, opset_imports={"": 21}, name="llama")
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


class _Writer:
    """Collects nodes and lazily made weights."""

    def __init__(self, shape: Shape, dtype: ir.DataType) -> None:
        self.shape, self.dtype, self.numpy = shape, dtype, dtype.numpy()
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self._pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
        angles = np.outer(np.arange(TOKENS), 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
        self._cos, self._sin = (
            self.constant(name, np.concatenate([part, part], axis=1).astype(self.numpy))
            for name, part in (("cos", np.cos(angles)), ("sin", np.sin(angles)))
        )
        self._mask = self.constant("mask", np.triu(np.full((TOKENS, TOKENS), -1e4, self.numpy), 1))

    def block(self, x: ir.Value, name: str) -> ir.Value:
        heads = self.shape.width // HEAD
        normed = self.norm(x, f"{name}/input_layernorm")
        parts = {}
        for part in ("q", "k", "v"):
            at = f"{name}/self_attn/{part}_proj"
            split = self.op(
                "Reshape", [self.linear(normed, self.shape.width, at), self.ints(0, 0, heads, HEAD)], f"{at}/Reshape"
            )
            parts[part] = self.op("Transpose", [split], f"{at}/Transpose", perm=[0, 2, 1, 3])
        q, k = (self.rotated(parts[part], f"{name}/self_attn/{part}_rotary") for part in ("q", "k"))
        at = f"{name}/self_attn"
        scores = self.op("MatMul", [q, self.op("Transpose", [k], f"{at}/k", perm=[0, 1, 3, 2])], f"{at}/scores")
        scaled = self.op("Mul", [scores, self.constant(f"{at}/scale", np.asarray(HEAD**-0.5, self.numpy))], f"{at}/Mul")
        shares = self.op("Softmax", [self.op("Add", [scaled, self._mask], f"{at}/masked")], f"{at}/softmax", axis=-1)
        mixed = self.op(
            "Transpose", [self.op("MatMul", [shares, parts["v"]], f"{at}/context")], f"{at}/merge", perm=[0, 2, 1, 3]
        )
        flat = self.op("Reshape", [mixed, self.ints(0, 0, self.shape.width)], f"{at}/flat")
        x = self.op("Add", [x, self.linear(flat, self.shape.width, f"{at}/o_proj")], f"{name}/residual1")
        normed, at = self.norm(x, f"{name}/post_attention_layernorm"), f"{name}/mlp"
        gate = self.linear(normed, self.shape.ffn, f"{at}/gate_proj")
        gated = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{at}/Sigmoid")], f"{at}/silu")
        inner = self.op("Mul", [gated, self.linear(normed, self.shape.ffn, f"{at}/up_proj")], f"{at}/Mul")
        return self.op("Add", [x, self.linear(inner, self.shape.width, f"{at}/down_proj")], f"{name}/residual2")

    def rotated(self, x: ir.Value, name: str) -> ir.Value:
        first = self.op("Slice", [x, self.ints(0), self.ints(HEAD // 2), self.ints(3)], f"{name}/first")
        second = self.op("Slice", [x, self.ints(HEAD // 2), self.ints(HEAD), self.ints(3)], f"{name}/second")
        turned = self.op("Concat", [self.op("Neg", [second], f"{name}/Neg"), first], f"{name}/turned", axis=-1)
        along = self.op("Mul", [x, self._cos], f"{name}/cos")
        return self.op("Add", [along, self.op("Mul", [turned, self._sin], f"{name}/sin")], f"{name}/Add")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Write an RMS norm as exporters do: computed in FP32."""
        wide = self.op("Cast", [x], f"{name}/Cast", to=int(FP32))
        square = self.op("Pow", [wide, self.constant(f"{name}.two", np.float32(2))], f"{name}/Pow")
        mean = self.op("ReduceMean", [square, self.ints(-1)], f"{name}/ReduceMean", keepdims=1)
        root = self.op(
            "Sqrt",
            [self.op("Add", [mean, self.constant(f"{name}.eps", np.float32(1e-5))], f"{name}/eps")],
            f"{name}/Sqrt",
        )
        narrow = self.op("Cast", [self.op("Div", [wide, root], f"{name}/Div")], f"{name}/narrow", to=int(self.dtype))
        return self.op(
            "Mul", [narrow, self.constant(f"{name}.weight", np.ones(self.shape.width, self.numpy))], f"{name}/Mul"
        )

    def linear(self, x: ir.Value, width: int, name: str) -> ir.Value:
        inner = self.shape.ffn if name.endswith("down_proj") else self.shape.width
        return self.op("MatMul", [x, self.weight(f"{name}.weight", (inner, width))], f"{name}/MatMul")

    def op(self, kind: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes or None, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, *values: int) -> ir.Value:
        return self.constant(f"ints{len(self.weights)}", np.asarray(values, np.int64))

    def constant(self, name: str, value: np.generic | np.ndarray) -> ir.Value:  # type: ignore[type-arg]
        return self._initializer(name, ir.tensor(np.asarray(value)))

    def weight(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Return a weight of deviation ``shape[0] ** -0.5``, made when it is written."""
        number = len(self.weights)

        def make() -> ir.TensorProtocol:
            pool = (np.roll(self._pool, number * 7919) * np.float32(shape[0] ** -0.5)).astype(self.numpy)
            return ir.tensor(np.resize(pool, shape))

        return self._initializer(name, ir.LazyTensor(make, dtype=self.dtype, shape=ir.Shape(shape), name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        return value
