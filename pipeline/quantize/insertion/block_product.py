"""Replace a product by one of ONNX Runtime's that reads a weight in blocks as it is stored: MatMulNBits, or MatMulBnb4 for NF4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from pipeline.graph.operands import Operands
from pipeline.quantize.insertion import bnb4, nbits
from pipeline.quantize.weights.nf4 import SecondLevel
from pipeline.quantize.weights.weight import QuantizedWeight
from pipeline.types import QuantDType, QuantSpec

if TYPE_CHECKING:
    from pipeline.quantize.insertion.insert import Inserter


def has_kernel(node: ir.Node, what: Operands, spec: QuantSpec) -> bool:
    """Whether a product with a weight stored like this can be one of these operators (and an Add)."""
    return spec.dtype is QuantDType.NF4 or nbits.has_kernel(node, what, spec)


def insert_block_product(
    graph: Inserter, node: ir.Node, what: Operands, spec: QuantSpec, weight: QuantizedWeight
) -> None:
    """Put the operator where ``node`` was, and an Add behind it where it cannot add the bias itself."""
    assert what.weight is not None
    value, read = node.inputs[what.weight], node.inputs[0]
    assert value is not None
    assert read is not None
    nf4, base = spec.dtype is QuantDType.NF4, value.name or ""
    key = base, spec, what.channel_axis
    if key not in graph.packed:
        graph.packed[key] = _nf4(graph, weight, value) if nf4 else _bits(graph, weight, spec, base)
    kernel = bnb4 if nf4 else nbits
    form = bnb4.attributes(weight) if nf4 else nbits.attributes(weight, spec)
    bias, added = nbits.bias_of(node, what, form["N"])
    own = [None, None, bias] if bias is not None and not nf4 else []
    addend = bias if nf4 else None
    inputs = [read, *graph.packed[key], *own]
    name = node.name or ""
    product = ir.Node(
        kernel.DOMAIN,
        kernel.OPERATOR,
        inputs,
        [ir.AttrInt64(attribute, number) for attribute, number in form.items()],
        name=name if added is None and addend is None else graph.free(f"{name}/product"),
    )
    graph.describe(product.outputs[0], f"{node.outputs[0].name}_product", read.dtype, node.outputs[0].shape)
    graph.graph.insert_before(node, [product])
    result = product.outputs[0]
    if added is not None:
        addend = graph.constant(f"{name}_bias", added)
    if addend is not None:
        add = graph.node("Add", [result, addend], f"{name}/Add")
        graph.graph.insert_before(node, [add])
        result = add.outputs[0]
    graph.graph.opset_imports[kernel.DOMAIN] = 1
    graph.supplant(node, result)
    graph.nodes[name] = product


def _bits(graph: Inserter, weight: QuantizedWeight, spec: QuantSpec, base: str) -> tuple[ir.Value, ir.Value]:
    tensor, scales = nbits.packed(weight, spec, f"{base}_quantized")
    return graph.initializer(f"{base}_quantized", tensor), graph.constant(f"{base}_scale", scales)


def _nf4(graph: Inserter, weight: QuantizedWeight, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    base = value.name or ""
    tensor, maxima = bnb4.packed(weight, f"{base}_quantized")
    stored, dtype = graph.initializer(f"{base}_quantized", tensor), graph.scale_dtype(value)
    if weight.second is None:
        return stored, graph.constant(f"{base}_absmax", maxima.astype(dtype))
    return stored, _expanded(graph, weight.second, base, value)


def _expanded(graph: Inserter, second: SecondLevel, base: str, value: ir.Value) -> ir.Value:
    """Add the nodes that expand doubly quantized maxima, in front of everything."""
    constants, steps = bnb4.expansion(second, graph.scale_dtype(value))
    made = {}
    for name, array in constants.items():
        alike = name in ("code", "flat")
        made[name] = (
            graph.shared_constant(f"nf4_absmax_{name}", array)
            if alike
            else graph.constant(f"{base}_absmax_{name}", array)
        )
    nodes: list[ir.Node] = []
    for op_type, inputs, attributes in steps:
        read = [made[name] if name else nodes[-1].outputs[0] for name in inputs]
        nodes.append(graph.node(op_type, read, f"{base}/absmax/{op_type}", attributes=attributes))
    graph.graph.insert_before(graph.graph[0], nodes)
    return nodes[-1].outputs[0]
