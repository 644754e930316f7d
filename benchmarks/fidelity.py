"""How far a quantized model is from its FP32 original, and how much of its arithmetic is INT8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

BATCH = 8
MASK = "attention_mask"
GEMMS = ("MatMul", "Gemm", "Conv")
INTEGER = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
MOVES = ("Transpose", "Reshape", "Cast", "Identity", "Relu", "MaxPool")
"""What may stand between a DequantizeLinear and the operator that reads it, without the operand being less INT8."""
Array = npt.NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Outputs compared with FP32's on held-out samples.

    Attributes:
        sqnr_db: ``10 log10(sum ref^2 / sum (ref - out)^2)``, all outputs and samples together.
        cosine: Mean cosine of the rows (tokens, or samples where the output has no tokens).
    """

    sqnr_db: float
    cosine: float


def load(path: Path) -> Feeds:
    """Return the arrays of an ``.npz``."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def open_session(model: Path, threads: int = 1, *, optimize: bool = True) -> ort.InferenceSession:
    """Return a session as anyone would open it: everything at its default but the number of threads.

    Without ``optimize`` every node runs as it stands in the graph.
    """
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def outputs(model: Path, data: Feeds, threads: int = 2, *, optimize: bool = True) -> list[Array]:
    """Return the first output as rows ``[tokens or samples, width]`` (float64) of each batch, without padding."""
    live = open_session(model, threads, optimize=optimize)
    rows = []
    for start in range(0, len(next(iter(data.values()))), BATCH):
        feeds = {name: values[start : start + BATCH] for name, values in data.items()}
        values = np.asarray(live.run(None, feeds)[0], np.float64)
        mask = feeds.get(MASK)
        if mask is not None and values.ndim == 3:
            values = values[mask > 0]
        rows.append(values.reshape(-1, values.shape[-1]))
    return rows


def compare(reference: list[Array], candidate: list[Array]) -> Fidelity:
    """Return the fidelity of what :func:`outputs` gave for FP32 and for a quantized model."""
    ref, out = np.concatenate(reference), np.concatenate(candidate)
    noise = float(np.square(ref - out).sum())
    norms = np.linalg.norm(ref, axis=1) * np.linalg.norm(out, axis=1)
    cosine = np.einsum("ij,ij->i", ref, out) / np.maximum(norms, 1e-12)
    signal = float(np.square(ref).sum())
    return Fidelity(
        sqnr_db=10.0 * math.log10(signal / noise) if noise else math.inf,
        cosine=float(cosine.mean()),
    )


def int8_share(model: Path, data: Feeds) -> float:
    """Return the share of multiplications in MatMul, Gemm and Conv whose operands are both INT8, at a batch of 8.

    An operand is INT8 if it comes from a DequantizeLinear; shapes come from ONNX shape inference on fixed inputs.
    """
    proto = onnx.load(model)
    for value in proto.graph.input:
        if value.name in data:
            shape = (BATCH, *data[value.name].shape[1:])
            for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                dim.dim_value = size
    del proto.graph.value_info[:]  # what the file says of a dynamic batch would be believed
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    makers = {name: node for node in graph.node for name in node.output}
    total = low = 0
    for node in graph.node:
        if node.op_type in GEMMS or node.op_type in INTEGER:
            products = _products(node, shapes)
            total += products
            low += products * (node.op_type in INTEGER or all(_is_int8(i, makers) for i in node.input[:2]))
    return low / total


def _products(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    weight = shapes[node.input[3 if node.op_type.startswith("QLinear") else 1]]
    result = math.prod(shapes[node.output[0]])
    if not result:
        raise ValueError(f"the shape of {node.output[0]} is not known")
    if "Conv" in node.op_type:
        return result * math.prod(weight[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return result * (weight[-1] if transposed or len(weight) == 1 else weight[-2])


def _is_int8(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    while name in makers and makers[name].op_type in MOVES:
        name = makers[name].input[0]
    return name in makers and makers[name].op_type == "DequantizeLinear"
