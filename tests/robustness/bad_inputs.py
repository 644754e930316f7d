"""A small model with good data, and every way to spoil them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN, SAMPLES = 16, 64, 12


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.normal(size=(WIDTH, HIDDEN)).astype(np.float32),
        "b1": rng.normal(size=HIDDEN).astype(np.float32),
        "w2": rng.normal(size=(HIDDEN, WIDTH)).astype(np.float32),
    }


def model(**changes: Any) -> onnx.ModelProto:
    """x [b, 16] -> MatMul + Add -> Relu -> MatMul -> y [b, 16]; ``changes`` replace weights and names."""
    arrays = {**weights(), **{k: v for k, v in changes.items() if k in ("w1", "b1", "w2")}}
    prefix = changes.get("prefix", "")
    first: int | str = changes.get("batch", "b")
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name=f"{prefix}up"),
        helper.make_node("Add", ["m", "b1"], ["h"], name=f"{prefix}bias"),
        helper.make_node("Relu", ["h"], ["r"], name=f"{prefix}act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name=f"{prefix}down"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [first, arrays["w2"].shape[1]])],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def samples(count: int = SAMPLES, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def good(folder: Path) -> tuple[Path, Path]:
    """Write the model and its data."""
    path, data = folder / "good.onnx", folder / "good.npz"
    path.write_bytes(model().SerializeToString())
    np.savez(data, x=samples())
    return path, data


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One way to fail.

    Attributes:
        name: Test id.
        spoil: Gets the folder with the good files; returns the command line after ``quantize … -o OUT``: the model,
            and flags. ``--calibration good.npz`` is added unless they name one.
        code: Exit code.
        says: Fragments that the message must hold: what, where, what to do.
    """

    name: str
    spoil: Callable[[Path], list[str]]
    says: tuple[str, ...]
    code: int = 2
    needs: Callable[[], bool] = field(default=lambda: True)


def _write(folder: Path, data: bytes, name: str = "bad.onnx") -> list[str]:
    (folder / name).write_bytes(data)
    return [str(folder / name)]


def _model(folder: Path, proto: onnx.ModelProto) -> list[str]:
    return _write(folder, proto.SerializeToString())


def _external(folder: Path, location: str, *, length: int = 0) -> list[str]:
    """The model with its first weight in the file ``location``."""
    proto = model()
    tensor = proto.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length or size))):
        tensor.external_data.add(key=key, value=value)
    return _model(folder, proto)


def _linked(folder: Path, link: Callable[[Path, Path], None]) -> list[str]:
    secret = folder.parent / f"{folder.name}-secret.bin"
    secret.write_bytes(bytes(4 * WIDTH * HIDDEN))
    link(secret, folder / "weights.bin")
    return _external(folder, "weights.bin")


def _short(folder: Path) -> list[str]:
    (folder / "weights.bin").write_bytes(b"\0" * 100)
    return _external(folder, "weights.bin")


def _spoiled(name: str, value: float) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        array = weights()[name].copy()
        array.flat[7] = value
        return _model(folder, model(**{name: array}))

    return spoil


def _edited(change: Callable[[onnx.GraphProto], Any]) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        proto = model()
        change(proto.graph)
        return _model(folder, proto)

    return spoil


def _no_nodes(graph: onnx.GraphProto) -> None:
    for field_name in ("node", "output", "initializer"):
        graph.ClearField(field_name)


def _cycle(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = "r"


def _dangling(graph: onnx.GraphProto) -> None:
    graph.node[2].input[0] = "nowhere"


def _twice(graph: onnx.GraphProto) -> None:
    graph.node[1].output[0] = "m"
    graph.node[2].input[0] = "m"


def _foreign(graph: onnx.GraphProto) -> None:
    graph.node[2].op_type = "SuperRelu"
    graph.node[2].domain = "com.example"


def _unknown(graph: onnx.GraphProto) -> None:
    graph.node[2].op_type = "Reluu"


def _data(**arrays: Any) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        np.savez(folder / "bad.npz", **arrays)
        return [str(folder / "good.onnx"), "--calibration", str(folder / "bad.npz")]

    return spoil


def _bytes(name: str, data: bytes) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        (folder / name).write_bytes(data)
        return [str(folder / "good.onnx"), "--calibration", str(folder / name)]

    return spoil


def _half_an_npz(folder: Path) -> list[str]:
    data = (folder / "good.npz").read_bytes()
    return _bytes("half.npz", data[: len(data) // 2])(folder)


def _empty_folder(folder: Path) -> list[str]:
    (folder / "nothing").mkdir()
    return [str(folder / "good.onnx"), "--calibration", str(folder / "nothing")]


def _flags(*flags: str) -> Callable[[Path], list[str]]:
    return lambda folder: [str(folder / "good.onnx"), *flags]


def _recipe(text: str) -> Callable[[Path], list[str]]:
    def spoil(folder: Path) -> list[str]:
        (folder / "bad.yaml").write_text(text)
        return ["--recipe", str(folder / "bad.yaml")]

    return spoil


def _nan_samples() -> np.ndarray:
    values = samples()
    values[3, 5] = np.nan
    return values


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 90387606\n"

MODELS = (
    Bad(
        name="truncated",
        spoil=lambda f: _write(f, model().SerializeToString()[:3000]),
        says=("truncated", "bad.onnx", "again"),
    ),
    Bad(
        name="random-bytes",
        spoil=lambda f: _write(f, np.random.default_rng(0).bytes(5000)),
        says=("no ONNX model", "bad.onnx"),
    ),
    Bad(name="empty-file", spoil=lambda f: _write(f, b""), says=("empty", "bad.onnx")),
    Bad(name="git-lfs-pointer", spoil=lambda f: _write(f, LFS), says=("Git LFS pointer", "bad.onnx", "git lfs pull")),
    Bad(name="text-file", spoil=lambda f: _write(f, b"<html>404</html>\n" * 9), says=("no ONNX model", "bad.onnx")),
    Bad(
        name="missing-model",
        spoil=lambda f: [str(f / "nowhere.onnx")],
        says=("no such model", "nowhere.onnx", "Check the path"),
    ),
    Bad(
        name="external-missing",
        spoil=lambda f: _external(f, "weights.bin"),
        says=("External data is missing", "'w1'", "Put weights.bin beside the model"),
    ),
    Bad(
        name="external-outside",
        spoil=lambda f: _external(f, "../../etc/passwd"),
        says=("inside the model's folder", "../../etc/passwd", "'w1'"),
    ),
    Bad(
        name="external-absolute",
        spoil=lambda f: _external(f, "/etc/passwd"),
        says=("inside the model's folder", "/etc/passwd"),
    ),
    Bad(
        name="external-symlink",
        spoil=lambda f: _linked(f, lambda secret, link: link.symlink_to(secret)),
        says=("folder", "weights.bin", "w1"),
    ),
    Bad(
        name="external-hard-link",
        spoil=lambda f: _linked(f, lambda secret, link: os.link(secret, link)),
        says=("hard link", "weights.bin", "Copy"),
    ),
    Bad(name="external-short", spoil=_short, says=("shorter", "weights.bin", "truncated")),
    Bad(name="nan-weight", spoil=_spoiled("w2", np.nan), says=("NaN", "'w2'", "export")),
    Bad(name="infinite-weight", spoil=_spoiled("w1", np.inf), says=("infinite", "'w1'", "export")),
    Bad(name="empty-graph", spoil=_edited(_no_nodes), says=("no outputs", "bad.onnx")),
    Bad(name="cycle", spoil=_edited(_cycle), says=("cycle", "bad.onnx", "again")),
    Bad(name="dangling", spoil=_edited(_dangling), says=("'nowhere'", "act", "bad.onnx")),
    Bad(name="made-twice", spoil=_edited(_twice), says=("'m'", "bad.onnx")),
    Bad(name="unknown-operator", spoil=_edited(_unknown), says=("Reluu",)),
    Bad(name="foreign-operator", spoil=_edited(_foreign), says=("SuperRelu",)),
)

DATA = (
    Bad(name="data-missing", spoil=_flags("--calibration", "gone.npz"), says=("no such file", "gone.npz")),
    Bad(name="no-samples", spoil=_data(x=samples(0)), says=("no samples", "bad.npz", "at least one")),
    Bad(name="wrong-name", spoil=_data(y=samples(), z=samples()), says=("'x'", "'y', 'z'", "bad.npz")),
    Bad(name="wrong-dtype", spoil=_data(x=samples().astype(np.int64)), says=("int64", "float32", "'x'", "bad.npz")),
    Bad(name="wrong-rank", spoil=_data(x=samples()[None, None]), says=("4 dimensions", "[b, 16]", "bad.npz")),
    Bad(name="wrong-size", spoil=_data(x=samples()[:, :7]), says=("fixed at 16", "bad.npz")),
    Bad(name="pickled", spoil=_data(x=np.array([{}, None])), says=("pickled", "bad.npz", "numeric")),
    Bad(name="nan-data", spoil=_data(x=_nan_samples()), says=("NaN", "'x'", "bad.npz")),
    Bad(name="half-npz", spoil=_half_an_npz, says=("truncated", "half.npz")),
    Bad(name="no-npz", spoil=_bytes("bad.npz", b"hello"), says=("no numpy file", "bad.npz")),
    Bad(name="unknown-format", spoil=_bytes("bad.parquet", b"PAR1"), says=(".parquet", ".npz")),
    Bad(name="empty-folder", spoil=_empty_folder, says=("holds no", "nothing")),
    Bad(name="code-as-data", spoil=_flags("--calibration", "os:getcwd"), says=("code", "os:getcwd", "trust_data")),
    Bad(name="no-calibration", spoil=_flags("--calibration="), says=("calibration", "100-500")),
)

REQUESTS = (
    Bad(name="unknown-target", spoil=_flags("--target", "a1000"), says=("'a1000'", "did you mean a100", "h100")),
    Bad(name="unknown-precision", spoil=_flags("--precision", "int7"), says=("int7", "int8")),
    Bad(name="fp16-on-cpu", spoil=_flags("--precision", "fp16"), says=("CPU", "fp16", "int8")),
    Bad(name="unknown-key", spoil=_flags("--calibration.sampels", "3"), says=("sampels", "calibration.samples")),
    Bad(name="wrong-value", spoil=_flags("--samples", "0"), says=("samples", "0")),
    Bad(
        name="unknown-key-in-recipe",
        spoil=_recipe("source: {onnx: good.onnx}\ncalibraton: {data: good.npz}\n"),
        says=("calibraton", "did you mean calibration", "bad.yaml"),
    ),
    Bad(name="no-yaml", spoil=_recipe("source: [onnx"), says=("YAML", "bad.yaml", "line 1")),
    Bad(name="missing-recipe", spoil=lambda f: ["--recipe", str(f / "gone.yaml")], says=("gone.yaml", "init")),
    Bad(name="gate-on-nothing", spoil=_flags("--gate", "sqnr>=20"), says=("sqnr", "sqnr_db")),
)
