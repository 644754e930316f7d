"""A transformer of any size with random weights, and what the line costs on it in time and memory.

    pip install '.[rtx]'
    python -m benchmarks.compiled_large --parameters 1e9 --target a100 --precision int8

The model is written with external data, one tensor in memory at a time: layers of pre-norm attention (one head group,
no mask) and a GELU FFN of four times the width. The commands are run as a user would run them, and the peak resident set
of each one's process tree is measured from outside.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.processes import measured

TOKENS = 32
HEAD = 64
STAGES = ("calibrate", "quantize", "build")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Width and depth of a transformer.

    Attributes:
        width: Features of a token, a multiple of 64.
        layers: Blocks.
    """

    width: int
    layers: int

    @property
    def parameters(self) -> int:
        """Return how many weights the GEMMs have: 12 times the width squared in each layer."""
        return 12 * self.width**2 * self.layers


def shape_of(parameters: float) -> Shape:
    """Return a shape with about that many parameters, proportioned like published models (width about 85 x depth)."""
    layers = max(1, round((parameters / 12 / 85**2) ** (1 / 3)))
    width = max(HEAD, round((parameters / 12 / layers) ** 0.5 / HEAD) * HEAD)
    return Shape(width=width, layers=layers)


def write(path: Path, shape: Shape, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
    """Write the model: input ``x`` ``[batch, tokens, width]`` float32, output ``y`` the same."""
    made = _Writer(shape.width, dtype)
    x = ir.Value(name="x", shape=ir.Shape(["batch", TOKENS, shape.width]), type=ir.TensorType(ir.DataType.FLOAT))
    value = made.cast(x, dtype)
    for index in range(shape.layers):
        value = made.block(value, f"/layer.{index}")
    y = made.cast(made.norm(value, "/norm"), ir.DataType.FLOAT)
    y.name, y.shape, y.type = "y", ir.Shape(["batch", TOKENS, shape.width]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=made.nodes, initializers=made.weights, opset_imports={"": 21}, name="large")
    ir.save(ir.Model(graph, ir_version=10), path, external_data=f"{path.name}.data")


class _Writer:
    """Collects the nodes and lazily drawn weights of a transformer."""

    def __init__(self, width: int, dtype: ir.DataType) -> None:
        self.width, self.dtype = width, dtype
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self._drawn: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}

    def block(self, x: ir.Value, name: str) -> ir.Value:
        heads = self.width // HEAD
        normed = self.norm(x, f"{name}/norm1")
        q, k, v = (
            self.op("Transpose", [self.op("Reshape", [self.linear(normed, self.width, f"{name}/attention/{part}"),
                    self.constant([0, 0, heads, HEAD])], f"{name}/attention/{part}/Reshape")],
                    f"{name}/attention/{part}/Transpose", perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3])
            for part in ("query", "key", "value")
        )  # fmt: skip
        scores = self.op("MatMul", [q, k], f"{name}/attention/scores")
        scale = self.constant(np.asarray(HEAD**-0.5, dtype=self.dtype.numpy()))
        shares = self.op(
            "Softmax",
            [self.op("Mul", [scores, scale], f"{name}/attention/scale")],
            f"{name}/attention/softmax",
            axis=-1,
        )
        mixed = self.op("Transpose", [self.op("MatMul", [shares, v], f"{name}/attention/context")],
                        f"{name}/attention/merge", perm=[0, 2, 1, 3])  # fmt: skip
        flat = self.op("Reshape", [mixed, self.constant([0, 0, self.width])], f"{name}/attention/flat")
        x = self.op("Add", [x, self.linear(flat, self.width, f"{name}/attention/output")], f"{name}/residual1")
        up = self.op("Gelu", [self.linear(self.norm(x, f"{name}/norm2"), 4 * self.width, f"{name}/ffn/up")],
                     f"{name}/ffn/gelu")  # fmt: skip
        return self.op("Add", [x, self.linear(up, self.width, f"{name}/ffn/down")], f"{name}/residual2")

    def linear(self, x: ir.Value, width: int, name: str) -> ir.Value:
        inner = 4 * self.width if name.endswith("ffn/down") else self.width
        weight = self._weight(f"{name}.weight", (inner, width), inner**-0.5)
        bias = self._weight(f"{name}.bias", (width,), 0.02)
        return self.op("Add", [self.op("MatMul", [x, weight], f"{name}/MatMul"), bias], f"{name}/Add")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        ones = np.ones(self.width, dtype=self.dtype.numpy())
        return self.op("LayerNormalization", [x, self.constant(ones), self.constant(ones * 0)], name, axis=-1)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", [x], f"/cast{len(self.nodes)}", to=int(dtype))

    def op(self, kind: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes or None, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: object) -> ir.Value:
        tensor = ir.tensor(np.asarray(value, dtype=np.int64) if isinstance(value, list) else value)  # type: ignore[arg-type]
        return self._initializer(f"constant{len(self.weights)}", tensor)

    def _weight(self, name: str, shape: tuple[int, ...], deviation: float) -> ir.Value:
        dtype, number = self.dtype, len(self.weights)

        def draw() -> ir.TensorProtocol:
            values = np.random.default_rng(number).standard_normal(shape, dtype=np.float32)
            values *= np.float32(deviation)
            return ir.tensor(values.astype(dtype.numpy()))

        return self._initializer(name, ir.LazyTensor(draw, dtype=dtype, shape=ir.Shape(shape), name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        return value


def samples(path: Path, shape: Shape, count: int) -> None:
    """Write ``count`` random samples of the model's input as ``.npz``."""
    values = np.random.default_rng(0).standard_normal((count, TOKENS, shape.width), dtype=np.float32)
    np.savez(path, x=values)


def run(folder: Path, parameters: float, target: str, precision: str) -> Iterator[str]:
    """Build the model with the whole command and say what it cost."""
    shape = shape_of(parameters)
    model, data = folder / "large.onnx", folder / "data.npz"
    write(model, shape)
    samples(data, shape, 8)
    size = sum(f.stat().st_size for f in folder.glob("large.onnx*"))
    yield f"{shape.parameters / 1e9:.2f} billion parameters, width {shape.width}, {shape.layers} layers, {size / 1e9:.2f} GB"
    out = folder / "build"
    rest = [str(model), "--precision", precision, "--target", target, "--calibration", str(data),
            "--calibration.batch_size", "4", "--method", "minmax", "-o", str(out)]  # fmt: skip
    for stage in STAGES:  # each goes on where the last one stopped, in a process of its own
        cost = measured([sys.executable, "-m", "pipeline", stage, *rest])
        yield (
            f"{stage}: {cost.wall_seconds:.0f} s, {cost.cpu_seconds:.0f} CPU s, "
            f"peak RSS {cost.peak_rss_bytes / 1e9:.2f} GB"
        )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))["targets"][target]
    compiled = report["compiled"]
    yield f"status {report['status']}: {report['reason']}"
    yield f"compiled: {compiled['kernels']} kernels, {compiled['low_precision_flops_share']:.1%} of the FLOPs low precision"


def main() -> None:
    """Run the benchmark that the command line asks for; what it writes is deleted after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--target", default="a100")
    parser.add_argument("--precision", default="int8")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in run(Path(folder), given.parameters, given.target, given.precision):
            print(line, flush=True)


if __name__ == "__main__":
    main()
