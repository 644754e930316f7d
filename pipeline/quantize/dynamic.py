"""Dynamic activations for ``cpu``: the range of each batch is computed at run time, so there is nothing to calibrate.

A MatMul becomes DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses into one
``DynamicQuantizeMatMul`` or, where several read one tensor, into ``MatMulIntegerToFloat`` behind one quantization.
A Gemm becomes the same and an Add.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insert import Inserter
from pipeline.quantize.weights import round_to_nearest
from pipeline.types import Array, Progress, QuantSpec, silent


def insert_dynamic(model: ir.Model, plan: PrecisionPlan, progress: Progress = silent) -> None:
    """Replace every planned matrix product by its dynamically quantized form; changes the graph in place.

    ``progress`` is told of every node of the graph under ``scales``; a planned one's weight is read.
    """
    _Dynamic(model, plan).run(progress)


class _Dynamic:
    def __init__(self, model: ir.Model, plan: PrecisionPlan) -> None:
        self.graph = model.graph
        self.plan = plan
        self.names = Inserter(model, plan, {})
        self.activations: dict[str, ir.Node] = {}
        self.weights: dict[tuple[str, int | None], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def run(self, progress: Progress) -> None:
        planned = {n.node: n for n in self.plan.quantized()}
        nodes = list(self.graph)
        for index, node in enumerate(nodes):
            progress("scales", index + 1, len(nodes))
            entry, found = planned.get(node.name or ""), operands(node)
            if entry is None or found is None or found.weight is None:
                continue
            spec = self.plan.formats[entry.precision].weights
            if found.weight_only:
                self.names.table(node, found, spec)
            else:
                self._product(node, found, spec)
        self.names.drop_unused()

    def _product(self, node: ir.Node, found: Operands, spec: QuantSpec) -> None:
        names = self.names
        quantized, scale, zero_point = self._activation(node).outputs
        integer, weight_scale, zero = self._weight(node, found, spec)
        product = names.node("MatMulInteger", [quantized, integer, zero_point, zero], f"{node.name}_integer")
        product.outputs[0].dtype = ir.DataType.INT32
        cast = names.node("Cast", [product.outputs[0]], f"{node.name}_cast", attributes={"to": ir.DataType.FLOAT.value})
        scales = names.node("Mul", [scale, weight_scale], f"{node.name}_scales")
        result = names.node("Mul", [cast.outputs[0], scales.outputs[0]], f"{node.name}_scaled")
        new = [scales, product, cast, result]
        if found.bias is not None and (bias := node.inputs[found.bias]) is not None:
            new.append(names.node("Add", [result.outputs[0], bias], f"{node.name}_biased"))
        for floating in (cast, scales, *new[3:]):
            floating.outputs[0].dtype = ir.DataType.FLOAT
        self.graph.insert_before(node, new)
        names.supplant(node, new[-1].outputs[0])

    def _activation(self, node: ir.Node) -> ir.Node:
        activation = node.inputs[0]
        assert activation is not None
        key = activation.name or ""
        if key not in self.activations:
            made = self.names.node("DynamicQuantizeLinear", [activation], f"{key}_dynamic", 3)
            types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            for output, dtype in zip(made.outputs, types, strict=True):
                output.dtype = dtype
            self.names.place(activation, [made])
            self.activations[key] = made
        return self.activations[key]

    def _weight(self, node: ir.Node, found: Operands, spec: QuantSpec) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return the int8 weight ``[in, out]``, its scales and its zero points."""
        assert found.weight is not None
        value = node.inputs[found.weight]
        assert value is not None
        key = (value.name or "", found.channel_axis)
        if key not in self.weights:
            weight = round_to_nearest(value, spec, axis=found.channel_axis, scale_dtype=np.float32)
            tensor = weight.tensor if found.channel_axis == 1 else _transposed(weight.tensor)
            self.weights[key] = (
                self.names.initializer(f"{value.name}_quantized", tensor),
                self.names.constant(f"{value.name}_scale", weight.scale),
                self.names.constant(f"{value.name}_zero_point", np.zeros(weight.scale.shape, np.int8)),
            )
        return self.weights[key]


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        values: Array = np.ascontiguousarray(tensor.numpy().T)
        return ir.tensor(values)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()[::-1]))
