"""FP16 casting: every graph stays valid under strict type inference, and computes what the float one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.quantize.graphs import save
from tests.quantize.planning import check, plan_for, run, write

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def half(path: Path, out: Path, *, high: set[str] = frozenset()) -> onnx.ModelProto:
    return check(write(path, plan_for(path, "gpu-fp16", set(), high=high), {}, out).path)


def types(model: onnx.ModelProto) -> dict[str, int]:
    known = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*known.value_info, *known.input, *known.output]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {i.name: i.data_type for i in known.initializer}


def same(path: Path, out: Path, feeds: dict[str, np.ndarray], tolerance: float = 2e-3) -> dict[str, np.ndarray]:
    reference, got = run(path, feeds), run(out, feeds)
    assert list(got) == list(reference)
    for name, want in reference.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_allclose(got[name], want, rtol=tolerance, atol=tolerance)
    return got


def test_conditions_casts_and_fills(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], name="fill",
                         value=helper.make_tensor("v", FLOAT, [1], [1.0])),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], name="zeros"),
        helper.make_node("Greater", ["x", "zeros"], ["positive"], name="greater"),
        helper.make_node("Where", ["positive", "x", "low"], ["w"], name="where"),
        helper.make_node("Cast", ["positive"], ["p"], to=FLOAT, name="cast"),
        helper.make_node("CastLike", ["positive", "x"], ["l"], name="castlike"),
        helper.make_node("Sum", ["w", "p", "l", "ones"], ["y"], name="sum"),
    ]  # fmt: skip
    path = save(
        tmp_path / "w.onnx", nodes, [("x", ["b", 5])], [("y", ["b", 5])], {"low": np.array(-3.4e38, np.float32)}
    )
    model = half(path, tmp_path / "q.onnx")
    found = types(model)
    assert {found[n] for n in ("ones", "zeros", "w", "p", "l")} == {HALF}
    x = np.array([[1.0, 2.0, 0.5, 4.0, 3.0]], np.float32)
    same(path, tmp_path / "q.onnx", {"x": x})
    assert run(tmp_path / "q.onnx", {"x": -x})["y"].max() <= -60000
    assert np.isfinite(run(tmp_path / "q.onnx", {"x": -x})["y"]).all()


def test_range_and_resize_keep_what_onnx_types_as_float(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Range", ["start", "limit", "step"], ["r"], name="range"),
        helper.make_node("Add", ["x", "r"], ["a"], name="add"),
        helper.make_node("Resize", ["a", "", "scales"], ["y"], mode="nearest", name="resize"),
    ]
    weights = {
        "start": np.array(0.0, np.float32),
        "limit": np.array(4.0, np.float32),
        "step": np.array(1.0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    path = save(tmp_path / "r.onnx", nodes, [("x", ["b", 1, 4, 4])], [("y", ["b", 1, 8, 8])], weights)
    model = half(path, tmp_path / "q.onnx")
    found = types(model)
    assert (found["r"], found["a"]) == (FLOAT, HALF)
    assert found["scales"] == FLOAT
    same(path, tmp_path / "q.onnx", {"x": np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32)})


def test_a_subgraph_stays_float_and_reads_float_from_outside(tmp_path: Path) -> None:
    def branch(name: str, op: str) -> onnx.GraphProto:
        node = helper.make_node(op, ["h", "w"], [f"{name}_out"], name=name)
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)])

    nodes = [
        helper.make_node("Mul", ["x", "w"], ["h"], name="before"),
        helper.make_node("ReduceSum", ["h"], ["total"], keepdims=0, name="sum"),
        helper.make_node("Greater", ["total", "zero"], ["c"], name="greater"),
        helper.make_node(
            "If", ["c"], ["i"], then_branch=branch("then", "Add"), else_branch=branch("other", "Sub"), name="if"
        ),
        helper.make_node("Relu", ["i"], ["y"], name="after"),
    ]
    weights = {"w": np.array([2.0, 3.0, 4.0], np.float32), "zero": np.array(0.0, np.float32)}
    path = save(tmp_path / "i.onnx", nodes, [("x", ["b", 3])], [("y", ["b", 3])], weights)
    model = half(path, tmp_path / "q.onnx")
    found = types(model)
    assert (found["h"], found["i"]) == (HALF, FLOAT)
    for sign in (1, -1):
        same(path, tmp_path / "q.onnx", {"x": sign * np.ones((2, 3), np.float32)})


def test_integers_are_untouched(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="lookup"),
        helper.make_node("Add", ["ids", "one"], ["ids_next"], name="next"),
        helper.make_node("ReduceMean", ["e"], ["y"], axes=None, keepdims=0, name="mean"),
    ]
    weights = {"table": np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), "one": np.array(1)}
    path = save(tmp_path / "g.onnx", nodes, [("ids", ["b"])], [("y", []), ("ids_next", ["b"])], weights)
    model = half(path, tmp_path / "q.onnx")
    assert [n.op_type for n in model.graph.node] == ["Gather", "Add", "ReduceMean", "Cast"]
    assert types(model)["ids"] == TensorProto.INT64
    same(path, tmp_path / "q.onnx", {"ids": np.array([70000 % 9, 3])})


def test_inputs_and_outputs_keep_names_types_and_order(tmp_path: Path) -> None:
    """One output is an inner tensor, one an island's, one integer, one the input itself passed on."""
    nodes = [
        helper.make_node("Exp", ["x"], ["inner"], name="exp"),
        helper.make_node("Log", ["inner"], ["island"], name="log"),
        helper.make_node("ArgMax", ["island"], ["ids"], axis=1, keepdims=0, name="class"),
        helper.make_node("Identity", ["x"], ["same"], name="same"),
    ]
    outputs = [("inner", ["b", 4]), ("island", ["b", 4]), ("ids", ["b"]), ("same", ["b", 4])]
    path = save(tmp_path / "o.onnx", nodes, [("x", ["b", 4])], outputs, {})
    model = half(path, tmp_path / "q.onnx", high={"log"})
    assert [(o.name, o.type.tensor_type.elem_type) for o in model.graph.output] == [
        ("inner", FLOAT),
        ("island", FLOAT),
        ("ids", TensorProto.INT64),
        ("same", FLOAT),
    ]
    same(path, tmp_path / "q.onnx", {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}, 5e-3)


def test_a_chain_of_islands_is_cast_once_in_and_once_out(tmp_path: Path) -> None:
    """Values in it may leave FP16's range, which is what an island is for."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Mul", ["a", "large"], ["b"], name="b"),
        helper.make_node("Sqrt", ["b"], ["c"], name="c"),
        helper.make_node("Neg", ["c"], ["y"], name="d"),
    ]
    path = save(tmp_path / "c.onnx", nodes, [("x", ["b", 4])], [("y", ["b", 4])], {"large": np.array(1e6, np.float32)})
    model = half(path, tmp_path / "q.onnx", high={"b", "c"})
    assert [n.op_type for n in model.graph.node] == ["Cast", "Relu", "Cast", "Mul", "Sqrt", "Cast", "Neg", "Cast"]
    same(path, tmp_path / "q.onnx", {"x": np.array([[0.0, 1.0, 4.0, 9.0]], np.float32)})


def test_a_constant_for_both_precisions_is_stored_in_both(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"], name="half"),
        helper.make_node("Mul", ["a", "w"], ["y"], name="island"),
    ]
    w = np.array([1.1, 2.2, 3.3], np.float32)
    path = save(tmp_path / "b.onnx", nodes, [("x", ["b", 3])], [("y", ["b", 3])], {"w": w})
    model = half(path, tmp_path / "q.onnx", high={"island"})
    stored = [numpy_helper.to_array(i) for i in model.graph.initializer]
    assert sorted(str(s.dtype) for s in stored) == ["float16", "float32"]
    np.testing.assert_array_equal(next(s for s in stored if s.dtype == np.float16), w.astype(np.float16))
    same(path, tmp_path / "q.onnx", {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("elsewhere", [None, "fp32"])
def test_quantized_nodes_inside_fp16_have_fp16_scales(tmp_path: Path, elsewhere: str | None) -> None:
    from pipeline.types import Precision

    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"),
        helper.make_node("Relu", ["m"], ["y"], name="act"),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("x", ["b", 32])], [("y", ["b", 32])], {"w": w})
    options = {"elsewhere": Precision.FP32} if elsewhere else {}
    model = check(write(path, plan_for(path, "gpu-int8", {"mm"}, **options), {}, tmp_path / "q.onnx").path)
    scales = [i for i in model.graph.initializer if i.name.endswith("_scale")]
    assert {i.data_type for i in scales} == {FLOAT if elsewhere else HALF}
    assert all(np.all(numpy_helper.to_array(i) > 0) for i in scales)
    zeros = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("_zero_point")]
    assert all(not z.any() for z in zeros)  # TensorRT: symmetric only
    x = {"x": np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)}
    reference, got = run(path, x)["y"], run(tmp_path / "q.onnx", x)["y"]
    assert np.abs(got - reference).max() < 0.4
