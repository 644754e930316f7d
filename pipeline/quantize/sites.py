"""Where Q/DQ pairs go: the placement rules of each family, as a list of tensors and who reads their pair.

``gpu-*`` (TensorRT): on every activation input of a quantized node and on nothing else; of a residual add only the
skip branch, because the other one is fused into the convolution that makes it.

``cpu`` (ONNX Runtime): MatMul becomes ``MatMulIntegerToFloat`` from its input pair alone. ``QLinearConv`` and
``QLinearAdd`` exist only with a quantized output, so there the output gets a pair too, behind a Relu or Clip that is
its only reader (the kernel saturates for free), and everything reads the pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.types import QuantSpec, Role

COMMUTING = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Operators that move or select values: their output has their input's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One Q/DQ pair on an activation.

    Attributes:
        tensor: The tensor that is quantized.
        spec: Its format.
        readers: (node name, input index) that read the pair; ``None`` means every reader and the graph output.
        roles: Roles of the nodes that read it, for choosing one calibrator per kind of layer.
    """

    tensor: str
    spec: QuantSpec
    readers: tuple[tuple[str, int], ...] | None
    roles: tuple[Role, ...]


def sites(model: ir.Model, plan: PrecisionPlan) -> tuple[Site, ...]:
    """Return every activation Q/DQ pair that ``plan`` asks for, in graph order, one per tensor and format."""
    entries = {n.node: n for n in plan.nodes}
    readers: dict[tuple[str, QuantSpec], list[tuple[str, int]]] = {}
    roles: dict[tuple[str, QuantSpec], list[Role]] = {}
    whole: set[str] = set()
    for node in model.graph:
        entry = entries.get(node.name or "")
        found = operands(node)
        if entry is None or not entry.precision.quantized or found is None:
            continue
        form = plan.formats[entry.precision]
        for index in _inputs(node, found, plan.family):
            value = node.inputs[index]
            assert value is not None
            spec = form.second if found.weight is None and index == 1 and node.op_type == "MatMul" else form.activations
            key = (value.name or "", spec)
            readers.setdefault(key, []).append((node.name or "", index))
            roles.setdefault(key, []).append(entry.role)
        if plan.family == "cpu" and node.op_type in ("Conv", "Add"):
            key = (_output(node).name or "", form.activations)
            readers.setdefault(key, [])
            roles.setdefault(key, []).append(entry.role)
            whole.add(key[0])
    return tuple(
        Site(tensor=t, spec=s, readers=None if t in whole else tuple(r), roles=tuple(dict.fromkeys(roles[t, s])))
        for (t, s), r in readers.items()
    )


def range_source(model: ir.Model, tensor: str, known: Iterable[str]) -> str:
    """Return the tensor whose range ``tensor`` shares: itself, or the quantized one it is only a rearrangement of.

    ONNX Runtime and TensorRT both move a pair across such operators only if both sides have one scale.
    """
    quantized = set(known)
    values = {v.name: v for node in model.graph for v in node.outputs}
    current = tensor
    while (value := values.get(current)) is not None:
        producer = value.producer()
        if producer is None or producer.op_type not in COMMUTING or producer.inputs[0] is None:
            break
        current = producer.inputs[0].name or ""
        if current in quantized:
            tensor = current
    return tensor


def _inputs(node: ir.Node, found: Operands, family: str) -> tuple[int, ...]:
    if node.op_type != "Add" or family == "cpu":
        return found.activations
    skip = [i for i in (0, 1) if not _made_by_convolution_alone(node.inputs[i])]
    return tuple(skip[:1]) if skip else (1,)


def _made_by_convolution_alone(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Conv" and value is not None and len(value.uses()) == 1


def _output(node: ir.Node) -> ir.Value:
    value = node.outputs[0]
    uses = value.uses()
    if len(uses) == 1 and not value.is_graph_output() and next(iter(uses))[0].op_type in ("Relu", "Clip"):
        return next(iter(uses))[0].outputs[0]
    return value
