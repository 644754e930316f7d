"""Copies quantized nodes, with the Q/DQ pairs they read, out of a quantized graph and onto FP32 tensors.

Quantization keeps the names of the canonical graph's nodes. So a tensor of the quantized graph *stands for* the FP32
tensor that the node of the same name makes, and what lies between such tensors and a quantized node (Q/DQ pairs,
casts, quantized weights) belongs to that node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from pipeline.errors import ModelError

_MAX_OWNED = 64
"""Nodes between a quantized node and FP32 tensors, at most: more means that the two graphs do not correspond."""

_CONVERTING = ("QuantizeLinear", "DequantizeLinear", "Cast")
"""What they give has the name of an FP32 tensor only where it takes that tensor's place as a graph output."""

BLOCK_PRODUCTS = ("MatMulNBits", "MatMulBnb4")
"""ONNX Runtime's products with weights that are stored in blocks."""

_STORED = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN)
"""Types that hold a quantized tensor."""

_NOT_COMPUTING = ("QuantizeLinear", "DequantizeLinear", "Shape", "Size")


class Pairing:
    """What an FP32 graph and its quantized variant share.

    A node is the same where its name and operator are; a node that quantization replaced by several others is there
    in the node that makes the tensor of the same name (dynamic activations: the last ``Mul``).

    Args:
        reference: The FP32 model; missing types of its tensors are inferred.
        variant: Its quantized variant, likewise.
    """

    def __init__(self, reference: ir.Model, variant: ir.Model) -> None:
        for model in (reference, variant):
            _infer_types(model)
        self.reference = {node.name: node for node in reference.graph if node.name}
        self._variant = {node.name: node for node in variant.graph if node.name}
        self._made = {value.name: node for node in variant.graph for value in node.outputs if value.name}
        self._tensors = {value.name: value for node in reference.graph for value in node.outputs if value.name}
        self._inputs = {value.name: value for value in reference.graph.inputs}
        self._constants = dict(reference.graph.initializers)

    def quantized(self, name: str) -> ir.Node | None:
        """Return the variant's counterpart of the FP32 node ``name``, ``None`` if there is none."""
        ours = self.reference.get(name)
        if ours is None:
            return None
        theirs = self._variant.get(name)
        if theirs is not None and _looks_up_integers(theirs):
            # The rows that were found are dequantized behind the look-up.
            return self._made.get(ours.outputs[0].name or "")
        if theirs is None and len(ours.outputs) == 1:
            theirs = self._made.get(ours.outputs[0].name or "")
            if theirs is None or theirs.op_type in _CONVERTING or len(theirs.outputs) != 1:
                return None
            return theirs
        if theirs is None or not _is_same_operator(ours, theirs):
            return None
        return theirs if len(ours.outputs) == len(theirs.outputs) else None

    def stands_for(self, value: ir.Value) -> ir.Value | None:
        """Return the FP32 tensor that a tensor of the quantized graph stands for, ``None`` if there is none."""
        producer, index = value.producer(), value.index()
        if producer is not None and value.dtype in _STORED:  # a cache that is moved as it is stored
            return None
        if producer is not None and index is not None:
            if producer.name and self.quantized(producer.name) is producer:
                return self.reference[producer.name].outputs[index]
            found = self._tensors.get(value.name or "")
            maker = found.producer() if found is not None else None
            if maker is not None and self.quantized(maker.name or "") is producer:
                return found
            # A Cast that gives a tensor under its own name only rounds it, in a copy that emulates BF16.
            return found if producer.op_type == "Cast" or producer.op_type not in _CONVERTING else None
        if not value.is_initializer():
            return self._inputs.get(value.name)
        own = self._constants.get(value.name or "")
        if own is None or own.const_value is None or value.const_value is None or own.dtype != value.dtype:
            return None
        # The name alone is not enough: a transform may have changed the values under it.
        return own if np.array_equal(own.const_value.numpy(), value.const_value.numpy()) else None


def _is_same_operator(ours: ir.Node, theirs: ir.Node) -> bool:
    if theirs.op_type in BLOCK_PRODUCTS:  # with its weights in blocks
        return ours.op_type in ("MatMul", "Gemm")
    return (ours.domain, ours.op_type) == (theirs.domain, theirs.op_type)


def _looks_up_integers(node: ir.Node) -> bool:
    table = node.inputs[0] if node.op_type == "Gather" else None
    return table is not None and table.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _infer_types(model: ir.Model) -> None:
    for node in model.graph:
        scales = node.inputs[2] if node.op_type in BLOCK_PRODUCTS else None
        if scales is not None and scales.dtype is not None:  # inference knows ONNX' own operators alone
            node.outputs[0].dtype = scales.dtype
    if any(value.dtype is None for node in model.graph for value in node.outputs if value.name):
        ShapeInferencePass()(model)


@dataclass(slots=True)
class Transplant:
    """Copies nodes of the quantized graph into another graph.

    Args:
        pairing: The two graphs.
        resolve: FP32 tensor to the tensor of the new graph that takes its place.
        prefix: Before the names of everything copied, so that they are new.
    """

    pairing: Pairing
    resolve: Callable[[ir.Value], ir.Value]
    prefix: str
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    _copies: dict[ir.Node, ir.Node] = field(default_factory=dict)
    _constants: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def node(self, name: str) -> list[ir.Value]:
        """Copy the node ``name`` and all it owns; return its outputs in the FP32 tensors' own types.

        Raises:
            ModelError: The graphs do not correspond around the node.
        """
        theirs, ours = self.pairing.quantized(name), self.pairing.reference[name]
        if theirs is None:
            raise _strangers(f"node {name}")
        copy = self._copy(theirs, len(self.nodes) + _MAX_OWNED)
        outputs = zip(theirs.outputs, copy.outputs, ours.outputs, strict=True)
        return [self._cast(new, output.dtype, own.dtype) for output, new, own in outputs]

    def _copy(self, node: ir.Node, limit: int) -> ir.Node:
        if node in self._copies:
            return self._copies[node]
        if len(self.nodes) > limit or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            raise _strangers(f"node {node.name}")
        inputs = [self._value(value, limit) if value is not None else None for value in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{self.prefix}{node.name}",
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"{self.prefix}{old.name}"
            new.type, new.shape = old.type, old.shape
        self.nodes.append(copy)
        self._copies[node] = copy
        return copy

    def _value(self, value: ir.Value, limit: int) -> ir.Value:
        own = self.pairing.stands_for(value)
        producer, index = value.producer(), value.index()
        if own is not None:
            return self._cast(self.resolve(own), own.dtype, value.dtype)
        if producer is not None and index is not None:
            return self._copy(producer, limit).outputs[index]
        if not value.is_initializer():
            raise _strangers(f"input {value.name}")
        if value not in self._constants:
            new = ir.Value(
                name=f"{self.prefix}{value.name}", shape=value.shape, type=value.type, const_value=value.const_value
            )
            self._constants[value] = new
            self.initializers.append(new)
        return self._constants[value]

    def _cast(self, value: ir.Value, given: ir.DataType | None, wanted: ir.DataType | None) -> ir.Value:
        """Cast between the FP32 graph and a variant that computes in FP16."""
        if given is None or wanted is None or given == wanted:
            return value
        name = f"{self.prefix}{value.name}_as_{wanted.name.lower()}_{len(self.nodes)}"
        cast = ir.node("Cast", [value], attributes={"to": int(wanted)}, name=name)
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, wanted, value.shape
        self.nodes.append(cast)
        return cast.outputs[0]


def _strangers(where: str) -> ModelError:
    return ModelError(
        "The quantized graph does not correspond to the FP32 graph here.",
        where=where,
        fix="Give the FP32 model from which this quantized model was made.",
    )


def quantized_nodes(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the nodes that compute with quantized operands, in graph order."""
    names = []
    for node in model.graph:
        if node.op_type in _NOT_COMPUTING or not node.name:
            continue
        makers = [_maker(value) for value in node.inputs if value is not None]
        dequantized = any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        if dequantized or node.op_type in BLOCK_PRODUCTS:
            names.append(node.name)
    return tuple(names)


def _maker(value: ir.Value) -> ir.Node | None:
    """Return the node that makes a tensor, behind the casts that round it in a copy that emulates BF16."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node


def read_for(reference: ir.Model, model: ir.Model, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return for each of the quantized nodes ``names`` itself and the helper nodes that read quantized tensors in its place.

    A residual add beside smoothed GEMMs reads their pair through the Mul and Add that restore what smoothing took. What
    ``reference`` has no node for, such as a cast of a dequantized weight, goes with the node that reads it.
    """
    asked = set(names)
    found = {name: [name] for name in names}
    known = {node.name for node in reference.graph}
    helpers = [name for name in quantized_nodes(model) if name not in asked and name in known]
    by_name = {node.name: node for node in model.graph}
    for helper in helpers:
        rest, seen = [by_name[helper]], set[ir.Node]()
        while rest:
            for user, _ in (use for value in rest.pop().outputs for use in value.uses()):
                if user.name in asked:
                    found[user.name].append(helper)
                elif user not in seen and len(seen) < _MAX_OWNED:
                    seen.add(user)
                    rest.append(user)
    return {name: tuple(dict.fromkeys(helpers)) for name, helpers in found.items()}
