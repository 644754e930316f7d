"""A model that runs in segments computes what the whole model computes, with few of its weights at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import EngineError
from pipeline.model import read_proto
from pipeline.running import segmented
from pipeline.running.memory import fit, open_session, stream, weights_within
from pipeline.running.segmented import SegmentedSession, in_order
from pipeline.running.segments import segments, weight_bytes
from pipeline.running.session import run, session

WIDTH = 64
WEIGHT = WIDTH * WIDTH * 4


def chain(path: Path, layers: int = 6, dtype: int = TensorProto.FLOAT) -> Path:
    """Residual blocks of two products each; the last one's first weight is the first one's too, ``skip`` crosses all."""
    draw = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes, weights = [helper.make_node("Relu", ["x"], ["skip"])], []
    value = "x"
    for index in range(layers):
        up = "w0_up" if index == layers - 1 else f"w{index}_up"
        nodes += [
            helper.make_node("MatMul", [value, up], [f"h{index}"], name=f"up{index}"),
            helper.make_node("Sigmoid", [f"h{index}"], [f"s{index}"]),
            helper.make_node("Mul", [f"h{index}", f"s{index}"], [f"a{index}"]),
            helper.make_node("MatMul", [f"a{index}", f"w{index}_down"], [f"d{index}"], name=f"down{index}"),
            helper.make_node("Add", [value, f"d{index}"], [f"x{index}"]),
        ]
        for name in {f"w{index}_down", up} - {w.name for w in weights}:
            values = draw.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
            weights.append(numpy_helper.from_array(values.astype(kind), name))
        value = f"x{index}"
    nodes.append(helper.make_node("Add", [value, "skip"], ["y"]))
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
        sorted(weights, key=lambda w: w.name),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def batches(count: int, dtype: type = np.float32) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(rows, WIDTH)).astype(dtype)} for rows in range(1, count + 1)]


def in_segments(path: Path, weights: int = 3, **options: bool) -> SegmentedSession:
    return SegmentedSession(read_proto(path), path.parent, segment_bytes=weights * WEIGHT, **options)


def test_segments_hold_all_nodes_once_in_order_and_no_more_weights_than_they_may(tmp_path: Path) -> None:
    graph = read_proto(chain(tmp_path / "m.onnx")).graph
    for weights in range(1, 13):
        parts = segments(graph, weights * WEIGHT)
        assert [n.output for part in parts for n in part.nodes] == [n.output for n in graph.node]
        assert max(len(part.weights) for part in parts) <= weights
        for part in parts:
            assert {n for node in part.nodes for n in node.input} == {w.name for w in part.weights} | (
                set(part.inputs) | (set(part.outputs) & {n for node in part.nodes for n in node.input})
            )
    assert len(segments(graph, 1)) > 10  # a node that reads too much is alone
    assert len(segments(graph, 1 << 40)) == 1


def test_cuts_are_between_blocks_where_one_tensor_crosses(tmp_path: Path) -> None:
    parts = segments(read_proto(chain(tmp_path / "m.onnx")).graph, 3 * WEIGHT)
    assert [len(part.inputs) for part in parts[1:-1]] == [1] * (len(parts) - 2)
    assert set(parts[-1].inputs) == {parts[-2].outputs[-1], "skip"}


@pytest.mark.parametrize("weights", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_tensor_is_the_one_of_the_whole_model(tmp_path: Path, weights: int, dtype: type) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = chain(tmp_path / "m.onnx", dtype=kind)
    proto = read_proto(path)
    names = ["y", "a0", "x2", "d5"]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[1:])
    whole = session(proto.SerializeToString(), folder=tmp_path, optimize=False, prepack=False)
    parts = SegmentedSession(proto, tmp_path, segment_bytes=weights * WEIGHT, optimize=False)
    assert [v.name for v in parts.get_outputs()] == names
    assert {v.type for v in parts.get_outputs()} == {v.type for v in whole.get_outputs()}
    for feeds in batches(3, dtype):
        for wanted, got in zip(run(whole, names, feeds), run(parts, names, feeds), strict=True):
            assert got.dtype == wanted.dtype
            if dtype is np.float32:
                assert np.array_equal(got, wanted)
            else:  # FP16 is computed in FP32 between cuts, and rounded at each
                assert np.abs(got - wanted).max() <= 2e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("carried", [1, 3000, 1 << 20])
def test_batches_stream_in_order_whatever_may_wait(tmp_path: Path, monkeypatch, carried: int) -> None:
    monkeypatch.setattr(segmented, "CARRIED_BYTES", carried)
    path = chain(tmp_path / "m.onnx")
    given = batches(7)
    whole, parts = session(path, optimize=False, prepack=False), in_segments(path, optimize=False)
    found = list(in_order(stream(parts, ["y"], iter(given))))
    assert len(found) == 7
    for feeds, values in zip(given, found, strict=True):
        assert np.array_equal(values["y"], run(whole, ["y"], feeds)[0])


def test_a_segment_is_loaded_once_for_all_batches_that_wait_and_not_at_all_if_nothing_needs_it(
    tmp_path: Path, monkeypatch
) -> None:
    path = chain(tmp_path / "m.onnx")
    parts = in_segments(path)
    loaded: list[int] = []
    plain = segmented.session
    monkeypatch.setattr(segmented, "session", lambda *a, **k: loaded.append(1) or plain(*a, **k))
    list(parts.stream(["y"], batches(5)))
    assert len(loaded) == len(parts.segments) == parts.pieces(["y"]) > 3
    loaded.clear()
    list(parts.stream(["skip"], batches(5)))
    assert len(loaded) == parts.pieces(["skip"]) == 1


def test_no_more_batches_are_read_ahead_than_may_wait(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(segmented, "CARRIED_BYTES", 1)
    taken = []

    def source():
        for feeds in batches(4):
            taken.append(len(feeds["x"]))
            yield feeds

    pieces = in_segments(chain(tmp_path / "m.onnx")).stream(["y"], source())
    assert next(p for p in pieces if p.last).feeds["x"].shape[0] == 1
    assert taken == [1]


def test_memory_decides_and_a_model_that_fits_has_an_ordinary_session(tmp_path: Path, caplog) -> None:
    path = chain(tmp_path / "m.onnx")
    size = weight_bytes(read_proto(path))
    with weights_within(size):
        assert fit(path)
        assert not fit(path, path)
        assert not isinstance(open_session(path), SegmentedSession)
        assert not caplog.records
        assert isinstance(open_session(path, whole=False), SegmentedSession)
    with weights_within(size - 1):
        live = open_session(path)
        assert isinstance(live, SegmentedSession)
        assert isinstance(open_session(path.read_bytes(), folder=tmp_path), SegmentedSession)
        assert not isinstance(open_session(path, whole=True), SegmentedSession)
    assert "runs in segments" in caplog.text
    assert not isinstance(open_session(path), SegmentedSession)  # half of the free memory


def test_what_onnxruntime_refuses_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    proto = read_proto(path)
    proto.graph.node[-3].op_type = "NoSuchOperator"
    with pytest.raises(EngineError, match="NoSuchOperator"):
        SegmentedSession(proto, tmp_path, segment_bytes=WEIGHT)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="cannot load"):
        open_session(tmp_path / "bad.onnx")


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'x'"):
        in_segments(chain(tmp_path / "m.onnx")).run(None, {"z": np.zeros((1, WIDTH), np.float32)})


def test_a_branch_reads_weights_and_tensors_from_outside(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", layers=2)
    proto = read_proto(path)
    branch = [
        helper.make_graph([helper.make_node(kind, ["x0", "skip"], [f"inner_{kind}"])], kind, [],
                          [helper.make_tensor_value_info(f"inner_{kind}", TensorProto.FLOAT, ["batch", WIDTH])])
        for kind in ("Add", "Sub")
    ]  # fmt: skip
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    proto.graph.input.append(flag)
    proto.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=branch[0], else_branch=branch[1]))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", WIDTH]))
    whole = session(proto.SerializeToString(), folder=tmp_path, optimize=False, prepack=False)
    parts = SegmentedSession(proto, tmp_path, segment_bytes=WEIGHT, optimize=False)
    for flag_value in (True, False):
        feeds = {**batches(1)[0], "flag": np.asarray(flag_value)}
        assert np.array_equal(run(parts, ["z"], feeds)[0], run(whole, ["z"], feeds)[0])


def test_inputs_and_constants_may_be_outputs(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", layers=2)
    proto = read_proto(path)
    proto.graph.output.append(helper.make_tensor_value_info("w1_down", TensorProto.FLOAT, [WIDTH, WIDTH]))
    parts = SegmentedSession(proto, tmp_path, segment_bytes=WEIGHT)
    feeds = batches(1)[0]
    stored = next(t for t in proto.graph.initializer if t.name == "w1_down")
    assert np.array_equal(run(parts, ["w1_down", "y"], feeds)[0], numpy_helper.to_array(stored, str(tmp_path)))
    assert np.array_equal(run(parts, ["x"], feeds)[0], feeds["x"])
