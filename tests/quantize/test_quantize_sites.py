"""Where pairs go: golden placement on small graphs, one idea each. ``*`` is every reader and the graph output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.quantize.graphs import save
from tests.quantize.planning import plan_for, run, sites_of, write

PAD = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
IMAGE = ["b", 16, 8, 8]


def conv(i: str, o: str, name: str, w: str = "w", b: str = "b", **more):
    return helper.make_node("Conv", [i, w, b], [o], name=name, **{**PAD, **more})


def weights(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    found = {n: (rng.normal(size=(16, 16, 3, 3)) / 12).astype(np.float32) for n in names if n.startswith("w")}
    return found | {n: rng.normal(size=16).astype(np.float32) for n in names if n.startswith("b")}


def golden(path: Path, family: str, quantized: set[str]) -> list[str]:
    found = sites_of(path, plan_for(path, family, quantized))
    return [
        f"{s.tensor} {s.spec.dtype} -> "
        + ("*" if s.readers is None else " ".join(f"{n}:{i}" for n, i in s.readers))
        + ("" if s.observed == (s.tensor,) else f" as {'+'.join(s.observed)}")
        for s in found
    ]


def concat(folder: Path) -> Path:
    nodes = [
        conv("x", "a", "first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        conv("r", "c", "second"),
        helper.make_node("Concat", ["r", "c"], ["k"], axis=1, name="concat"),
        helper.make_node("Conv", ["k", "wide"], ["y"], name="third", **PAD),
    ]
    values = weights("w", "b") | {
        "wide": (np.random.default_rng(4).normal(size=(16, 32, 3, 3)) / 17).astype(np.float32)
    }
    return save(folder / "concat.onnx", nodes, [("x", IMAGE)], [("y", IMAGE)], values)


def test_concat_inputs_share_one_scale_for_tensorrt(tmp_path: Path) -> None:
    assert golden(concat(tmp_path), "gpu-int8", {"first", "second", "third"}) == [
        "x int8 -> first:0",
        "r int8 -> second:0 as r+k",
        "k int8 -> third:0 as r+k",
    ]


def test_concat_has_a_scale_for_each_input_in_onnxruntime_and_becomes_integer(tmp_path: Path) -> None:
    path = concat(tmp_path)
    quantized = {"first", "second", "third"}
    assert golden(path, "cpu", quantized) == [
        "x uint8 -> first:0",
        "r uint8 -> *",
        "c uint8 -> *",
        "k uint8 -> third:0",
        "y uint8 -> *",
    ]
    made = write(path, plan_for(path, "cpu", quantized), {"r": (0, 4)}, tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.integer_kernels == {"QLinearConv": 3}
    assert made.fusion.unfused == ()
    assert made.fusion.left_over == {"QuantizeLinear": 1, "DequantizeLinear": 1}  # the graph's input and output


def test_what_only_rearranges_a_quantized_tensor_has_its_range(tmp_path: Path) -> None:
    nodes = [
        conv("x", "a", "first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], name="pool"),
        helper.make_node("Transpose", ["p"], ["t"], perm=[0, 1, 3, 2], name="turn"),
        conv("t", "y", "second"),
    ]
    path = save(tmp_path / "p.onnx", nodes, [("x", IMAGE)], [("y", ["b", 16, 7, 7])], weights("w", "b"))
    assert golden(path, "cpu", {"first", "second"})[1:3] == ["r uint8 -> *", "t uint8 -> second:0 as r"]
    assert golden(path, "gpu-int8", {"first", "second"}) == ["x int8 -> first:0", "t int8 -> second:0"]
    assert golden(path, "cpu", {"second"}) == ["t uint8 -> second:0", "y uint8 -> *"]


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0)])
def test_a_clip_behind_a_convolution_does_not_hinder_fusion(tmp_path: Path, bounds) -> None:
    nodes = [
        conv("x", "a", "first"),
        helper.make_node("Clip", ["a", "lo", "hi"], ["c"], name="clip"),
        conv("c", "y", "second"),
    ]
    values = weights("w", "b") | {"lo": np.array(bounds[0], np.float32), "hi": np.array(bounds[1], np.float32)}
    path = save(tmp_path / "c.onnx", nodes, [("x", IMAGE)], [("y", IMAGE)], values)
    plan = plan_for(path, "cpu", {"first", "second"})
    # Zero is a step of every asymmetric quantizer, -1 is not.
    assert golden(path, "cpu", {"first", "second"})[1] == ("c uint8 -> *" if bounds[0] == 0 else "a uint8 -> *")
    made = write(path, plan, {"c": bounds, "y": (-6, 6)}, tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.integer_kernels == {"QLinearConv": 2}
    x = {"x": np.random.default_rng(1).normal(size=(2, 16, 8, 8)).astype(np.float32)}
    reference, got = run(path, x)["y"], run(made.path, x, optimize=True)["y"]
    assert 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()) > 20


def test_a_convolution_read_twice_has_the_pair_on_its_own_output(tmp_path: Path) -> None:
    nodes = [
        conv("x", "a", "first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="gate"),
        helper.make_node("Mul", ["r", "s"], ["y"], name="mul"),
    ]
    path = save(tmp_path / "t.onnx", nodes, [("x", IMAGE)], [("y", IMAGE)], weights("w", "b"))
    assert golden(path, "cpu", {"first"}) == ["x uint8 -> first:0", "a uint8 -> *"]
    assert golden(path, "gpu-int8", {"first"}) == ["x int8 -> first:0"]


@pytest.mark.exact_products
def test_a_convolution_that_is_a_graph_output_keeps_the_output_s_name(tmp_path: Path) -> None:
    nodes = [conv("x", "mid", "first"), helper.make_node("Relu", ["mid"], ["r"], name="relu"), conv("r", "y", "second")]
    path = save(tmp_path / "o.onnx", nodes, [("x", IMAGE)], [("mid", IMAGE), ("y", IMAGE)], weights("w", "b"))
    assert golden(path, "cpu", {"first", "second"}) == [
        "x uint8 -> first:0",
        "mid uint8 -> *",
        "r uint8 -> second:0",
        "y uint8 -> *",
    ]
    known = {"r": (0, 6), "mid": (-6, 6), "y": (-9, 9)}
    made = write(path, plan_for(path, "cpu", {"first", "second"}), known, tmp_path / "q.onnx")
    x = {"x": np.random.default_rng(1).normal(size=(1, 16, 8, 8)).astype(np.float32)}
    reference, got = run(path, x), run(made.path, x, optimize=True)
    assert list(got) == ["mid", "y"]
    assert np.abs(got["mid"] - reference["mid"]).max() < 0.2


def test_a_tensor_that_is_both_operands_of_a_matmul_has_a_pair_for_each_format(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], name="square")]
    path = save(tmp_path / "s.onnx", nodes, [("x", ["b", 16, 16])], [("y", ["b", 16, 16])], {})
    assert golden(path, "cpu", {"square"}) == ["x uint8 -> square:0", "x int8 -> square:1"]
    assert golden(path, "gpu-int8", {"square"}) == ["x int8 -> square:0 square:1"]
    made = write(path, plan_for(path, "cpu", {"square"}), {}, tmp_path / "q.onnx")
    assert made.fusion is not None
    assert made.fusion.unfused == ()
    x = {"x": np.random.default_rng(2).normal(size=(2, 16, 16)).astype(np.float32)}
    for optimize in (False, True):
        got = run(made.path, x, optimize=optimize)["y"]
        assert np.abs(got - x["x"] @ x["x"]).max() < 0.5


def test_a_convolution_s_output_as_second_operand_has_both_pairs(tmp_path: Path) -> None:
    nodes = [conv("x", "a", "first"), helper.make_node("MatMul", ["x", "a"], ["y"], name="product")]
    path = save(tmp_path / "f.onnx", nodes, [("x", IMAGE)], [("y", IMAGE)], weights("w", "b"))
    assert golden(path, "cpu", {"first", "product"}) == [
        "x uint8 -> first:0 product:0",
        "a uint8 -> *",
        "a int8 -> product:1",
    ]
    made = write(path, plan_for(path, "cpu", {"first", "product"}), {"a": (-7, 7)}, tmp_path / "q.onnx")
    x = {"x": np.random.default_rng(2).normal(size=(2, 16, 8, 8)).astype(np.float32)}
    reference, got = run(path, x)["y"], run(made.path, x)["y"]
    assert np.abs(got - reference).max() / np.abs(reference).max() < 0.05


def test_residual_adds_quantize_the_skip_branch_alone_for_tensorrt(tmp_path: Path) -> None:
    nodes = [
        conv("x", "a", "first"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        conv("r", "c", "second"),
        helper.make_node("Add", ["r", "c"], ["y"], name="skip"),
    ]
    path = save(tmp_path / "a.onnx", nodes, [("x", IMAGE)], [("y", IMAGE)], weights("w", "b"))
    assert golden(path, "gpu-int8", {"first", "second", "skip"}) == ["x int8 -> first:0", "r int8 -> second:0 skip:0"]


@pytest.mark.parametrize("family", ["cpu", "gpu-int8"])
def test_nodes_that_share_a_tensor_or_a_weight_share_its_pair(tmp_path: Path, family: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="one"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="two"),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    path = save(tmp_path / "w.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": w})
    assert len(sites_of(path, plan_for(path, family, {"one", "two"}))) == 1
    made = write(path, plan_for(path, family, {"one", "two"}), {}, tmp_path / "q.onnx")
    import onnx

    graph = onnx.load(made.path).graph
    assert [n.op_type for n in graph.node].count("QuantizeLinear") == 1
    assert [n.op_type for n in graph.node].count("DequantizeLinear") == 2
    assert [list(i.dims) for i in graph.initializer if len(i.dims) == 2] == [[32, 32]]
