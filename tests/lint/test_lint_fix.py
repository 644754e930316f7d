"""Repairs leave a valid model whose outputs, by ONNX Runtime, are the same or close."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T

from pipeline.lint.finding import Severity
from pipeline.lint.lint import fix
from pipeline.running.session import run, session
from pipeline.types import Array
from tests.lint import placements
from tests.lint.draft import Draft
from tests.lint.suites import SUITES, biased, generate

EVERYTHING = tuple(Severity)


def draft(float_type: int = T.FLOAT) -> Draft:
    return Draft(rng=np.random.default_rng(0), float_type=float_type, opset=21)


def outputs(path: Path) -> list[Array]:
    live = session(path, optimize=False)
    rng = np.random.default_rng(1)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {i.name: rng.standard_normal(i.shape).astype(types[i.type]) for i in live.get_inputs()}
    return [np.asarray(v, np.float64) for v in run(live, None, feeds)]


def repaired(tmp_path: Path, model: bytes, **options: tuple[Severity, ...]) -> tuple[Path, Path, dict[str, int]]:
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    # The checker wants the shape of every output, which a draft does not say.
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model)), before)
    done = fix(before, after, **options)
    onnx.checker.check_model(str(after))
    return before, after, dict(done.changes)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def close(before: Path, after: Path, least_db: float) -> None:
    for old, new in zip(outputs(before), outputs(after), strict=True):
        noise = float(np.square(old - new).sum())
        assert noise == 0 or 10 * np.log10(np.square(old).sum() / noise) >= least_db


@pytest.mark.parametrize("dtype", [T.INT32, T.INT8])
def test_a_quantized_bias_becomes_float(tmp_path: Path, dtype: int) -> None:
    for case in generate(lambda rng: biased(rng, dtype=dtype), 9, seed=5):
        before, after, done = repaired(tmp_path, case.model)
        assert done == {"QDQ107": 1}
        assert operators(after)["DequantizeLinear"] == operators(before)["DequantizeLinear"] - 1
        close(before, after, least_db=55)  # a FP16 bias is rounded once in both


def test_a_bias_behind_a_pair_becomes_what_it_was(tmp_path: Path) -> None:
    d = draft()
    bias = d.pair(d.constant(d.rng.standard_normal(8)), 0.02)
    made = d.node("Gemm", [d.pair(d.input((4, 16))), d.weight((16, 8)), bias])
    before, after, done = repaired(tmp_path, d.model((made, None)))
    assert done == {"QDQ107": 1}
    assert operators(after) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Gemm": 1}
    close(before, after, least_db=30)


def test_pairs_that_nothing_reads_are_dropped(tmp_path: Path) -> None:
    d = draft()
    x = d.input((4, 16))
    d.pair(x)
    d.quantize(x, d.constant(0.1), d.constant(0, T.INT8))
    before, after, done = repaired(tmp_path, d.model((d.node("Relu", [x]), None)))
    assert set(done) == {"QDQ201", "QDQ202"}
    assert operators(after) == {"Relu": 1}
    close(before, after, least_db=200)


@pytest.mark.parametrize("convolve", [True, False])
def test_concat_branches_share_the_largest_scale(tmp_path: Path, convolve: bool) -> None:
    before, after, done = repaired(tmp_path, placements.concatenated(shared=False, convolve=convolve))
    assert done == {"QDQ205": 1}
    graph = onnx.load(after).graph
    scales = {i.name: float(onnx.numpy_helper.to_array(i)) for i in graph.initializer if not i.dims}
    used = {scales[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"}
    assert used == {float(np.float16(0.03))}
    close(before, after, least_db=20)


def test_one_add_branch_is_freed_only_when_notes_are_repaired_too(tmp_path: Path) -> None:
    model = placements.residual(both=True)
    _, _, done = repaired(tmp_path, model)
    assert done == {}
    before, after, done = repaired(tmp_path, model, severities=EVERYTHING)
    assert done == {"QDQ206": 1}
    add = next(n for n in onnx.load(after).graph.node if n.op_type == "Add")
    made = {o: n.op_type for n in onnx.load(after).graph.node for o in n.output}
    assert sorted(made[i] for i in add.input) == ["Conv", "DequantizeLinear"]
    close(before, after, least_db=20)


@pytest.mark.parametrize(
    "places", [("query", "key"), ("query",), ("query", "key", "scores", "probabilities", "value"), ("value",)]
)
def test_an_attention_core_that_would_not_fuse_is_freed(tmp_path: Path, places: tuple[str, ...]) -> None:
    _, after, done = repaired(tmp_path, placements.attention(places, float_type=T.FLOAT))
    assert done == {"QDQ209": 1}
    assert operators(after)["DequantizeLinear"] == 0
    (tmp_path / "float.onnx").write_bytes(placements.attention((), float_type=T.FLOAT))
    for old, new in zip(outputs(tmp_path / "float.onnx"), outputs(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_core_that_fuses_is_left_alone(tmp_path: Path) -> None:
    _, after, done = repaired(tmp_path, placements.attention(placements.INT8_CORE))
    assert done == {}
    assert operators(after)["DequantizeLinear"] == 5


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("float_type", [T.FLOAT, T.FLOAT16])
def test_dead_weight_channels_get_a_scale_that_tensorrt_takes(
    tmp_path: Path, float_type: int, per_channel: bool
) -> None:
    d = draft(float_type)
    scale = np.full(8, 0.02) if per_channel else np.zeros(())
    scale.reshape(-1)[0] = 1e-9 if float_type == T.FLOAT16 else 0
    weight = d.dequantize(
        d.constant(d.codes((16, 8)), T.INT8), d.constant(scale), **({"axis": 1} if per_channel else {})
    )
    model = d.model((d.node("MatMul", [d.pair(d.input((4, 16))), weight]), None))
    before, after, done = repaired(tmp_path, model)
    assert done == {"QDQ104": 1}
    for old, new in zip(outputs(before), outputs(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_uint8_and_shifted_pairs_are_left_alone(tmp_path: Path) -> None:
    for suite in SUITES:
        if suite.rule in ("QDQ101", "QDQ106"):
            for case in generate(suite.faulty, 3, seed=1):
                (tmp_path / "b.onnx").write_bytes(case.model)
                assert dict(fix(tmp_path / "b.onnx", tmp_path / "a.onnx").changes) == {}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = placements.concatenated(shared=False)
    _, after, _ = repaired(tmp_path, model)
    first = after.read_bytes()
    assert repaired(tmp_path, model)[1].read_bytes() == first


def test_what_is_repaired_is_not_found_again(tmp_path: Path) -> None:
    (tmp_path / "b.onnx").write_bytes(placements.attention(("query", "key")))
    done = fix(tmp_path / "b.onnx", tmp_path / "a.onnx")
    assert [f.rule for f in done.report.findings] == []
