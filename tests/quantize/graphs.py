"""Small float graphs with seeded weights, and an independent numpy fake-quantizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes, inputs, outputs, weights) -> Path:
    """Write a model of (name, shape) inputs and outputs, float32 but for names that start with ``ids`` (int64)."""

    def info(name: str, shape) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name.startswith("ids") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    infos = [info(n, s) for n, s in inputs]
    outs = [info(n, s) for n, s in outputs]
    initializers = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", infos, outs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def mlp(path: Path, *, gemm: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """x [b, 32] -> (MatMul + Add | Gemm) -> Relu -> MatMul -> y [b, 24]."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(size=(32, 48)).astype(np.float32),
        "b1": rng.normal(size=48).astype(np.float32),
        "w2": rng.normal(size=(48, 24)).astype(np.float32),
    }
    first = (
        [helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="up")]
        if gemm
        else [
            helper.make_node("MatMul", ["x", "w1"], ["m"], name="up"),
            helper.make_node("Add", ["m", "b1"], ["h"], name="bias"),
        ]
    )
    nodes = [
        *first,
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="down"),
    ]
    return save(path, nodes, [("x", ["b", 32])], [("y", ["b", 24])], weights), weights


def cnn(path: Path) -> Path:
    """x [b, 16, 12, 12] -> Conv+Relu -> Conv -> + skip -> Relu -> Conv -> y."""
    rng = np.random.default_rng(1)
    weights = {f"w{i}": (rng.normal(size=(16, 16, 3, 3)) / 12).astype(np.float32) for i in range(3)}
    weights |= {f"b{i}": rng.normal(size=16).astype(np.float32) for i in range(3)}
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="conv0", **conv),
        helper.make_node("Relu", ["c0"], ["r0"], name="relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="conv1", **conv),
        helper.make_node("Add", ["c1", "r0"], ["s"], name="skip"),
        helper.make_node("Relu", ["s"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["y"], name="conv2", **conv),
    ]
    shape = ["b", 16, 12, 12]
    return save(path, nodes, [("x", shape)], [("y", shape)], weights)


def fake_quantize(x: np.ndarray, low: float, high: float, *, symmetric: bool) -> np.ndarray:
    """The affine quantizer's formula, written out in float64."""
    if symmetric:
        scale = np.float32(max(-low, high) / 127)
        return np.clip(np.rint(x / scale), -128, 127) * float(scale)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * float(scale)


def fake_quantize_weight(w: np.ndarray) -> np.ndarray:
    """Symmetric INT8 per column."""
    scale = (np.abs(w).max(axis=0) / 127).astype(np.float32)
    return np.clip(np.rint(w / scale), -127, 127) * scale.astype(np.float64)
