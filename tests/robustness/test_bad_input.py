"""Whatever is wrong with what the user gives: a short message and a build directory in which the next build succeeds."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from bad_inputs import DATA, MODELS, REQUESTS, Bad, good, model, samples, weights
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]
UNFINISHED = (".work", ".tmp", "crash-")


def quantize(*args: str, out: Path) -> Result:
    return CliRunner().invoke(app, ["quantize", *args, "-o", str(out), "--threads", "1"])


def message(result: Result) -> str:
    """Return the error that was printed, without what progress and warnings said before it."""
    return result.stderr[result.stderr.index("error: ") :]


def assert_clean(result: Result, code: int, says: tuple[str, ...]) -> None:
    text = " ".join(message(result).split())
    assert result.exit_code == code, result.output
    for fragment in says:
        assert fragment in text
    assert "Traceback" not in result.output
    assert "bug" not in text
    assert len(text) < 700, "a message is a few lines"
    assert result.stdout == "", "stdout is for results"


def assert_nothing_half_written(out: Path) -> None:
    left = [p for p in out.rglob("*") if any(mark in p.name for mark in UNFINISHED)] if out.exists() else []
    assert not left
    assert not list(out.glob("variants/*/model.onnx*"))


def assert_good_build(folder: Path, out: Path) -> None:
    result = quantize(str(folder / "good.onnx"), "--calibration", str(folder / "good.npz"), out=out)
    assert result.exit_code == 0, result.output
    assert_computes(out / "variants" / "cpu" / "model.onnx", samples(), weights())


def assert_computes(variant: Path, x: np.ndarray, arrays: dict[str, np.ndarray], least_db: float = 20.0) -> None:
    """Compare the variant in ONNX Runtime with numpy."""
    onnx.checker.check_model(str(variant), full_check=True)
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load(variant).graph.node)
    want = np.maximum(x.astype(np.float64) @ arrays["w1"] + arrays["b1"], 0) @ arrays["w2"]
    session = ort.InferenceSession(str(variant), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x})[0]
    assert got.shape == want.shape
    assert 10 * np.log10(np.square(want).sum() / np.square(want - got).sum()) > least_db


@pytest.mark.parametrize("bad", [*MODELS, *DATA, *REQUESTS], ids=lambda bad: bad.name)
def test_a_clear_error_and_nothing_half_written(bad: Bad, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good(folder)
    args = bad.spoil(folder)
    if "--calibration=" in args:
        args.remove("--calibration=")
    elif not {"--calibration", "--recipe"} & set(args):
        args += ["--calibration", str(folder / "good.npz")]
    result = quantize(*args, out=out)
    assert_clean(result, bad.code, bad.says)
    assert_nothing_half_written(out)
    assert_good_build(folder, out)


# ---- values that are odd but valid ---------------------------------------------------------------------------------


def test_constant_and_zero_activations_are_quantized_and_said(tmp_path: Path) -> None:
    good(tmp_path)
    np.savez(tmp_path / "zero.npz", x=np.zeros((12, 16), np.float32))
    out = tmp_path / "out"
    result = quantize(str(tmp_path / "good.onnx"), "--calibration", str(tmp_path / "zero.npz"), out=out)
    assert result.exit_code == 0
    text = " ".join(result.stderr.split())
    assert "same in every sample" in text
    assert "one single value on all calibration data" in text
    variant = ort.InferenceSession(str(out / "variants/cpu/model.onnx"))
    got = variant.run(None, {"x": np.zeros((2, 16), np.float32)})[0]
    arrays = weights()
    want = np.maximum(arrays["b1"], 0) @ arrays["w2"]
    assert 10 * np.log10(np.square(want).sum() / np.square(want - got[0]).sum()) > 20


def test_zero_size_activations(tmp_path: Path) -> None:
    """A tensor without values has no range: refused by name, unless nothing needs its range."""
    proto = model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 0
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "none.npz", x=samples(0))
    result = quantize(str(tmp_path / "bad.onnx"), "--calibration", str(tmp_path / "none.npz"), out=tmp_path / "out")
    assert_clean(result, 2, ("no values", "tensor x", "calibration data"))
    assert_nothing_half_written(tmp_path / "out")


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_an_all_zero_channel_stays_zero(target: str, tmp_path: Path) -> None:
    arrays = weights()
    arrays["w2"][:, 3] = 0.0
    arrays["w1"][:, 5] = 0.0
    (tmp_path / "m.onnx").write_bytes(model(**arrays).SerializeToString())
    np.savez(tmp_path / "c.npz", x=samples())
    out = tmp_path / "out"
    result = quantize(str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "c.npz"), "--target", target, out=out)
    assert result.exit_code == 0, result.output
    variant = next(out.glob("variants/*/model.onnx"))
    assert_computes(variant, samples(), arrays)
    got = ort.InferenceSession(str(variant)).run(None, {"x": samples()})[0]
    assert not got[:, 3].any()


UNICODE = "層/ü ñ:'\"*[x]{}%s🙂\u202e"


@pytest.mark.parametrize(
    "prefix", [UNICODE, "n" * 300, "a/" * 150, "", "../../x"], ids=["unicode", "300", "deep", "empty", "dots"]
)
def test_names_are_only_names(prefix: str, tmp_path: Path) -> None:
    good(tmp_path)
    proto = model(prefix=prefix)
    names = {name: f"{prefix or 't'}-{name}" for name in ("w1", "b1", "w2", "m", "h", "r")}
    graph = proto.graph
    for node in graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        if not prefix:
            node.name = ""
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    out = tmp_path / "out"
    args = (str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "good.npz"), "--target", "cpu", "--target", "t4")
    assert quantize(*args, out=out).exit_code == 0
    for family in ("cpu", "gpu-int8"):
        assert_computes(out / "variants" / family / "model.onnx", samples(), weights())
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert shown.exit_code == 0, shown.output
    assert {p.parts[len(out.parts)] for p in out.rglob("*")} <= {
        ".lock", ".stages", "calibration", "model.fp32.onnx", "model.fp32.onnx.data", "variants"
    }  # fmt: skip


def test_odd_names_of_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "日本 ü [x] 'q' {a} %d 🙂"
    folder.mkdir()
    path, data = good(folder)
    long = path.rename(folder / ("ö" * 120 + ".onnx"))
    result = quantize(str(long), "--calibration", str(data), out=folder / "o u t")
    assert result.exit_code == 0, result.output
    assert_computes(folder / "o u t" / "variants/cpu/model.onnx", samples(), weights())


# ---- the place to write to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.write_text("hello") and p, ("build directory", "choose another -o DIR")),
        (lambda p: p.write_text("hello") and p / "sub", ("build directory", "choose another -o DIR")),
        (lambda p: Path("/proc/nowhere"), ("build directory", "/proc/nowhere", "choose another -o DIR")),
        (lambda p: p / ("x" * 300), ("build directory", "choose another -o DIR")),
        (lambda p: p.symlink_to(p.parent / "gone" / "away") or p, ("build directory", "choose another -o DIR")),
    ],
    ids=["a-file", "below-a-file", "proc", "name-too-long", "dangling-link"],
)
def test_a_place_that_cannot_be_written(make, says: tuple[str, ...], tmp_path: Path) -> None:
    path, data = good(tmp_path)
    out = make(tmp_path / "out")
    before = (tmp_path / "out").read_bytes() if (tmp_path / "out").is_file() else None
    result = quantize(str(path), "--calibration", str(data), out=out)
    assert_clean(result, 2, says)
    assert before is None or (tmp_path / "out").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    path, data = good(tmp_path)
    out = tmp_path / "out"
    out.mkdir(mode=0o500)
    assert_clean(quantize(str(path), "--calibration", str(data), out=out), 2, ("permission", "-o DIR"))


LIMITS = (0, 60, 700, 3000, 5000, 9000, 20000)
"""Bytes that a file may have: each stops another stage (the model's weights have 8 kB, its int8 ones 2 kB)."""


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    path, data = good(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline", "quantize", str(path), "--calibration", str(data), "-o", str(out)]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [*command, "--threads", "1"],
        cwd=ROOT,
        preexec_fn=full,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 0:
        assert limit >= 9000
    else:
        assert done.returncode == 2, done.stderr
        text = " ".join(done.stderr.split())
        assert "disk is full" in text or "could not be written" in text
        assert "Free some" in text
        assert "Traceback" not in done.stderr
    assert_nothing_half_written(out) if done.returncode else None
    assert_good_build(tmp_path, out)


# ---- graphs that ask too much --------------------------------------------------------------------------------------


def test_a_custom_operator_is_named(tmp_path: Path) -> None:
    proto = model()
    proto.graph.node[2].op_type, proto.graph.node[2].domain = "SuperRelu", "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "c.npz", x=samples())
    result = quantize(str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "c.npz"), out=tmp_path / "out")
    assert_clean(result, 2, ("com.example:SuperRelu", "operator", "model.fp32.onnx"))


@pytest.mark.parametrize("shape", [(), (1,), (64,), (1, 64), (12, 1), (12, 64)])
@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}], ids=str)
def test_every_kind_of_gemm(shape: tuple[int, ...], attributes: dict[str, float], tmp_path: Path) -> None:
    """A bias may be a scalar, a row, a column or a matrix; only a row is quantized with the accumulator's scale."""
    rng = np.random.default_rng(0)
    x, w = samples(), rng.normal(size=(16, 64)).astype(np.float32)
    bias = np.asarray(3 * rng.normal(size=shape), np.float32)
    given = np.ascontiguousarray(x.T) if attributes.get("transA") else x
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"], name="g", **attributes)
    stored = np.ascontiguousarray(w.T) if attributes.get("transB") else w
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (12, 64))],
        [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(bias, "c")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "c.npz", x=given)
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(
        "source: {onnx: m.onnx}\ncalibration: {data: c.npz, method: minmax}\ntargets: [cpu, t4]\n"
        "policy: {preset: int8-all, rules: [{op_type: Gemm, precision: int8}]}\n"
    )
    result = quantize("--recipe", str(tmp_path / "r.yaml"), out=out)
    assert result.exit_code == 0, result.output
    want = attributes.get("alpha", 1.0) * (x.astype(np.float64) @ w) + attributes.get("beta", 1.0) * bias
    for variant in out.glob("variants/*/model.onnx"):
        for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
            options = ort.SessionOptions()
            options.graph_optimization_level = level
            got = ort.InferenceSession(str(variant), options).run(None, {"x": given})[0]
            assert 10 * np.log10(np.square(want).sum() / np.square(want - got).sum()) > 25, variant
