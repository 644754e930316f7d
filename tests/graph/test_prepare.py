"""``prepare`` from file to file: same signature, same outputs, same bytes, stable names; what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from canonical_models import assert_same, canonical, ops, parse, prepare, run_reference, save

from pipeline import model as files
from pipeline.errors import EngineError, ModelError
from pipeline.graph.compare import compare
from pipeline.graph.passes.convert_opset import CHANGED_MEANING, TARGET
from pipeline.notices import collecting
from pipeline.types import TensorInfo


def mlp(opset: int = 17) -> onnx.ModelProto:
    model = parse(
        """g (float[batch, 64] x, int64[batch] ids) => (float[batch, 64] hidden, float[batch, 32] y)
        <float half = {0.5}, float one = {1.0}, float root2 = {1.4142135}> {
            h = MatMul(x, w1)
            b = Add(h, b1)
            a = Div(b, root2)
            e = Erf(a)
            p = Add(e, one)
            m = Mul(b, p)
            hidden = Mul(m, half)
            g = Gather(table, ids)
            s = Add(hidden, g)
            t = Transpose<perm = [1, 0]>(w2)
            y = MatMul(s, t)
        }""",
        opset=opset,
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (64, 64), "b1": (64,), "table": (10, 64), "w2": (32, 64)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_the_canonical_file(tmp_path: Path) -> None:
    source = save(mlp(), tmp_path)
    steps: list[tuple[str, int, int]] = []
    prepared = prepare(source, tmp_path / "out.onnx", progress=lambda *step: steps.append(step))
    assert (prepared.opset_from, prepared.opset_to) == (17, TARGET)
    assert prepared.max_relative_difference is not None
    assert prepared.max_relative_difference <= 1e-5
    assert dict(prepared.changes)["fuse-gelu"] == 1
    assert steps
    loaded = files.load(prepared.path)
    assert ops(loaded) == {"MatMul": 2, "Add": 2, "Gelu": 1, "Gather": 1}
    assert [(i.name, i.shape) for i in files.inputs(loaded)] == [("x", ("batch", 64)), ("ids", ("batch",))]
    assert [(o.name, o.shape) for o in files.outputs(loaded)] == [("hidden", ("batch", 64)), ("y", ("batch", 32))]
    for node in loaded.graph:
        if node.op_type == "MatMul":
            assert node.inputs[1].is_initializer()
        assert node.outputs[0].shape is not None


def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = save(mlp(), tmp_path)
    for folder in ("a", "b"):
        prepare(source, tmp_path / folder / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again = prepare(tmp_path / "a" / "model.onnx", tmp_path / "c" / "model.onnx")
    assert again.changes == ()


def test_a_given_sample_is_used_and_must_fit(tmp_path: Path) -> None:
    source = save(mlp(), tmp_path)
    sample = {"x": np.ones((3, 64), np.float32), "ids": np.array([9, 9, 9])}
    assert prepare(source, tmp_path / "out.onnx", sample=sample).max_relative_difference is not None
    with pytest.raises(EngineError):
        prepare(source, tmp_path / "out.onnx", sample={"x": np.ones((3, 63), np.float32), "ids": np.array([9, 9, 9])})


def test_a_changed_output_is_refused(tmp_path: Path) -> None:
    inputs = [TensorInfo(name="x", dtype=np.dtype(np.float32), shape=("n", 4))]
    base = save(parse("g (float[n, 4] x) => (float[n, 4] y) { y = Exp(x) }"), tmp_path, "a.onnx")
    bodies = {
        "relative difference": "<float k = {1.001}> { e = Exp(x)\n y = Mul(e, k) }",
        "NaN": "{ e = Neg(x)\n f = Exp(x)\n g = Neg(f)\n l = Log(g)\n y = Add(l, e) }",
    }
    for text, body in bodies.items():
        other = save(parse(f"g (float[n, 4] x) => (float[n, 4] y) {body}"), tmp_path, "b.onnx")
        with pytest.raises(ModelError, match=text):
            compare(base, other, inputs, None)
    shape = save(parse("g (float[n, 4] x) => (float[4, n] y) { t = Transpose(x)\n y = Exp(t) }"), tmp_path, "b.onnx")
    with pytest.raises(ModelError, match="instead of"):
        compare(base, shape, inputs, None)
    whole = (
        "g (float[n, 4] x) => (int64[n] y) <int64 k = {%d}> { a = ArgMax<axis = 1, keepdims = 0>(x)\n y = Add(a, k) }"
    )
    one, two = (save(parse(whole % k), tmp_path, f"{k}.onnx") for k in (0, 1))
    with pytest.raises(ModelError, match="other values"):
        compare(one, two, inputs, None)
    assert compare(one, one, inputs, None) == 0


def test_names_are_unique_stable_and_kept(tmp_path: Path) -> None:
    model = parse("g (float[n] x) => (float[n] y) { a = Relu(x)\n b = Neg(a)\n c = Neg(b)\n d = Abs(c)\n y = Exp(d) }")
    for node, name in zip(model.graph.node, ["keep", "twice", "twice", "", "Neg_0"], strict=True):
        node.name = name
    prepared = onnx.load(prepare(save(model, tmp_path), tmp_path / "out.onnx").path)
    assert [n.name for n in prepared.graph.node] == ["keep", "Neg_1", "Neg_2", "Abs_0", "Neg_0"]


def test_names_in_subgraphs_are_unique_in_the_model() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) {
            a = Relu(x)
            y = If(c) <then_branch = t () => (float[2] p) { v = Neg(a)\n p = Abs(v) },
                       else_branch = e () => (float[2] p) { v = Exp(a)\n p = Abs(v) }>
        }"""
    )
    made = canonical(model)
    names = [v.name for g in made.graphs() for n in g for v in n.outputs]
    assert len(names) == len(set(names))
    for flag in (True, False):
        assert_same(model, made, {"c": np.array(flag), "x": np.array([-1, 2], np.float32)})


def test_functions_are_inlined_also_from_another_opset(tmp_path: Path) -> None:
    for opset in (17, 13):
        model = parse(
            "g (float[n, 4] x) => (float[n, 4] y) { a = my.Twice(x)\n y = my.Twice(a) }",
            more=', "my" : 1',
            functions=f'<domain: "my", opset_import: ["" : {opset}]> Twice (v) => (w) {{ w = Add(v, v) }}',
        )
        prepared = prepare(save(model, tmp_path), tmp_path / "out.onnx")
        loaded = onnx.load(prepared.path)
        assert [n.op_type for n in loaded.graph.node] == ["Add", "Add"]
        assert prepared.max_relative_difference == 0
        assert not loaded.functions


def test_recursive_functions_are_refused(tmp_path: Path) -> None:
    model = parse(
        "g (float[n] x) => (float[n] y) { y = my.F(x) }",
        more=', "my" : 1',
        functions='<domain: "my", opset_import: ["" : 17, "my" : 1]> F (v) => (w) { w = my.F(v) }',
    )
    with pytest.raises(ModelError, match="inlined"):
        prepare(save(model, tmp_path), tmp_path / "out.onnx")


def test_initializers_listed_as_inputs_become_constants(tmp_path: Path) -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    model.opset_import[0].version = 9
    prepared = prepare(save(model, tmp_path), tmp_path / "out.onnx")
    assert [i.name for i in onnx.load(prepared.path).graph.input] == ["x", "ids"]
    assert prepared.opset_to == TARGET


def test_outputs_that_are_inputs_constants_or_repeats(tmp_path: Path) -> None:
    model = parse(
        """g (float[n] x) => (float[n] same, float[n] copy, float[2] constant, float[n] a, float[n] b) <float[2] k = {1.0, 2.0}> {
            same = Identity(x)
            copy = Identity(same)
            constant = Identity(k)
            a = Relu(x)
            b = Identity(a)
        }"""
    )
    prepared = prepare(save(model, tmp_path), tmp_path / "out.onnx")
    loaded = onnx.load(prepared.path)
    assert [o.name for o in loaded.graph.output] == ["same", "copy", "constant", "a", "b"]
    x = np.array([-1, 1], np.float32)
    for ours, theirs in zip(run_reference(loaded, {"x": x}), run_reference(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_custom_operators_are_kept_and_said(tmp_path: Path) -> None:
    model = parse("g (float[n, 4] x) => (float[n, 4] y) { a = my.Op<k = 3>(x)\n y = MatMul(a, w) }", more=', "my" : 1')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    with collecting() as notices:
        prepared = prepare(save(model, tmp_path), tmp_path / "out.onnx")
    assert {n.code for n in notices} == {"unknown-shapes", "not-compared"}
    assert prepared.max_relative_difference is None
    assert [n.op_type for n in onnx.load(prepared.path).graph.node] == ["Op", "MatMul"]


def test_subgraphs_of_custom_operators_keep_their_constants(tmp_path: Path) -> None:
    model = parse(
        """g (float[2] x) => (float[2] y) {
            y = my.Map(x) <body = b (float[2] v) => (float[2] w) <float k = {2.0}> {
                c = Constant<value_float = 3.0>()
                d = Mul(v, k)
                w = Add(d, c)
            }>
        }""",
        more=', "my" : 1',
    )
    with collecting():
        prepared = onnx.load(prepare(save(model, tmp_path), tmp_path / "out.onnx").path)
    body = prepared.graph.node[0].attribute[0].g
    assert [t.name for t in body.initializer] == ["k"]
    assert [n.op_type for n in body.node] == ["Constant", "Mul", "Add"]
    assert not prepared.graph.initializer


def test_a_contradiction_is_loud(tmp_path: Path) -> None:
    model = parse("g (float[2, 3] x) => (float[2, 5] y) { a = MatMul(x, w)\n y = MatMul(a, w) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 5), np.float32), "w"))
    with pytest.raises(ModelError, match="Shape inference failed"):
        prepare(save(model, tmp_path), tmp_path / "out.onnx")


def test_random_models_are_not_compared(tmp_path: Path) -> None:
    model = parse("g (float[2, 3] x) => (float[2, 3] y) { r = RandomNormalLike(x)\n y = Add(x, r) }")
    with collecting() as notices:
        assert prepare(save(model, tmp_path), tmp_path / "out.onnx").max_relative_difference is None
    assert [n.code for n in notices] == ["not-compared"]


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 16, 18, 19, 20, 21, 22])
def test_every_opset_keeps_its_meaning(opset: int) -> None:
    """Softmax before 13 normalizes over everything from its axis on; relabelling would change it by 0.5."""
    model = parse("g (float[2, 3, 4] x) => (float[2, 3, 4] y) { s = Softmax<axis = 1>(x)\n y = Relu(s) }", opset=opset)
    made = canonical(model)
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    axes = (1, 2) if opset < 13 else (1,)
    exponent = np.exp(x - x.max(axis=axes, keepdims=True))
    import onnx_ir as ir

    got = run_reference(ir.serde.serialize_model(made), {"x": x})[0]
    np.testing.assert_allclose(got, exponent / exponent.sum(axis=axes, keepdims=True), rtol=1e-5)
    assert made.opset_imports[""] == max(opset, TARGET)


def test_an_old_opset_in_a_subgraph_keeps_its_meaning() -> None:
    model = parse(
        """g (bool c, float[2, 3, 4] x) => (float[2, 3, 4] y) {
            y = If(c) <then_branch = t () => (float[2, 3, 4] p) { p = Softmax<axis = 1>(x) },
                       else_branch = e () => (float[2, 3, 4] q) { q = LogSoftmax<axis = 1>(x) }>
        }""",
        opset=11,
    )
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    import onnx_ir as ir

    got = run_reference(ir.serde.serialize_model(canonical(model)), {"c": np.array(True), "x": x})[0]
    np.testing.assert_allclose(got.reshape(2, -1).sum(axis=1), [1, 1], rtol=1e-5)


def test_the_list_of_changed_operators_is_onnxscripts_own() -> None:
    from onnxscript.version_converter import _version_converter

    adapters = {
        op: version + 1
        for (domain, op, version, up) in _version_converter.registry.op_adapters
        if up and domain == "" and version < TARGET
    }
    assert adapters == CHANGED_MEANING


def test_group_normalization_is_converted_not_relabelled() -> None:
    model = parse(
        """g (float[2, 4, 3] x) => (float[2, 4, 3] y) <float[2] s = {1.0, 2.0}, float[2] b = {0.5, -0.5}> {
            y = GroupNormalization<num_groups = 2>(x, s, b)
        }""",
        opset=18,
    )
    made = canonical(model)
    x = np.random.default_rng(1).standard_normal((2, 4, 3)).astype(np.float32)
    groups = x.reshape(2, 2, 6)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    wanted = normal * np.array([1, 2], np.float32)[:, None] + np.array([0.5, -0.5], np.float32)[:, None]
    import onnx_ir as ir

    got = run_reference(ir.serde.serialize_model(made), {"x": x})[0]
    np.testing.assert_allclose(got, wanted.reshape(2, 4, 3), rtol=1e-4, atol=1e-5)
