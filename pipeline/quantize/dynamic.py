"""Dynamic activations for ``cpu``: the range of each batch is computed at run time, so there is nothing to calibrate.

A MatMul becomes DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses into one
``DynamicQuantizeMatMul`` or, where several read one tensor, into ``MatMulIntegerToFloat`` behind one quantization.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.graph.operands import operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insert import Inserter
from pipeline.quantize.weights import round_to_nearest


def insert_dynamic(model: ir.Model, plan: PrecisionPlan) -> None:
    """Replace every planned MatMul by its dynamically quantized form; changes the graph in place."""
    names = Inserter(model, plan, {})
    shared: dict[str, ir.Node] = {}
    planned = {n.node: n for n in plan.quantized()}
    for node in list(model.graph):
        entry, found = planned.get(node.name or ""), operands(node)
        if entry is None or found is None or found.weight is None:
            continue
        activation, weight = node.inputs[0], node.inputs[found.weight]
        assert activation is not None
        assert weight is not None
        key = activation.name or ""
        if key not in shared:
            shared[key] = names.node("DynamicQuantizeLinear", [activation], f"{key}_dynamic", 3)
            types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            for output, dtype in zip(shared[key].outputs, types, strict=True):
                output.dtype = dtype
            names.place(activation, [shared[key]])
        quantized, scale, zero_point = shared[key].outputs
        stored = round_to_nearest(
            weight, plan.formats[entry.precision].weights, axis=found.channel_axis, scale_dtype=np.float32
        )
        integer = names.initializer(f"{weight.name}_quantized", stored.tensor)
        zero = names.initializer(f"{weight.name}_zero_point", ir.tensor(np.zeros(stored.scale.shape, np.int8)))
        weight_scale = names.initializer(f"{weight.name}_scale", ir.tensor(stored.scale))
        product = names.node("MatMulInteger", [quantized, integer, zero_point, zero], f"{node.name}_integer")
        product.outputs[0].dtype = ir.DataType.INT32
        cast = names.node("Cast", [product.outputs[0]], f"{node.name}_cast", attributes={"to": ir.DataType.FLOAT.value})
        scales = names.node("Mul", [scale, weight_scale], f"{node.name}_scales")
        result = names.node("Mul", [cast.outputs[0], scales.outputs[0]], f"{node.name}_scaled")
        for new in (cast, scales, result):
            new.outputs[0].dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, [scales, product, cast, result])
        names.supplant(node, result.outputs[0])
    names.drop_unused()
