"""How much every node computes and moves, counted on real shapes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from pipeline import model as models
from pipeline.running.memory import open_session
from pipeline.running.session import run
from pipeline.types import Feeds

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One node's work on one batch.

    Attributes:
        products: Multiplications of a MatMul, Gemm, Conv or ConvTranspose; 0 for any other node.
        elements: Elements of its first output.
    """

    products: int
    elements: int


def count_work(path: Path, feeds: Feeds, nodes: Collection[str] = (), *, threads: int = 0) -> dict[str, Work]:
    """Return the work of all products of the main graph and of ``nodes``, by node name, on one batch.

    The model runs once with a Shape behind each of them, so that no tensor is kept.

    Args:
        path: A model without quantization.
        feeds: One batch.
        nodes: Further nodes to count.
        threads: For ONNX Runtime.

    Raises:
        EngineError: ONNX Runtime refuses the model or fails on the batch.
    """
    proto = models.read_proto(path)
    counted = [n for n in proto.graph.node if n.name and (n.op_type in PRODUCTS or n.name in nodes)]
    names: dict[str, str] = {}
    for node in counted:
        for tensor in (*node.input[:2], node.output[0]):
            if tensor and tensor not in names:
                names[tensor] = f"shape_of/{tensor}"
                proto.graph.node.append(onnx.helper.make_node("Shape", [tensor], [names[tensor]]))
    del proto.graph.output[:]
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in names.values()
    )
    if not names:
        return {}
    session = open_session(
        proto.SerializeToString(), threads=threads, optimize=False, folder=path.parent, made_from=path
    )
    wanted = {i.name: feeds[i.name] for i in session.get_inputs()}
    sizes = [tuple(int(d) for d in shape) for shape in run(session, list(names.values()), wanted)]
    shapes = dict(zip(names, sizes, strict=True))
    return {n.name: Work(products=_products(n, shapes), elements=math.prod(shapes[n.output[0]])) for n in counted}


def _products(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in PRODUCTS:
        return 0
    first, weight, made = shapes[node.input[0]], shapes[node.input[1]], math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return made * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(weight[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return made * first[0 if transposed else -1]
