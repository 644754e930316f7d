from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.types import Feeds

WIDTH, HIDDEN = 8, 16


@dataclass
class ListData:
    """Batches in memory, as CalibrationData."""

    batches: list[Feeds] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(next(iter(feeds.values()))) for feeds in self.batches)

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.batches)

    def digest(self) -> str:
        return "0" * 64


@dataclass
class Models:
    fp32: Path
    qdq: Path
    weights: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(weight).max(0) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def save(nodes, inputs, outputs, initializers, path: Path) -> Path:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """x -up-> h -relu-> r -down-> y, and the same with Q/DQ on both MatMuls (uint8 activations, int8 weights)."""
    rng = np.random.default_rng(0)
    up = rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32)
    down = rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32)
    down[0, 0] = 9.0  # an outlier: this node loses more than the other
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", WIDTH]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", WIDTH])]
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "down.weight"], ["y"], name="down"),
    ]
    weights = {"up.weight": up, "down.weight": down}
    fp32 = save(
        nodes, inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights.items()], tmp_path / "fp32.onnx"
    )
    scales = {"x": np.float32(6 / 255), "r": np.float32(16 / 255)}
    new, initializers = (
        [],
        [numpy_helper.from_array(np.uint8(128), "x_zp"), numpy_helper.from_array(np.uint8(0), "r_zp")],
    )
    for name, scale in scales.items():
        initializers.append(numpy_helper.from_array(scale, f"{name}_scale"))
        pair = [f"{name}_scale", f"{name}_zp"]
        new += [
            helper.make_node("QuantizeLinear", [name, *pair], [f"{name}_q"], name=f"{name}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_dq"], name=f"{name}_DequantizeLinear"),
        ]
    for name, weight in weights.items():
        stored, scale = quantize_weight(weight)
        scales[name] = scale
        initializers += [numpy_helper.from_array(stored, f"{name}_q"), numpy_helper.from_array(scale, f"{name}_scale")]
        new.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}_q", f"{name}_scale"],
                [f"{name}_dq"],
                name=f"{name}_DequantizeLinear",
                axis=1,
            )
        )
    q, dq, rq, rdq, w1, w2 = new[0], new[1], new[2], new[3], new[4], new[5]
    quantized = [
        q,
        dq,
        w1,
        helper.make_node("MatMul", ["x_dq", "up.weight_dq"], ["h"], name="up"),
        nodes[1],
        rq,
        rdq,
        w2,
        helper.make_node("MatMul", ["r_dq", "down.weight_dq"], ["y"], name="down"),
    ]
    qdq = save(quantized, inputs, outputs, initializers, tmp_path / "qdq.onnx")
    return Models(fp32, qdq, weights, scales)


@pytest.fixture
def data() -> ListData:
    rng = np.random.default_rng(1)
    batches = []
    for size in (3, 3, 2):
        mask = np.ones((size, 5), np.int64)
        mask[:, 3:] = rng.integers(0, 2, (size, 2))
        batches.append(
            {"x": rng.standard_normal((size, 5, WIDTH)).astype(np.float32).clip(-3, 2.9), "attention_mask": mask}
        )
    return ListData(batches)


def pair(values: np.ndarray, scale: np.ndarray, zero_point: int) -> np.ndarray:
    """Quantize and dequantize, by the ONNX definition."""
    stored = np.clip(np.rint(values / scale) + zero_point, 0, 255)
    return ((stored - zero_point) * scale).astype(np.float32)


@pytest.fixture
def by_hand(models: Models):
    """The two models in plain numpy: which nodes to quantize -> (h, y)."""

    def forward(x: np.ndarray, *quantized: str) -> tuple[np.ndarray, np.ndarray]:
        def weight(name: str) -> np.ndarray:
            stored, scale = quantize_weight(models.weights[name])
            return stored.astype(np.float32) * scale

        up, down = models.weights["up.weight"], models.weights["down.weight"]
        if "up" in quantized:
            x, up = pair(x, models.scales["x"], 128), weight("up.weight")
        h = x @ up
        r = np.maximum(h, 0)
        if "down" in quantized:
            r, down = pair(r, models.scales["r"], 0), weight("down.weight")
        return h, r @ down

    return forward


@pytest.fixture
def list_data() -> type[ListData]:
    return ListData
