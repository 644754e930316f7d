"""Tiny models and in-memory data for the collector's tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Memory:
    """Batches held in memory."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches = batches
        self.read = 0

    def __len__(self) -> int:
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self.read += 1
        return iter([dict(batch) for batch in self.batches])

    def digest(self) -> str:
        return hashlib.sha256(b"".join(v.tobytes() for batch in self.batches for v in batch.values())).hexdigest()


def two_layers(path: Path, *, batch: int | str = "batch", external: bool = False) -> Path:
    """Write x [batch, 4, 6] -> MatMul -> Relu -> Reshape -> Transpose -> MatMul, and an int64 output; return the path."""
    random = np.random.default_rng(0)
    weights = {"w1": (6, 8), "w2": (4, 5)}
    initializers = [
        numpy_helper.from_array(random.standard_normal(s).astype(np.float32), n) for n, s in weights.items()
    ]
    initializers.append(numpy_helper.from_array(np.array([0, 4, 2, 4], np.int64), "heads"))
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["up"]),
        helper.make_node("Relu", ["up"], ["act"]),
        helper.make_node("Reshape", ["act", "heads"], ["split"]),
        helper.make_node("Transpose", ["split"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("MatMul", ["turned", "w2"], ["y"]),
        helper.make_node("Shape", ["y"], ["dims"]),
        helper.make_node("Log", ["x"], ["log"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, "seq", 6])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "two_layers", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=100)
    return path


def numpy_tensors(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return every float tensor of :func:`two_layers` for one batch, computed in numpy."""
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    up = x @ weights["w1"]
    act = np.maximum(up, 0)
    split = act.reshape(len(x), 4, 2, 4)
    turned = split.transpose(0, 2, 1, 3)
    found = {"x": x, "up": up, "act": act, "split": split, "turned": turned, "y": turned @ weights["w2"]}
    return {**found, "w1": weights["w1"], "w2": weights["w2"]}


def batches(*sizes: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((size, 4, 6)).astype(np.float32)} for size in sizes]
