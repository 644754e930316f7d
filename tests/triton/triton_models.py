"""A tiny model with the shapes that serving has to get right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLE = {"ids": (4, 16), "gain": (4,)}


def tokens_model(path: Path, *, batch: str | int = "batch", external: bool = False, seed: int = 0) -> Path:
    """ids[batch, seq] int64, gain[batch] float -> hidden[batch, seq, 8], score[batch]."""
    table = np.random.default_rng(seed).standard_normal((10, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["hidden"]),
            helper.make_node("ReduceMean", ["hidden", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "gain"], ["score"]),
        ],
        "tokens",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [batch, "seq"]),
            helper.make_tensor_value_info("gain", TensorProto.FLOAT, [batch]),
        ],
        [
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [batch, "seq", "width"]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch]),
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        location=f"{path.name}.data",
        size_threshold=100,
    )
    return path


def classifier(path: Path, *, seed: int = 0) -> Path:
    """pixels[batch, 4] float -> logits[batch, 3]."""
    weights = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["pixels", "weights"], ["logits"])],
        "classifier",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path
