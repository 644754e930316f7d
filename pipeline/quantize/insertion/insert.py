"""Insert Q/DQ pairs: activations at their sites, weights as int8 initializers behind a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline.graph.operands import Operands, operands, output_bias
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insertion.block_product import has_kernel, insert_block_product
from pipeline.quantize.insertion.sites import Site, sites
from pipeline.quantize.insertion.stored_cache import store_quantized
from pipeline.quantize.weights.weight import IR_DTYPES, QuantizedWeight, round_to_nearest, stored_scale
from pipeline.types import Array, Progress, QuantSpec, Range, Role, silent


class Inserter:
    """Changes one graph in place; made for a plan and the ranges of its activation sites.

    Args:
        model: The canonical model; changed.
        plan: Which nodes read pairs, in which formats.
        ranges: The range of every (tensor, format) that :func:`pipeline.quantize.insertion.sites.sites` names.
        weights: Weights that are rounded already, by node; the others are rounded to nearest.
    """

    def __init__(
        self,
        model: ir.Model,
        plan: PrecisionPlan,
        ranges: Mapping[tuple[str, QuantSpec], Range],
        weights: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        self.graph = model.graph
        self.plan = plan
        self.ranges = ranges
        self.rounded = weights or {}
        self.nodes = {n.name or "": n for n in model.graph}
        self.values = {v.name or "": v for v in model.graph.inputs} | {
            v.name or "": v for n in model.graph for v in n.outputs
        }
        self.names = set(self.values) | set(model.graph.initializers)
        self.scales: dict[tuple[str, int], Array] = {}
        self.pairs: dict[tuple[str, QuantSpec], tuple[ir.Value, ir.Value]] = {}
        self.weights: dict[tuple[str, bytes, int | None], ir.Value] = {}
        self.tables: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.packed: dict[tuple[str, QuantSpec, int | None], tuple[ir.Value, ir.Value]] = {}
        self._sites = sites(model, plan)

    def run(self, progress: Progress = silent) -> None:
        """Insert every pair; ``progress`` is told of every node under ``scales``, which reads its weight."""
        quantized = [(self.nodes[n.node], n) for n in self.plan.quantized()]
        found = {n.name: operands(n) for n, _ in quantized}
        self.activations()
        for node, entry in quantized:
            if entry.role is Role.KV_CACHE:
                store_quantized(self, node)
        for index, (node, entry) in enumerate(quantized):
            progress("scales", index, len(quantized))
            what = found[node.name]
            if what is None or what.weight is None:
                continue
            spec = self.plan.weight_spec(entry)
            # TensorRT takes an INT8 constant only in front of a DequantizeLinear, and fuses that with the look-up.
            if what.weight_only and self.plan.family == "cpu":
                self.table(node, what, spec)
            else:
                self.weight(node, what, spec)
        progress("scales", len(quantized), len(quantized))
        self.drop_unused()

    def activations(self) -> None:
        """Insert the activation pairs alone; :attr:`pairs` then holds each one's (scale, zero point) constants."""
        for site in self._sites:
            self._activation(site)

    def scale_dtype(self, value: ir.Value) -> npt.DTypeLike:
        """Return the type of a tensor's scales: its own, or what the graph will be cast to."""
        if value.dtype is ir.DataType.FLOAT16:
            return np.dtype(np.float16)
        return self.plan.scale_dtype

    def scale_zero_point(self, site: Site) -> tuple[np.float32, int]:
        """Return the scale as stored (rounded to FP16 where the tensor is FP16) and the zero point."""
        scale, zero_point = self.ranges[site.tensor, site.spec].scale_zero_point(site.spec)
        stored = stored_scale(np.asarray(scale, np.float32), self.scale_dtype(self.values[site.tensor]))
        return np.float32(stored), zero_point

    def _activation(self, site: Site) -> None:
        value = self.values[site.tensor]
        scale, zero_point = self.scale_zero_point(site)
        base = site.tensor
        operands_ = (
            self.constant(f"{base}_scale", np.asarray(scale, dtype=self.scale_dtype(value))),
            self.constant(f"{base}_zero_point", np.asarray(zero_point, dtype=IR_DTYPES[site.spec.dtype].numpy())),
        )
        self.pairs[site.tensor, site.spec] = operands_
        quantize = ir.node("QuantizeLinear", [value, *operands_], name=self.free(f"{base}_QuantizeLinear"))
        dequantize = ir.node(
            "DequantizeLinear", [quantize.outputs[0], *operands_], name=self.free(f"{base}_DequantizeLinear")
        )
        self.describe(quantize.outputs[0], f"{base}_quantized", IR_DTYPES[site.spec.dtype], value.shape)
        self.describe(dequantize.outputs[0], f"{base}_dequantized", value.dtype, value.shape)
        readers = value.uses() if site.readers is None else [(self.nodes[n], i) for n, i in site.readers]
        readers = [(n, i) for n, i in readers if n.op_type != "QuantizeLinear"]
        self.place(value, [quantize, dequantize])
        for reader, index in readers:
            reader.replace_input_with(index, dequantize.outputs[0])
            self.scales[reader.name or "", index] = np.asarray(scale)
        if site.readers is None and value.is_graph_output():
            self.give_output(value, dequantize.outputs[0])

    def weight(self, node: ir.Node, what: Operands, spec: QuantSpec) -> None:
        """Let a node read its weight quantized: behind a DequantizeLinear, or by an operator that reads it as it is stored."""
        assert what.weight is not None
        value = node.inputs[what.weight]
        assert value is not None
        activation = self.scales.get((node.name or "", 0), np.ones((), np.float32))
        scale_dtype = self.scale_dtype(value)
        # ONNX Runtime fuses Conv and Gemm only with a bias in the accumulator's own scale.
        integers = (
            self.plan.family == "cpu"
            and spec.block is None
            and np.dtype(scale_dtype) == np.float32  # the product of two FP16 scales would not be exact
        )
        weight = self.rounded.get(node.name or "")
        correction = weight.correction if weight is not None else None
        if weight is not None and correction is not None:
            bias = _channel_bias(node, value, what.channel_axis) if integers else None
            reach = np.abs(correction) + (_magnitude(bias) if bias is not None else 0)
            if bias is not None and np.any(weight.scale < _bias_floor(reach, activation)):
                weight = None
            else:
                self._correct(node, correction)
        bias = _channel_bias(node, value, what.channel_axis) if integers else None
        if weight is None:
            floor = _bias_floor(_magnitude(bias), activation) if bias is not None else None
            weight = round_to_nearest(
                value,
                spec,
                axis=what.channel_axis,
                scale_dtype=scale_dtype,
                min_scale=floor,
                signed=self.plan.signed_scales,
            )
        if self.plan.family == "cpu" and has_kernel(node, what, spec):
            insert_block_product(self, node, what, spec, weight)
            return
        key = (value.name or "", weight.scale.tobytes(), weight.axis)
        if key not in self.weights:
            self.weights[key] = self._dequantized(value, weight.tensor, weight.scale, weight.axis, weight.block)
        node.replace_input_with(what.weight, self.weights[key])
        if bias is not None:
            scale = np.maximum(weight.scale * activation, np.finfo(np.float32).smallest_normal)
            node.replace_input_with(2, self._bias(bias, scale))

    def _correct(self, node: ir.Node, correction: Array) -> None:
        """Add a constant to each output channel: in the node's bias, in the Add behind it, or with an Add of its own."""
        output = node.outputs[0]
        dtype = output.dtype.numpy() if output.dtype is not None else np.dtype(np.float32)
        added = correction.astype(dtype)
        place = output_bias(node, len(correction))
        if place is not None:
            old = place[0].inputs[place[1]]
            assert old is not None
            assert old.const_value is not None
            values = old.const_value.numpy()
            summed = (values.astype(np.float32) + correction).astype(values.dtype)
            place[0].replace_input_with(place[1], self.constant(f"{old.name}_corrected", summed))
            return
        constant = self.constant(f"{node.name}_correction", added)
        if node.op_type == "Conv":
            node.resize_inputs(3)
            node.replace_input_with(2, constant)
            return
        add = self.node("Add", [output, constant], f"{node.name}/correction/Add")
        name, result = output.name, add.outputs[0]
        output.name = self.free(f"{name}_uncorrected")
        result.name, result.shape, result.type = name, output.shape, output.type
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        self.graph.insert_after(node, [add])
        self.values[name or ""] = result

    def table(self, node: ir.Node, what: Operands, spec: QuantSpec) -> None:
        """Store a table that is looked up in INT8 and dequantize the rows that were found: ONNX Runtime would
        dequantize the whole table at every run.
        """  # noqa: D205
        assert what.weight is not None
        value, indices, rows = node.inputs[what.weight], node.inputs[1], node.outputs[0]
        assert value is not None
        key = value.name or ""
        if key not in self.tables:
            dtype = self.scale_dtype(value)
            weight = round_to_nearest(value, spec, axis=what.channel_axis, scale_dtype=dtype)
            scale = self.constant(f"{key}_scale", weight.scale.astype(dtype))
            self.tables[key] = (self.initializer(f"{key}_quantized", weight.tensor), scale)
        stored, scale = self.tables[key]
        gather = ir.node("Gather", [stored, indices], attributes=node.attributes, name=node.name)
        self.describe(gather.outputs[0], f"{rows.name}_quantized", ir.DataType.INT8, rows.shape)
        axis = -1 if rows.shape is None else len(rows.shape) - 1
        dequantize = self.node(
            "DequantizeLinear", [gather.outputs[0], scale], f"{rows.name}_DequantizeLinear", attributes={"axis": axis}
        )
        self.graph.insert_before(node, [gather, dequantize])
        self.supplant(node, dequantize.outputs[0])

    def _bias(self, bias: ir.Value, scale: Array) -> ir.Value:
        # ONNX Runtime fuses Conv and Gemm only with an int32 bias in the accumulator's own scale; TensorRT refuses one.
        assert bias.const_value is not None
        exact = np.rint(bias.const_value.numpy().astype(np.float64).reshape(-1) / scale)
        tensor = ir.tensor(np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32))
        return self._dequantized(bias, tensor, np.asarray(scale, dtype=np.float32), 0 if scale.ndim else None)

    def _dequantized(
        self,
        value: ir.Value,
        tensor: ir.TensorProtocol,
        scale: Array,
        axis: int | None,
        block: int | None = None,
    ) -> ir.Value:
        base = f"{value.name}"
        stored = self.initializer(f"{base}_quantized", tensor)
        inputs = [stored, self.constant(f"{base}_scale", scale.astype(self.scale_dtype(value)))]
        # ONNX Runtime fuses a Gemm only if its zero points are there; TensorRT needs none.
        if self.plan.family == "cpu" and block is None:
            inputs.append(self.constant(f"{base}_zero_point", np.zeros(scale.shape, dtype=tensor.dtype.numpy())))
        node = ir.node(
            "DequantizeLinear",
            inputs,
            attributes=({} if axis is None else {"axis": axis}) | ({} if block is None else {"block_size": block}),
            name=self.free(f"{base}_DequantizeLinear"),
        )
        self.describe(node.outputs[0], f"{base}_dequantized", value.dtype, value.shape)
        self.graph.insert_before(self.graph[0], [node])
        return node.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """Add a small constant under a free name."""
        return self.initializer(name, ir.tensor(array))

    def shared_constant(self, name: str, array: Array) -> ir.Value:
        """Return the one constant of this name, whose values are always these."""
        found = self.graph.initializers.get(name)
        return self.constant(name, array) if found is None else found

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer under a free name; a lazy tensor stays lazy."""
        value = ir.Value(name=self.free(name), shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        outputs: int = 1,
        attributes: dict[str, int] | None = None,
    ) -> ir.Node:
        """Make a node (not yet placed) whose name and output names are free."""
        made = ir.node(op_type, inputs, attributes=attributes or {}, num_outputs=outputs, name=self.free(name))
        for index, value in enumerate(made.outputs):
            value.name = self.free(f"{name}_{index}" if outputs > 1 else f"{name}_output")
        return made

    def supplant(self, node: ir.Node, value: ir.Value) -> None:
        """Let everything that reads ``node``'s output read ``value`` instead, and remove the node."""
        old = node.outputs[0]
        name = old.name
        old.name = self.free(f"{name}_replaced")
        value.name = name
        value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def describe(self, value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
        """Give a tensor a free name, a type and a shape."""
        value.name = self.free(name)
        value.type = None if dtype is None else ir.TensorType(dtype)
        value.shape = shape

    def place(self, value: ir.Value, new: list[ir.Node]) -> None:
        """Put nodes right behind the one that makes ``value``, or first if it is an input."""
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], new)
        else:
            self.graph.insert_after(producer, new)

    def give_output(self, value: ir.Value, replacement: ir.Value) -> None:
        """Make ``replacement`` the graph output that ``value`` was, under its name."""
        name, index = value.name, list(self.graph.outputs).index(value)
        value.name = self.free(f"{name}_float")
        replacement.name = name
        self.graph.outputs[index] = replacement

    def free(self, name: str) -> str:
        """Return the name, with a number behind it if it is taken, and take it."""
        candidate, n = name, 1
        while candidate in self.names:
            candidate, n = f"{name}_{n}", n + 1
        self.names.add(candidate)
        return candidate

    def drop_unused(self) -> None:
        """Remove the initializers that nothing reads any more."""
        used = {v.name for n in self.graph.all_nodes() for v in n.inputs if v is not None}
        outputs = {v.name for v in self.graph.outputs}
        for name in [n for n in self.graph.initializers if n not in used and n not in outputs]:
            del self.graph.initializers[name]


def _channel_bias(node: ir.Node, weight: ir.Value, axis: int | None) -> ir.Value | None:
    """Return a Conv's or Gemm's own constant bias if it has one value for each output channel.

    A Gemm's may be a scalar, a column or a matrix. A transposed convolution has no integer kernel, so its bias stays exact.
    """
    bias = node.inputs[2] if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    if bias is None or bias.const_value is None or axis is None or weight.shape is None:
        return None
    beta = node.attributes.get("beta")
    along = tuple(bias.const_value.shape.numpy()) == (weight.shape[axis],)
    return bias if along and (beta is None or beta.as_float() == 1.0) else None


def _magnitude(bias: ir.Value) -> Array:
    assert bias.const_value is not None
    return np.abs(bias.const_value.numpy().astype(np.float64)).reshape(-1)


def _bias_floor(magnitude: Array, activation: Array) -> Array:
    """Return the smallest weight scale per channel for which an int32 bias of this magnitude does not overflow."""
    return (magnitude / (float(activation) * 2.0**30)).astype(np.float32)
