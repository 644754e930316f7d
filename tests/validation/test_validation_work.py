"""Multiplications and elements of nodes, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.validation.work import Work, count_work


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """[N, 4, 6, 6] images: a grouped convolution, a transposed one, a MatMul of two activations and a Gemm with transA."""
    nodes = [
        helper.make_node("Conv", ["x", "grouped"], ["c"], name="conv", group=2, strides=[2, 2]),
        helper.make_node("ConvTranspose", ["c", "up"], ["t"], name="transposed"),
        helper.make_node("MatMul", ["t", "t"], ["m"], name="square"),
        helper.make_node("Relu", ["m"], ["r"], name="relu"),
        helper.make_node("Squeeze", ["a"], ["s"], name="other"),
        helper.make_node("Gemm", ["s", "b"], ["g"], name="gemm", transA=1),
    ]
    weights = {
        "grouped": np.zeros((8, 2, 2, 2), np.float32),
        "up": np.zeros((8, 3, 2, 2), np.float32),
        "b": np.zeros((5, 7), np.float32),
    }
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6]),
        helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 5, 9]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("r", "g")]
    graph = helper.make_graph(
        nodes, "work", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_counted_by_hand(model: Path) -> None:
    feeds = {"x": np.zeros((3, 4, 6, 6), np.float32), "a": np.zeros((1, 5, 9), np.float32)}
    found = count_work(model, feeds, ["relu"], threads=1)
    assert found == {
        "conv": Work(products=3 * 8 * 3 * 3 * (2 * 2 * 2), elements=3 * 8 * 3 * 3),
        "transposed": Work(products=3 * 8 * 3 * 3 * (3 * 2 * 2), elements=3 * 3 * 4 * 4),
        "square": Work(products=3 * 3 * 4 * 4 * 4, elements=3 * 3 * 4 * 4),
        "relu": Work(products=0, elements=3 * 3 * 4 * 4),
        "gemm": Work(products=9 * 5 * 7, elements=9 * 7),
    }
