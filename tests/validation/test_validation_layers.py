from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import ModelError
from pipeline.model import load, save
from pipeline.validation.extract import extract
from pipeline.validation.layers import LayerOptions, rank_layers
from pipeline.validation.switch import add_switches
from pipeline.validation.transplant import quantized_nodes


def sqnr(ref: np.ndarray, out: np.ndarray) -> float:
    return float(10 * np.log10((ref.astype(np.float64) ** 2).sum() / ((ref.astype(np.float64) - out) ** 2).sum()))


def test_ranking_against_plain_numpy(models, data, by_hand) -> None:
    found = {loss.node: loss for loss in rank_layers(models.fp32, models.qdq, data, threads=1)}
    x = np.concatenate([feeds["x"] for feeds in data])
    keep = np.concatenate([feeds["attention_mask"] for feeds in data]) > 0
    h, y = (values[keep] for values in by_hand(x))
    both = [values[keep] for values in by_hand(x, "up", "down")]
    assert found["up"].local_sqnr_db == pytest.approx(sqnr(h, both[0]), abs=0.05)
    assert found["down"].local_sqnr_db == pytest.approx(sqnr(y, both[1]), abs=0.05)
    noise = {}
    for node in ("up", "down"):
        alone = by_hand(x, node)[1][keep]
        assert found[node].isolated_sqnr_db == pytest.approx(sqnr(y, alone), abs=0.05)
        noise[node] = ((y - alone) ** 2).sum()
    for node, share in noise.items():
        assert found[node].noise_share == pytest.approx(share / sum(noise.values()), rel=0.02)


def test_worst_first_and_names_can_be_chosen(models, data) -> None:
    ranked = rank_layers(models.fp32, models.qdq, data, threads=1)
    sqnrs = [loss.isolated_sqnr_db for loss in ranked]
    assert sqnrs == sorted(sqnrs)
    (only,) = rank_layers(models.fp32, models.qdq, data, LayerOptions(nodes=("down",)), threads=1)
    assert only.noise_share == 1.0


def test_little_memory_gives_the_same(models, data) -> None:
    small = rank_layers(models.fp32, models.qdq, data, LayerOptions(memory_bytes=1), threads=1)
    assert small == rank_layers(models.fp32, models.qdq, data, threads=1)


def test_samples_are_bounded(models, data, by_hand) -> None:
    (loss,) = rank_layers(models.fp32, models.qdq, data, LayerOptions(nodes=("up",), samples=4), threads=1)
    x = np.concatenate([feeds["x"] for feeds in data])[:4]
    keep = np.concatenate([feeds["attention_mask"] for feeds in data])[:4] > 0
    assert loss.isolated_sqnr_db == pytest.approx(sqnr(by_hand(x)[1][keep], by_hand(x, "up")[1][keep]), abs=0.05)


def test_time_bound_says_so(models, data, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline.notice"):
        assert rank_layers(models.fp32, models.qdq, data, LayerOptions(seconds=0.0), threads=1)
    assert "stopped after 3 samples" in caplog.text


def test_nodes_without_counterpart_are_named(models, data, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline.notice"):
        assert rank_layers(models.fp32, models.qdq, data, LayerOptions(nodes=("ghost",)), threads=1) == ()
    assert "ghost" in caplog.text


def test_nothing_quantized_is_nothing_to_rank(models, data) -> None:
    assert rank_layers(models.fp32, models.fp32, data) == ()


def test_switches(models, data, tmp_path: Path) -> None:
    """All off is FP32, all on is the quantized model; one session."""
    switched = add_switches(load(models.fp32), load(models.qdq), ("up", "down"))
    save(switched.model, tmp_path / "switched.onnx")
    onnx.checker.check_model(str(tmp_path / "switched.onnx"))
    feeds = data.batches[0]
    with (
        OnnxRuntimeRunner(tmp_path / "switched.onnx", optimize=False) as runner,
        OnnxRuntimeRunner(models.fp32, optimize=False) as fp32,
        OnnxRuntimeRunner(models.qdq, optimize=False) as quantized,
    ):
        for value, whole in ((False, fp32), (True, quantized)):
            flags = dict.fromkeys(switched.switches.values(), np.asarray(value))
            own = {info.name: ({**feeds, **flags})[info.name] for info in runner.inputs}
            np.testing.assert_array_equal(runner.infer(own)["y"], whole.infer(feeds)["y"])


def test_other_opsets_are_refused(models) -> None:
    variant = load(models.qdq)
    variant.opset_imports[""] = 23
    with pytest.raises(ModelError, match="opset"):
        add_switches(load(models.fp32), variant, ("up",))


def test_another_model_is_refused(models, tmp_path: Path, data) -> None:
    other = onnx.load(models.fp32)
    other.graph.input[0].name = other.graph.node[0].input[0] = "z"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="does not correspond"):
        rank_layers(tmp_path / "other.onnx", models.qdq, data)


def half_variant(models, path: Path) -> Path:
    """``up`` in FP16 with FP16 scales, the way a GPU variant computes; the graph's ends stay FP32."""
    weight = models.weights["up.weight"]
    scale = (np.abs(weight).max(0) / 127).astype(np.float16)
    stored = np.clip(np.rint(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
    tensors = {"s": np.float16(3 / 127), "z": np.int8(0), "wq": stored, "ws": scale}
    tensors["down.weight"] = models.weights["down.weight"].astype(np.float16)
    cast, dq = helper.make_node, "DequantizeLinear"
    nodes = [
        cast("Cast", ["x"], ["x16"], name="cast_in", to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["x16", "s", "z"], ["xq"], name="q"),
        helper.make_node(dq, ["xq", "s", "z"], ["xdq"], name="dq"),
        helper.make_node(dq, ["wq", "ws"], ["wdq"], name="wdq", axis=1),
        helper.make_node("MatMul", ["xdq", "wdq"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "down.weight"], ["y16"], name="down"),
        cast("Cast", ["y16"], ["y"], name="cast_out", to=TensorProto.FLOAT),
    ]
    base = onnx.load(models.fp32).graph
    graph = helper.make_graph(
        nodes,
        "half",
        base.input,
        base.output,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, None)
            for name in ("x16", "xdq", "wdq", "h", "r", "y16")
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_half_precision_variant(models, data, tmp_path: Path) -> None:
    variant = half_variant(models, tmp_path / "half.onnx")
    (loss,) = rank_layers(models.fp32, variant, data, threads=1)
    x = np.concatenate([feeds["x"] for feeds in data])
    keep = np.concatenate([feeds["attention_mask"] for feeds in data]) > 0
    up, down = models.weights["up.weight"], models.weights["down.weight"]
    scale = float(np.float16(3 / 127))
    quantized = np.clip(np.rint(x / scale), -128, 127) * scale
    columns = (np.abs(up).max(0) / 127).astype(np.float16).astype(np.float32)
    weight = np.clip(np.rint(up / columns), -127, 127) * columns
    out = np.maximum(quantized @ weight, 0) @ down
    ref = np.maximum(x @ up, 0) @ down
    assert loss.node == "up"
    assert loss.isolated_sqnr_db == pytest.approx(sqnr(ref[keep], out[keep]), abs=0.3)  # FP16 rounding comes on top


@pytest.mark.exact_products
def test_dynamic_activations(models, data, tmp_path: Path) -> None:
    """A MatMul that was replaced by several nodes is found by the tensor that it made."""
    base = onnx.load(models.fp32)
    weight = models.weights["up.weight"]
    columns = (np.abs(weight).max(0) / 127).astype(np.float32)
    stored = np.clip(np.rint(weight / columns), -127, 127).astype(np.int8)
    node = helper.make_node
    up = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], name="x_dynamic"),
        node("MatMulInteger", ["xq", "wq", "xz"], ["i"], name="up_integer"),
        node("Cast", ["i"], ["f"], name="up_cast", to=TensorProto.FLOAT),
        node("Mul", ["xs", "ws"], ["s"], name="up_scales"),
        node("Mul", ["f", "s"], ["h"], name="up_scaled"),
    ]
    graph = helper.make_graph(
        [*up, *base.graph.node[1:]],
        "dynamic",
        base.graph.input,
        base.graph.output,
        [*base.graph.initializer, numpy_helper.from_array(stored, "wq"), numpy_helper.from_array(columns, "ws")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "dynamic.onnx")
    (loss,) = rank_layers(models.fp32, tmp_path / "dynamic.onnx", data, LayerOptions(nodes=("up",)), threads=1)
    wanted, found, local = [], [], []
    for feeds in data:
        keep = feeds["attention_mask"] > 0
        low, high = min(0, feeds["x"].min()), max(0, feeds["x"].max())
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        x = (np.clip(np.rint(feeds["x"] / scale) + zero, 0, 255) - zero) * scale
        h = x @ (stored * columns)
        wanted.append((np.maximum(feeds["x"] @ weight, 0) @ models.weights["down.weight"])[keep])
        found.append((np.maximum(h, 0) @ models.weights["down.weight"])[keep])
        local.append(((feeds["x"] @ weight)[keep], h[keep]))
    assert loss.isolated_sqnr_db == pytest.approx(sqnr(np.concatenate(wanted), np.concatenate(found)), abs=0.05)
    given, got = (np.concatenate(parts) for parts in zip(*local, strict=True))
    assert loss.local_sqnr_db == pytest.approx(sqnr(given, got), abs=0.05)


def run(path: Path, arrays: Path) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = dict(np.load(arrays))
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def test_extract_one_node(models, data, tmp_path: Path, by_hand) -> None:
    feeds = data.batches[0]
    found = extract(models.fp32, models.qdq, ["down"], feeds, tmp_path / "out")
    h, y = by_hand(feeds["x"])
    inputs, expected = dict(np.load(found.inputs)), dict(np.load(found.expected))
    np.testing.assert_allclose(inputs["r"], np.maximum(h, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(expected["y"], y, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(run(found.layer, found.inputs)["y"], expected["y"])
    assert found.quantized is not None
    assert found.expected_quantized is not None
    quantized = np.load(found.expected_quantized)["y"]
    np.testing.assert_allclose(
        quantized, by_hand(feeds["x"], "down")[1], atol=0.1
    )  # a rounding tie may fall either way
    evaluated = ReferenceEvaluator(str(found.quantized)).run(None, inputs)[0]
    assert np.mean(np.abs(evaluated - quantized) < 1e-4) > 0.95
    assert [node.op_type for node in onnx.load(found.layer).graph.node] == ["MatMul"]
    assert quantized_nodes(load(found.quantized)) == ("quantized/down",)


def test_extract_a_block_and_the_same_bytes_again(models, data, tmp_path: Path) -> None:
    feeds = data.batches[0]
    first = extract(models.fp32, models.qdq, ["up", "relu", "down"], feeds, tmp_path / "a")
    extract(models.fp32, models.qdq, ["up", "relu", "down"], feeds, tmp_path / "b")
    assert first.nodes == ("up", "relu", "down")
    with OnnxRuntimeRunner(models.qdq, optimize=False) as whole:
        np.testing.assert_array_equal(np.load(first.expected_quantized)["y"], whole.infer(feeds)["y"])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [name for name in names if not name.endswith(".data")] == [
        "expected.npz", "expected_quantized.npz", "inputs.npz", "layer.onnx", "layer.quantized.onnx",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_extract_without_a_variant(models, data, tmp_path: Path) -> None:
    found = extract(models.fp32, None, ["up"], data.batches[0], tmp_path)
    assert (found.quantized, found.expected_quantized) == (None, None)
    np.testing.assert_array_equal(run(found.layer, found.inputs)["h"], np.load(found.expected)["h"])


def test_extract_an_unknown_node_names_the_nearest(models, data, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        extract(models.fp32, None, ["dwn"], data.batches[0], tmp_path)
    assert "down" in caught.value.fix


def test_extract_from_the_half_precision_variant(models, data, tmp_path: Path) -> None:
    variant = half_variant(models, tmp_path / "half.onnx")
    found = extract(models.fp32, variant, ["up"], data.batches[0], tmp_path / "out")
    assert found.quantized is not None
    got, ref = run(found.quantized, found.inputs)["h"], np.load(found.expected)["h"]
    assert got.dtype == np.float32
    assert sqnr(ref, got) > 30


def test_a_table_stored_in_int8_is_ranked_by_its_dequantized_rows(tmp_path: Path) -> None:
    """The look-up gives integers there; its counterpart is what dequantizes the rows."""
    table = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    scale = (np.abs(table).max(axis=0) / 127).astype(np.float32)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 8])
    tail = helper.make_node("Relu", ["rows"], ["y"], name="act")
    plain = [helper.make_node("Gather", ["table", "ids"], ["rows"], name="embed"), tail]
    stored = [
        helper.make_node("Gather", ["table_q", "ids"], ["rows_q"], name="embed"),
        helper.make_node("DequantizeLinear", ["rows_q", "scale"], ["rows"], name="rows_DequantizeLinear", axis=2),
        tail,
    ]
    constants = {"table": table, "table_q": np.rint(table / scale).astype(np.int8), "scale": scale}
    for name, nodes, used in (("fp32", plain, ["table"]), ("qdq", stored, ["table_q", "scale"])):
        arrays = [numpy_helper.from_array(constants[c], c) for c in used]
        graph = helper.make_graph(nodes, "g", [ids], [y], arrays)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
            tmp_path / f"{name}.onnx",
        )
    feeds = [{"ids": np.arange(9).reshape(3, 3)}]
    (loss,) = rank_layers(
        tmp_path / "fp32.onnx", tmp_path / "qdq.onnx", feeds, LayerOptions(nodes=("embed",)), threads=1
    )
    rounded = np.rint(table / scale) * scale
    assert loss.local_sqnr_db == pytest.approx(sqnr(table[:9], rounded[:9]), abs=0.05)
    assert loss.isolated_sqnr_db == pytest.approx(sqnr(np.maximum(table[:9], 0), np.maximum(rounded[:9], 0)), abs=0.05)
