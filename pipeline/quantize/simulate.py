"""A float graph with a scheme's rounding in it: what the scheme costs in accuracy, whether or not a target executes it.

Weights are stored as their dequantized values, and every activation is quantized and dequantized in front of the product that
reads it. The file is marked, and :func:`pipeline.model.refuse_simulation` keeps it from being taken for a model to deploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import PrecisionPlan, fitted
from pipeline.quantize.insertion.chain import FLOAT, Chain, outlier_columns, row_largest
from pipeline.quantize.insertion.insert import Inserter
from pipeline.quantize.schemes import Scales, Scheme
from pipeline.quantize.weights import mx
from pipeline.quantize.weights.weight import IR_DTYPES, QuantizedWeight, not_finite, round_to_nearest
from pipeline.types import Array, QuantSpec, Range

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def products(model: ir.Model, plan: PrecisionPlan) -> dict[str, tuple[ir.Node, Operands]]:
    """Return the planned nodes with a constant weight that a scheme may quantize, by name, in graph order."""
    planned = {entry.node for entry in plan.quantized()}
    found = {n.name or "": (n, operands(n)) for n in model.graph if n.op_type in _PRODUCTS and n.name in planned}
    return {k: (n, what) for k, (n, what) in found.items() if what is not None and what.weight is not None}


def simulate(
    canonical: Path, plan: PrecisionPlan, scheme: Scheme, ranges: Mapping[str, Range], out: Path
) -> tuple[int, int]:
    """Write the model with ``scheme``'s rounding to ``out``.

    Args:
        canonical: The canonical FP32 model; its weights are read one at a time.
        plan: Which nodes to quantize.
        scheme: How.
        ranges: The range of every activation, where ``scheme`` has static scales.
        out: The simulation's ``.onnx``.

    Returns:
        How many products the scheme quantizes, and of how many: convolutions have no form with dynamic scales or blocks, and a
        block must divide the summed axis.

    Raises:
        QuantizeError: A weight is not finite.
        StoreError: The file cannot be written.
    """
    model = models.load(canonical)
    found = products(model, plan)
    made = _Simulation(model, plan, scheme, ranges)
    count = sum(made.quantize(node, what) for node, what in found.values())
    made.names.drop_unused()
    model.metadata_props[models.SIMULATION] = scheme.name
    models.save(model, out)
    return count, len(found)


class _Simulation:
    def __init__(self, model: ir.Model, plan: PrecisionPlan, scheme: Scheme, ranges: Mapping[str, Range]) -> None:
        self.names = Inserter(model, plan, {})
        self.scheme = scheme
        self.ranges = ranges
        self.activations: dict[str, ir.Value] = {}
        self.weights: dict[tuple[str, int | None], ir.Value] = {}

    def quantize(self, node: ir.Node, what: Operands) -> bool:
        """Quantize both operands of a product; ``False`` leaves it in float, where the scheme has no form for it."""
        activations, weights = self.scheme.activations, self.scheme.weights
        in_rows = node.op_type != "Conv"
        summed = what.weight_shape(node)[1 - (what.channel_axis or 0)] if in_rows else 0
        if not in_rows and (self.scheme.scales.dynamic or weights.block is not None):
            return False
        stored, rounded = _fitted(weights, summed), _fitted(activations, summed)
        if stored is None or (rounded is None and activations is not None):
            return False
        if rounded is not None:
            value = node.inputs[0]
            assert value is not None
            node.replace_input_with(0, self._activation(value, rounded, summed))
        assert what.weight is not None
        node.replace_input_with(what.weight, self._weight(node, what, stored))
        return True

    def _weight(self, node: ir.Node, what: Operands, spec: QuantSpec) -> ir.Value:
        assert what.weight is not None
        value = node.inputs[what.weight]
        assert value is not None
        key = (value.name or "", what.channel_axis)
        if key not in self.weights and self.scheme.mx:
            assert what.channel_axis is not None
            self.weights[key] = self.names.initializer(f"{value.name}_rounded", _mx(value, spec, 1 - what.channel_axis))
        if key not in self.weights:
            weight = round_to_nearest(value, spec, axis=what.channel_axis, scale_dtype=np.float32)
            self.weights[key] = self.names.initializer(f"{value.name}_rounded", _dequantized(weight))
        return self.weights[key]

    def _activation(self, value: ir.Value, spec: QuantSpec, width: int) -> ir.Value:
        """Return ``value`` after rounding; once for all its readers, whose rows have ``width`` values."""
        key = value.name or ""
        if key not in self.activations:
            new, kept = Chain(self.names), value
            outlier = None
            if self.scheme.threshold is not None:
                outlier = outlier_columns(new, value, width, self.scheme.threshold)
                kept = new.add("Where", [outlier, new.number(f"{key}_zero", 0.0), value], f"{key}_ordinary")
            rounded = self._rounded(new, kept, spec, width, key)
            if outlier is not None:
                rounded = new.add("Where", [outlier, value, rounded], f"{key}_decomposed")
            self.names.place(value, new.nodes)
            self.activations[key] = rounded
        return self.activations[key]

    def _rounded(self, new: Chain, value: ir.Value, spec: QuantSpec, width: int, key: str) -> ir.Value:
        stored = IR_DTYPES[spec.dtype]
        if self.scheme.mx:
            zero = self.names.constant(f"{key}_zero_point", np.zeros((), stored.numpy()))
            return _mx_rows(new, value, spec, key, (new.number(f"{key}_one", 1.0), zero))
        if self.scheme.scales in (Scales.TOKEN, Scales.BLOCK):
            return _rows(new, value, spec, spec.block or width, key)
        if self.scheme.scales is Scales.BATCH:
            types = (stored, ir.DataType.FLOAT, stored)
            return new.add(
                "DequantizeLinear", list(new.add_all("DynamicQuantizeLinear", [value], f"{key}_q", types)), key
            )
        scale, zero_point = self.ranges[key].scale_zero_point(spec)
        steps = [
            new.number(f"{key}_scale", scale),
            self.names.constant(f"{key}_zero_point", np.asarray(zero_point, stored.numpy())),
        ]
        return new.add(
            "DequantizeLinear", [new.add("QuantizeLinear", [value, *steps], f"{key}_q", stored), *steps], key
        )


def _rows(new: Chain, value: ir.Value, spec: QuantSpec, block: int, key: str) -> ir.Value:
    """Return ``value`` rounded with one symmetric scale for every ``block`` elements of the last axis."""
    rows = new.add("Reshape", [value, new.integers(f"{key}_blocks", -1, block)], f"{key}_in_blocks")
    most = new.number(f"{key}_most", spec.dtype.qmax)
    scale = new.add("Div", [row_largest(new, rows, key), most], f"{key}_scale")
    steps = new.add("Round", [new.add("Div", [rows, scale], f"{key}_steps")], f"{key}_rounded")
    whole = new.add("Mul", [steps, scale], f"{key}_scaled")
    shape = new.add("Shape", [value], f"{key}_shape", ir.DataType.INT64)
    return new.add("Reshape", [whole, shape], f"{key}_whole")


def _mx_rows(new: Chain, value: ir.Value, spec: QuantSpec, key: str, unit: tuple[ir.Value, ir.Value]) -> ir.Value:
    """Return ``value`` rounded to an MX format along the last axis; ``unit`` are a scale of 1 and a zero point in its type.

    The exponent is found in double, where the logarithm of a float below a power of two differs from that of the power.
    """
    rows = new.add("Reshape", [value, new.integers(f"{key}_blocks", -1, mx.BLOCK)], f"{key}_in_blocks")
    double = ir.DataType.DOUBLE
    wide = new.add("Cast", [row_largest(new, rows, key)], f"{key}_largest", double, to=double.value)
    # From natural logarithms, with room for their own rounding: two float32 differ by 6e-8 of their size.
    octaves, room = (new.names.constant(f"{key}_{n}", np.array(v)) for n, v in (("ln2", np.log(2)), ("room", 1e-10)))
    exact = new.add("Div", [new.add("Log", [wide], f"{key}_logarithm", double), octaves], f"{key}_octaves", double)
    whole = new.add("Floor", [new.add("Add", [exact, room], f"{key}_at_least", double)], f"{key}_exponent", double)
    less = new.names.constant(f"{key}_most", np.array(float(mx.LARGEST_EXPONENT[spec.dtype])))
    two = new.names.constant(f"{key}_two", np.array(2.0))
    power = new.add("Pow", [two, new.add("Sub", [whole, less], f"{key}_shared", double)], f"{key}_power", double)
    scale = new.add("Cast", [power], f"{key}_scale", to=FLOAT.value)
    most = (
        new.number(f"{key}_{end}", limit) for end, limit in (("least", spec.dtype.qmin), ("largest", spec.dtype.qmax))
    )
    steps = new.add("Clip", [new.add("Div", [rows, scale], f"{key}_steps"), *most], f"{key}_clipped")
    stored = new.add("QuantizeLinear", [steps, *unit], f"{key}_q", IR_DTYPES[spec.dtype])
    rounded = new.add("DequantizeLinear", [stored, *unit], f"{key}_dq")
    shape = new.add("Shape", [value], f"{key}_shape", ir.DataType.INT64)
    return new.add("Reshape", [new.add("Mul", [rounded, scale], f"{key}_scaled"), shape], f"{key}_whole")


def _mx(value: ir.Value, spec: QuantSpec, axis: int) -> ir.LazyTensor:
    """Return a weight's values after rounding to an MX format along ``axis``; computed while the model is saved."""
    tensor = value.const_value
    assert tensor is not None

    def values() -> ir.TensorProtocol:
        weight = models.read(tensor).astype(np.float32)
        if not np.isfinite(weight).all():
            raise not_finite(value.name or "")
        return ir.tensor(mx.fake_quantize_mx(weight, spec.dtype, axis=axis))

    return ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()))


def _fitted(spec: QuantSpec | None, summed: int) -> QuantSpec | None:
    """Return the format with the largest block that divides ``summed`` values; ``None`` where none does."""
    if spec is None or spec.block is None:
        return spec
    block = fitted(spec, summed, "cpu")
    return None if block is None else replace(spec, block=block)


def _dequantized(weight: QuantizedWeight) -> ir.LazyTensor:
    """Return the values that a stored weight stands for, float32; computed while the model is saved."""
    shape = weight.tensor.shape.numpy()

    def values() -> ir.TensorProtocol:
        steps: Array = weight.tensor.numpy().astype(np.float32)
        scale = weight.scale
        if weight.block is not None:
            scale = np.repeat(scale, weight.block, axis=weight.axis)
        elif weight.axis is not None:
            scale = scale.reshape([-1 if i == weight.axis else 1 for i in range(len(shape))])
        return ir.tensor(steps * scale)

    return ir.LazyTensor(values, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
