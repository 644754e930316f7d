"""The figures that benchmarks print: noise, INT8 share, and what a process tree costs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fidelity import compare, int8_share, outputs
from benchmarks.processes import measured

BURN = "import time\nwhile time.process_time() < 0.3: pass\nx = bytearray(b'1' * 100_000_000)\ntime.sleep(0.3)"


def test_sqnr_and_cosine_of_known_noise() -> None:
    reference = [np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])]
    found = compare(reference, [np.array([[3.0, 0.3]]), np.array([[0.0, 4.4]])])
    assert found.sqnr_db == pytest.approx(10 * np.log10(25.0 / (0.09 + 0.16)))
    assert found.cosine == pytest.approx((3.0 / np.hypot(3.0, 0.3) + 1.0) / 2)


def test_padding_is_left_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("Identity", ["attention_mask"], ["m"]),
    ]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", 3])
    save(tmp_path / "m.onnx", nodes, ["b", 3, 2], ["b", 3, 2], {}, inputs=[mask])
    data = {"x": np.arange(12, dtype=np.float32).reshape(2, 3, 2), "attention_mask": np.array([[1, 0, 0], [1, 1, 0]])}
    [rows] = outputs(tmp_path / "m.onnx", data, threads=1)
    assert rows.tolist() == [[0.0, 1.0], [6.0, 7.0], [8.0, 9.0]]


def test_share_counts_multiplications(tmp_path: Path) -> None:
    # [8, 4] x [4, 8] in INT8 is 256 multiplications, [8, 8] x [8, 2] in float 128.
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    arrays = {
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "zw": np.int8(0),
        "w": np.ones((4, 8), np.int8),
        "v": np.ones((8, 2), np.float32),
    }
    save(tmp_path / "m.onnx", nodes, ["b", 4], ["b", 2], arrays)
    assert int8_share(tmp_path / "m.onnx", {"x": np.zeros((3, 4), np.float32)}) == pytest.approx(256 / 384)


def test_cost_of_a_process_tree() -> None:
    child = [sys.executable, "-c", BURN]
    cost = measured([sys.executable, "-c", f"import subprocess; subprocess.run({child!r}, check=True); print('done')"])
    assert cost.text == "done\n"
    assert 0.3 <= cost.cpu_seconds < 2.0
    assert cost.wall_seconds >= 0.6
    assert 100e6 <= cost.peak_rss_bytes < 250e6


def test_a_failure_says_what_was_printed_last() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        measured([sys.executable, "-c", "raise SystemExit('out of luck')"])


def save(path: Path, nodes: list, x: list, y: list, arrays: dict, inputs: list | None = None) -> None:
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)]
    if inputs:
        outputs.append(helper.make_tensor_value_info("m", TensorProto.INT64, ["b", 3]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x), *(inputs or [])],
        outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
