"""Dynamic activations for ``cpu``: the range of each batch is computed at run time, so there is nothing to calibrate.

A MatMul becomes DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses into one
``DynamicQuantizeMatMul`` or, where several read one tensor, into ``MatMulIntegerToFloat`` behind one quantization.
A Gemm becomes the same and an Add.

ONNX Runtime's kernels take one scale for the whole activation. A scale for each token is had from them by dividing every row by
its largest magnitude first and multiplying the product's row by it again. Outlier columns (LLM.int8(), Dettmers et al. 2022,
section 3.2) are zeros to these kernels, and a float product of those columns alone is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.graph.operands import Operands, operands
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insertion.chain import FLOAT, Chain, outlier_columns, row_largest
from pipeline.quantize.insertion.insert import Inserter
from pipeline.quantize.weights.weight import round_to_nearest
from pipeline.types import Array, Progress, QuantSpec, silent

_QUANTIZED = (ir.DataType.UINT8, FLOAT, ir.DataType.UINT8)


def insert_dynamic(model: ir.Model, plan: PrecisionPlan, progress: Progress = silent) -> None:
    """Replace every planned matrix product by its dynamically quantized form; changes the graph in place.

    ``progress`` is told of every node of the graph under ``scales``; a planned one's weight is read.
    """
    _Dynamic(model, plan).run(progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Activation:
    """What the products of one tensor read.

    Attributes:
        quantized: uint8, its scale and its zero point, one for the tensor.
        row: What each row was divided by, ``[..., 1]``; ``None`` without a scale for each token.
        outliers: Indices of the outlier columns ``[k]`` and their values ``[..., k]``; ``None`` where none are separated.
    """

    quantized: tuple[ir.Value, ir.Value, ir.Value]
    row: ir.Value | None
    outliers: tuple[ir.Value, ir.Value] | None


class _Dynamic:
    def __init__(self, model: ir.Model, plan: PrecisionPlan) -> None:
        self.graph = model.graph
        self.plan = plan
        self.names = Inserter(model, plan, {})
        self.activations: dict[str, _Activation] = {}
        self.weights: dict[tuple[str, int | None], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def run(self, progress: Progress) -> None:
        planned = {n.node: n for n in self.plan.quantized()}
        nodes = list(self.graph)
        for index, node in enumerate(nodes):
            progress("scales", index + 1, len(nodes))
            entry, found = planned.get(node.name or ""), operands(node)
            if entry is None or found is None or found.weight is None:
                continue
            spec = self.plan.weight_spec(entry)
            if self.plan.formats[entry.precision].activations is None:
                self.names.weight(node, found, spec)
            elif found.weight_only:
                self.names.table(node, found, spec)
            else:
                self._product(node, found, spec, entry.llm_int8_threshold)
        self.names.drop_unused()

    def _product(self, node: ir.Node, found: Operands, spec: QuantSpec, threshold: float | None) -> None:
        base, new = node.name or "", Chain(self.names)
        integer, weight_scale, zero = self._weight(node, found, spec)
        activation = self._activation(node, found.weight_shape(node)[1 - (found.channel_axis or 0)], threshold)
        quantized, scale, zero_point = activation.quantized
        scales = new.add("Mul", [scale, weight_scale], f"{base}_scales")
        product = new.add("MatMulInteger", [quantized, integer, zero_point, zero], f"{base}_integer", ir.DataType.INT32)
        cast = new.add("Cast", [product], f"{base}_cast", to=FLOAT.value)
        result = new.add("Mul", [cast, scales], f"{base}_scaled")
        if activation.row is not None:
            result = new.add("Mul", [result, activation.row], f"{base}_by_row")
        if activation.outliers is not None:
            columns, values = activation.outliers
            rows = new.add("Gather", [integer, columns], f"{base}_outlier_rows", ir.DataType.INT8, axis=0)
            rows = new.add("Cast", [rows], f"{base}_outlier_rows_cast", to=FLOAT.value)
            rows = new.add("Mul", [rows, weight_scale], f"{base}_outlier_weight")
            apart = new.add("MatMul", [values, rows], f"{base}_outliers")
            result = new.add("Add", [result, apart], f"{base}_with_outliers")
        if found.bias is not None and (bias := node.inputs[found.bias]) is not None:
            result = new.add("Add", [result, bias], f"{base}_biased")
        self.graph.insert_before(node, new.nodes)
        self.names.supplant(node, result)

    def _activation(self, node: ir.Node, width: int, threshold: float | None) -> _Activation:
        """Return what is made of the node's input, whose rows have ``width`` values; once for all its readers, whose threshold is one."""
        value = node.inputs[0]
        assert value is not None
        key = value.name or ""
        if key not in self.activations:
            new = Chain(self.names)
            kept, outliers, row = value, None, None
            if threshold is not None:
                kept, outliers = self._separated(new, value, width, threshold)
            if self.plan.per_token:
                row = row_largest(new, kept, key)
                kept = new.add("Div", [kept, row], f"{key}_by_row")
            quantized, scale, zero_point = new.add_all("DynamicQuantizeLinear", [kept], f"{key}_dynamic", _QUANTIZED)
            self.names.place(value, new.nodes)
            self.activations[key] = _Activation(quantized=(quantized, scale, zero_point), row=row, outliers=outliers)
        return self.activations[key]

    def _separated(
        self, new: Chain, value: ir.Value, width: int, threshold: float
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """Return the tensor with zeros in its outlier columns, and those columns' indices and values.

        A float product of no column at all is zero in ONNX Runtime, so batches without outliers need no branch.
        """
        key = value.name or ""
        is_outlier = outlier_columns(new, value, width, threshold)
        ordinary = new.add("Not", [is_outlier], f"{key}_is_ordinary", ir.DataType.BOOL)
        ordinary = new.add("Cast", [ordinary], f"{key}_ordinary", to=FLOAT.value)
        kept = new.add("Mul", [value, ordinary], f"{key}_without_outliers")
        found = new.add("NonZero", [is_outlier], f"{key}_outlier_places", ir.DataType.INT64)
        all_of_it = new.integers(f"{key}_one_axis", -1)
        columns = new.add("Reshape", [found, all_of_it], f"{key}_outlier_columns", ir.DataType.INT64)
        return kept, (columns, new.add("Gather", [value, columns], f"{key}_outliers", axis=-1))

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
