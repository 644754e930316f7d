"""Where Q/DQ pairs go: the placement rules of each family, as a list of tensors and who reads their pair.

``gpu-*`` (TensorRT): on every activation input of a quantized node and on nothing else; of a residual add only the
skip branch, because the other one is fused into the convolution that makes it.

``cpu`` (ONNX Runtime): MatMul becomes ``MatMulIntegerToFloat`` from its input pair alone. ``QLinearConv`` and
``QLinearAdd`` exist only with a quantized output, so there the output gets a pair too, behind a Relu or Clip at 0 that is its only
reader (the kernel saturates for free), and everything reads the pair.

A tensor that only rearranges another one has that one's range, because both runtimes move a pair across such
operators only if both sides have one scale. TensorRT moves it across Concat too if all inputs have one scale; ONNX
Runtime's QLinearConcat takes a scale for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import NodePlan, PrecisionPlan
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
        observed: Tensors whose statistics together give the range; sites that must have one scale name the same.
    """

    tensor: str
    spec: QuantSpec
    readers: tuple[tuple[str, int], ...] | None
    roles: tuple[Role, ...]
    observed: tuple[str, ...]


def sites(model: ir.Model, plan: PrecisionPlan) -> tuple[Site, ...]:
    """Return every activation Q/DQ pair that ``plan`` asks for, in graph order, one per tensor and format."""
    entries = {n.node: n for n in plan.nodes}
    readers: dict[tuple[str, QuantSpec], list[tuple[str, int]]] = {}
    roles: dict[tuple[str, QuantSpec], list[Role]] = {}
    whole: set[tuple[str, QuantSpec]] = set()
    gemms = plan.family != "cpu"
    for node in model.graph:
        entry = entries.get(node.name or "")
        if entry is not None and entry.role is Role.KV_CACHE and entry.precision.quantized:
            # Symmetric on every target, as the second operand of the attention matmuls that read the cache.
            spec = plan.formats[entry.precision].second
            assert spec is not None
            key = (_name(node.inputs[1]), spec)
            readers.setdefault(key, []).append((node.name or "", 1))
            roles.setdefault(key, []).append(entry.role)
            continue
        found = operands(node)
        if entry is None or not entry.precision.quantized or found is None:
            continue
        form = plan.formats[entry.precision]
        if form.activations is None:
            continue
        if gemms and entry.role is Role.RESIDUAL_ADD and (shared := _shared_skip(node, entries)) is not None:
            reader, index = shared
            key = (_name(reader.inputs[index]), form.activations)
            readers.setdefault(key, []).append((reader.name or "", index))
            roles.setdefault(key, []).append(entry.role)
            continue
        for index in _inputs(node, found, plan.family):
            value = node.inputs[index]
            assert value is not None
            second = found.weight is None and index == 1 and node.op_type == "MatMul"
            spec = form.second if second and form.second is not None else form.activations
            key = (value.name or "", spec)
            readers.setdefault(key, []).append((node.name or "", index))
            roles.setdefault(key, []).append(entry.role)
        if plan.family == "cpu" and node.op_type in ("Conv", "Add"):
            key = (_output(node).name or "", form.activations)
            readers.setdefault(key, [])
            roles.setdefault(key, []).append(entry.role)
            whole.add(key)
    observed = _observed(model, dict.fromkeys(t for t, _ in readers), concat=plan.family != "cpu")
    return tuple(
        Site(
            tensor=t,
            spec=s,
            readers=None if (t, s) in whole else tuple(r),
            roles=tuple(dict.fromkeys(roles[t, s])),
            observed=observed[t],
        )
        for (t, s), r in readers.items()
    )


def _observed(model: ir.Model, tensors: dict[str, None], *, concat: bool) -> dict[str, tuple[str, ...]]:
    """Return for each quantized tensor those whose statistics give its range, in ``tensors``' order."""
    one_scale = {name: {name} for name in tensors}
    met: dict[ir.Value, set[str]] = {v: {v.name or ""} & tensors.keys() for v in model.graph.inputs}
    same: dict[ir.Value, str] = {v: v.name or "" for v in model.graph.inputs if v.name in tensors}
    copies: set[str] = set()
    for node in model.graph:
        moves = node.op_type in COMMUTING
        read = node.inputs[:1] if moves else node.inputs if concat and node.op_type == "Concat" else ()
        meeting = {name for value in read if value is not None for name in met.get(value, ())}
        original = same.get(read[0]) if moves and read and read[0] is not None else None
        for value in node.outputs:
            name = value.name or ""
            met[value] = {name} if name in tensors else meeting
            if original is not None or name in tensors:
                same[value] = original or name
            if name in tensors:
                copies |= {name} if original is not None else set()
                joined = {name}.union(*(one_scale[other] for other in meeting))
                one_scale |= dict.fromkeys(joined, joined)
    return {name: tuple(t for t in tensors if t in one_scale[name] and t not in copies) for name in tensors}


def _inputs(node: ir.Node, found: Operands, family: str) -> tuple[int, ...]:
    if node.op_type != "Add" or family == "cpu":
        return found.activations
    skip = [i for i in (0, 1) if not _made_by_convolution_alone(node.inputs[i])]
    return tuple(skip[:1]) if skip else (1,)


def _shared_skip(add: ir.Node, entries: Mapping[str, NodePlan]) -> tuple[ir.Node, int] | None:
    """Return who reads, for a residual add, a tensor that quantized GEMMs read anyway, and as which input.

    That is the add itself, or the first of the elementwise nodes by which smoothing gives the tensor back to it.
    """
    for index, value in enumerate(add.inputs):
        reader, source = (add, index), value
        while source is not None:
            if any(_reads_quantized(n, i, entries) for n, i in source.uses()):
                return reader
            maker = source.producer()
            restoring = maker is not None and maker.op_type in ("Mul", "Add") and (maker.name or "") not in entries
            if maker is None or not restoring or maker.inputs[1] is None or maker.inputs[1].const_value is None:
                break
            reader, source = (maker, 0), maker.inputs[0]
    return None


def _reads_quantized(node: ir.Node, index: int, entries: Mapping[str, NodePlan]) -> bool:
    entry, what = entries.get(node.name or ""), operands(node)
    return (
        entry is not None and entry.precision.quantized and what is not None and what.weight is not None and index == 0
    )


def _made_by_convolution_alone(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Conv" and value is not None and len(value.uses()) == 1


def _name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def _output(node: ir.Node) -> ir.Value:
    value = node.outputs[0]
    readers = [reader for reader, _ in value.uses()]
    alone = len(readers) == 1 and not value.is_graph_output()
    return readers[0].outputs[0] if alone and _saturates_at_zero(readers[0]) else value


def _saturates_at_zero(node: ir.Node) -> bool:
    """Whether uint8 with the zero point 0 does what the node does: any other bound falls between two steps."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low = node.inputs[1] if len(node.inputs) > 1 else None
    return low is not None and low.const_value is not None and float(low.const_value.numpy()) == 0.0
