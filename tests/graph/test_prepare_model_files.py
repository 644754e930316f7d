"""Broken and hostile model files: a clear error each, and nothing read from outside the model's folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper
import pytest
from canonical_models import parse, prepare, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import model as files
from pipeline.errors import ModelError, PipelineError, StoreError

LINEAR = "g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }"


def linear(weight: np.ndarray | None = None) -> onnx.ModelProto:
    model = parse(LINEAR)
    weight = np.eye(64, dtype=np.float32) if weight is None else weight
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def external(folder: Path, location: str, *, length: int = 64 * 64 * 4) -> Path:
    model = parse(LINEAR)
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[64, 64])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    folder.mkdir(exist_ok=True)
    return save(model, folder)


def data(path: Path, size: int = 64 * 64 * 4) -> Path:
    path.write_bytes(np.zeros(size // 4, np.float32).tobytes())
    return path


def test_external_data_beside_the_model_loads(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin")
    data(tmp_path / "w.bin")
    prepared = prepare(path, tmp_path / "out" / "model.onnx")
    assert prepared.max_relative_difference == 0
    assert [f.name for f in files.files(prepared.path)] == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("location", ["../secret.bin", "../../etc/passwd", "/etc/passwd", "a/../../secret.bin", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    data(tmp_path / "secret.bin")
    with pytest.raises(ModelError, match="inside the model's folder"):
        files.load(external(tmp_path / "model", location))


def test_linked_external_data_is_refused(tmp_path: Path) -> None:
    secret = data(tmp_path / "secret.bin")
    path = external(tmp_path / "model", "w.bin")
    (tmp_path / "model" / "w.bin").symlink_to(secret)
    with pytest.raises(ModelError, match=r"folder|symbolic"):
        files.load(path)
    (tmp_path / "model" / "w.bin").unlink()
    data(tmp_path / "model" / "real.bin")
    (tmp_path / "model" / "w.bin").symlink_to("real.bin")
    with pytest.raises(ModelError, match="symbolic"):
        files.load(path)
    (tmp_path / "model" / "w.bin").unlink()
    os.link(secret, tmp_path / "model" / "w.bin")
    with pytest.raises(ModelError, match="hard links"):
        files.load(path)


def test_missing_and_short_external_data_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path, "w.bin")
    with pytest.raises(ModelError, match="missing"):
        files.load(path)
    data(tmp_path / "w.bin", 1000)
    with pytest.raises(ModelError, match="shorter"):
        files.load(path)
    data(tmp_path / "w.bin")
    with pytest.raises(ModelError, match="bytes"):
        files.load(external(tmp_path, "w.bin", length=100))


def test_a_truncated_embedded_tensor_is_refused(tmp_path: Path) -> None:
    model = linear()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    with pytest.raises(ModelError, match="16380 bytes"):
        files.load(save(model, tmp_path))


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 5000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(linear().SerializeToString()[:keep])
    with pytest.raises(ModelError):
        prepare(path, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.onnx"]


@pytest.mark.parametrize("code", [c for c in onnx.TensorProto.DataType.values() if c != onnx.TensorProto.UNDEFINED])
def test_a_list_of_values_is_as_long_as_its_shape_says(tmp_path: Path, code: int) -> None:
    proto = linear()
    try:
        tensor = onnx.helper.make_tensor("t", code, [6], ["a"] * 6 if code == onnx.TensorProto.STRING else [1] * 6)
    except (KeyError, TypeError, ValueError):
        pytest.skip("onnx makes no such tensor")
    proto.graph.initializer.append(tensor)
    files.load(save(proto, tmp_path))
    proto.graph.initializer[-1].dims[:] = [60]
    with pytest.raises(ModelError, match="by its shape has"):
        files.load(save(proto, tmp_path, "short.onnx"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        files.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(1, 4))
def test_flipped_bytes_give_an_error_or_a_model(tmp_path: Path, where: int, value: int, count: int) -> None:
    content = bytearray(
        parse(
            """g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] b = {1.0, 2.0, 3.0, 4.0}, int64[1] ax = {1}> {
                a = Add(x, b)
                m = ReduceMean<keepdims = 1>(a, ax)
                y = If(c) <then_branch = t () => (float[N, 4] p) { p = Sub(a, m) },
                           else_branch = e () => (float[N, 4] q) { q = Relu(a) }>
            }""",
            opset=18,
        ).SerializeToString()
    )
    for i in range(count):
        content[(where * (i + 1)) % len(content)] = value
    path = tmp_path / "flipped.onnx"
    path.write_bytes(bytes(content))
    with contextlib.suppress(PipelineError):  # any other exception fails the test
        prepare(path, tmp_path / "out.onnx")


def test_a_cycle_is_refused_and_disorder_is_put_right(tmp_path: Path) -> None:
    model = parse("g (float[N] x) => (float[N] y) { a = Relu(x)\n b = Neg(a)\n y = Add(a, b) }")
    model.graph.node.reverse() if hasattr(model.graph.node, "reverse") else None
    prepared = prepare(save(model, tmp_path), tmp_path / "out.onnx")
    assert [n.op_type for n in onnx.load(prepared.path).graph.node] == ["Relu", "Neg", "Add"]
    cyclic = parse("g (float[N] x) => (float[N] y) { a = Add(x, c)\n c = Neg(a)\n y = Relu(c) }")
    with pytest.raises(ModelError, match="cycle"):
        prepare(save(cyclic, tmp_path), tmp_path / "out.onnx")


def test_a_value_that_nothing_produces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'ghost'"):
        files.load(save(parse("g (float[N] x) => (float[N] y) { y = Add(x, ghost) }"), tmp_path))


def test_not_finite_weights_are_refused_by_name(tmp_path: Path) -> None:
    for value, text in ((np.nan, "NaN"), (np.inf, "infinite")):
        weight = np.eye(64, dtype=np.float32)
        weight[63, 63] = value
        with pytest.raises(ModelError, match=text) as error:
            prepare(save(linear(weight), tmp_path), tmp_path / "out.onnx")
        assert "'w'" in error.value.where
    mask = parse("g (float[N, 2] x) => (float[N, 2] y) <float[2] m = {0.0, 0.0}> { y = Add(x, m) }")
    mask.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([0, -np.inf], np.float32), "m"))
    assert prepare(save(mask, tmp_path), tmp_path / "out.onnx").max_relative_difference == 0


@pytest.mark.parametrize("name", ["層/ノルム.0:重み", "x" * 300, "a b\n\t'\"", "../../escape", "tensor: 0"])
def test_any_name_is_kept(tmp_path: Path, name: str) -> None:
    node = oh.make_node("MatMul", [name, name + "w"], [name + "y"], name=name)
    graph = oh.make_graph(
        [node],
        "g",
        [oh.make_tensor_value_info(name, 1, ["n", 64])],
        [oh.make_tensor_value_info(name + "y", 1, ["n", 64])],
        [onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), name + "w")],
    )
    source = save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10), tmp_path)
    prepared = onnx.load(prepare(source, tmp_path / "out.onnx").path)
    assert prepared.graph.node[0].name == name
    assert (prepared.graph.input[0].name, prepared.graph.output[0].name) == (name, name + "y")


def test_no_outputs_and_no_nodes(tmp_path: Path) -> None:
    empty = linear()
    del empty.graph.output[:]
    with pytest.raises(ModelError, match="no outputs"):
        files.load(save(empty, tmp_path))
    through = oh.make_model(
        oh.make_graph([], "g", [v := oh.make_tensor_value_info("x", 1, ["n", 2])], [v]),
        opset_imports=[oh.make_opsetid("", 21)],
        ir_version=10,
    )
    prepared = prepare(save(through, tmp_path), tmp_path / "out.onnx")
    assert [v.name for v in onnx.load(prepared.path).graph.output] == ["x"]


def test_an_unwritable_place_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        prepare(save(linear(), tmp_path), tmp_path / "file" / "out.onnx")
    with pytest.raises(StoreError):
        prepare(save(linear(), tmp_path), tmp_path / ("n" * 300 + ".onnx"))
    with pytest.raises(ModelError, match="cannot be read"):
        files.load(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        files.load(tmp_path)
