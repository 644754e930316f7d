"""Apply smoothing to a graph: ``(x - z) / s`` in front of the GEMMs, ``s`` in their weights, ``z @ W`` behind them.

Where nobody else reads the tensor, what makes it absorbs them: a LayerNormalization's scale and bias, the constant by which an
RMS norm multiplies each channel, the value projection before an attention, the projection that a gate multiplies. Otherwise
the elementwise nodes stand between the tensor and its quantizer, where a GPU's compiler merges them with the quantizing
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.graph.operands import output_bias
from pipeline.quantize.products import Product, product_of
from pipeline.quantize.transforms.absorb import Absorption, Kind, Place, absorption
from pipeline.quantize.transforms.smoothing import F32, Smoothing
from pipeline.quantize.transforms.upstream import gain, is_norm, upstream
from pipeline.types import Array


def apply(model: ir.Model, chosen: Mapping[str, Smoothing]) -> tuple[str, ...]:
    """Change ``model`` in place; what it computes stays the same up to float rounding.

    Args:
        model: The canonical graph. Its weights become lazy: each is multiplied while the model is saved.
        chosen: Tensor to what is done to it, from :func:`pipeline.quantize.transforms.smoothing.by_tensor`.

    Returns:
        Names of the tensors that the GEMMs now read, and of others that are not what they were.
    """
    return _Applier(model.graph).run(chosen)


class _Applier:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = {n.name or "": n for n in graph}
        self.values = {v.name or "": v for v in graph.inputs} | {v.name or "": v for n in graph for v in n.outputs}
        self.names = set(self.values) | set(graph.initializers) | set(self.nodes)

    def run(self, chosen: Mapping[str, Smoothing]) -> tuple[str, ...]:
        made: list[str] = []
        for tensor, smoothing in chosen.items():
            readers = [self.nodes[name] for name in smoothing.group.nodes]
            for node in readers:
                self._weight(node, smoothing)
            adds = [self.nodes[name] for name in smoothing.group.adds]
            made += self._activation(self.values[tensor], readers, adds, smoothing)
        used = {v.name for n in self.graph.all_nodes() for v in n.inputs if v is not None}
        used |= {v.name for v in self.graph.outputs}
        for name in [n for n in self.graph.initializers if n not in used]:
            del self.graph.initializers[name]
        return tuple(made)

    def _activation(
        self, value: ir.Value, readers: list[ir.Node], adds: list[ir.Node], smoothing: Smoothing
    ) -> list[str]:
        """Smooth what the GEMMs read; residual adds that read the same tensor get it back behind the quantizer."""
        axis = smoothing.group.axis
        alone = {r for r, _ in value.uses()} == {*readers, *adds} and not value.is_graph_output()
        changed = self._upstream(value, smoothing) if alone else ()
        if changed:
            smoothed = value
        else:
            steps = [("Sub", smoothing.shift)] if smoothing.shifted else []
            smoothed = self._elementwise(value, [*steps, ("Mul", _inverse(smoothing.scale))], "smoothing", axis)
            for node in readers:
                node.replace_input_with(0, smoothed)
        if smoothing.outliers:
            for node in readers:
                self._beside(node, smoothed, smoothing.outliers)
        if adds:
            steps = [("Add", smoothing.shift)] if smoothing.shifted else []
            restored = self._elementwise(smoothed, [("Mul", smoothing.scale), *steps], "restoring", axis)
            for node in adds:
                node.replace_input_with(list(node.inputs).index(value), restored)
        return [*changed] if changed else [smoothed.name or ""]

    def _upstream(self, value: ir.Value, smoothing: Smoothing) -> tuple[str, ...]:
        """Let what makes ``value`` absorb the smoothing; return the tensors that it changed, none where nothing can."""
        maker = value.producer()
        if maker is None:
            return ()
        if smoothing.group.axis == 1:
            found = absorption(value, len(smoothing.scale), shifted=smoothing.shifted)
            return self._absorb(found, value, smoothing) if found is not None else ()
        if is_norm(maker):
            self._into_norm(maker, smoothing)
            return (value.name or "",)
        index = gain(maker)
        if index is not None and not smoothing.shifted:
            self._into_gain(maker, index, smoothing)
            return (value.name or "",)
        source = upstream(value, len(smoothing.scale))
        if source is None or (smoothing.shifted and not source.shifts):
            return ()
        self._into_projection(source.gemm, smoothing)
        return tuple(v.name or "" for v in (*source.changed, value))

    def _elementwise(self, value: ir.Value, steps: list[tuple[str, F32]], what: str, axis: int) -> ir.Value:
        """Put elementwise nodes with a constant for each channel behind ``value`` and return what the last one makes."""
        new, current = [], value
        for kind, operand in steps:
            along = operand if axis == -1 else operand.reshape(-1, *[1] * (len(value.shape or ()) - 2))
            constant = self._constant(f"{value.name}_{what}_{kind}", along, value)
            node = ir.node(kind, [current, constant], name=self._free(f"{value.name}/{what}/{kind}"))
            current = node.outputs[0]
            current.name = self._free(f"{value.name}_{what}_{kind}_output")
            current.shape, current.type = value.shape, value.type
            new.append(node)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], new)
        else:
            self.graph.insert_after(producer, new)
        return current

    def _into_norm(self, norm: ir.Node, smoothing: Smoothing) -> None:
        inverse = _inverse(smoothing.scale)
        scale = norm.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        norm.replace_input_with(1, self._constant(f"{scale.name}_smoothed", scale.const_value.numpy() * inverse, scale))
        bias = norm.inputs[2] if len(norm.inputs) > 2 else None
        old = bias.const_value.numpy() if bias is not None and bias.const_value is not None else np.zeros_like(inverse)
        if bias is not None or smoothing.shifted:
            constant = self._constant(f"{norm.name}_smoothed_bias", (old - smoothing.shift) * inverse, scale)
            if bias is None:
                norm.resize_inputs(3)
            norm.replace_input_with(2, constant)

    def _into_gain(self, maker: ir.Node, index: int, smoothing: Smoothing) -> None:
        gain = maker.inputs[index]
        assert gain is not None
        assert gain.const_value is not None
        scaled = gain.const_value.numpy() * _inverse(smoothing.scale)
        maker.replace_input_with(index, self._constant(f"{gain.name}_smoothed", scaled, gain))

    def _into_projection(self, gemm: ir.Node, smoothing: Smoothing) -> None:
        """Give a GEMM's output channels the shift and scale: ``(x @ W + b - z) / s``."""
        inverse = _inverse(smoothing.scale)
        made = product_of(gemm)
        self._scaled(made, made.by_output(inverse))
        place = output_bias(gemm, len(inverse))
        if place is not None:
            bias = place[0].inputs[place[1]]
            assert bias is not None
            assert bias.const_value is not None
            moved = (bias.const_value.numpy() - smoothing.shift) * inverse
            place[0].replace_input_with(place[1], self._constant(f"{bias.name}_smoothed", moved, bias))
        elif smoothing.shifted:
            self._behind(gemm, -smoothing.shift * inverse)

    def _absorb(self, found: Absorption, value: ir.Value, smoothing: Smoothing) -> tuple[str, ...]:
        """Let the constants in front of a convolution take scale and shift in; the shift ends at the first summand."""
        shift = smoothing.shift
        for place in found.places:
            self._into(place, smoothing.scale, shift)
            shift = np.zeros_like(shift)
        return tuple(v.name or "" for v in (*reversed(found.between), value))

    def _into(self, place: Place, scale: F32, shift: F32) -> None:
        node, inverse = place.node, _inverse(scale)
        if place.kind is Kind.CONVOLUTION:
            made = product_of(node)
            self._scaled(made, made.by_output(inverse))
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None or shift.any():
                old = (
                    bias.const_value.numpy()
                    if bias is not None and bias.const_value is not None
                    else np.zeros_like(shift)
                )
                node.resize_inputs(3)
                name = f"{node.name}_smoothed_bias"
                node.replace_input_with(2, self._constant(name, (old - shift) * inverse, node.inputs[1]))
            return
        value, output = node.inputs[place.index], node.outputs[0]
        assert value is not None
        rank = len(output.shape) if output.shape is not None else 4
        along = (-1, *[1] * (rank - 2))
        if place.kind is Kind.SMALL:
            factor = self._constant(f"{value.name}_smoothing_factor", inverse.reshape(along), output)
            mul = ir.node("Mul", [value, factor], name=self._free(f"{value.name}/smoothing/Mul"))
            mul.outputs[0].name = self._free(f"{value.name}_smoothing_output")
            mul.outputs[0].shape, mul.outputs[0].type = value.shape, value.type
            node.replace_input_with(place.index, mul.outputs[0])
            self.graph.insert_before(node, [mul])
            return
        assert value.const_value is not None
        old = value.const_value.numpy().reshape(-1)
        by = scale if place.kind is Kind.DIVISOR else inverse
        moved = (old - shift) * by if place.kind is Kind.SUMMAND else old * by
        node.replace_input_with(place.index, self._constant(f"{value.name}_smoothed", moved.reshape(along), value))

    def _weight(self, node: ir.Node, smoothing: Smoothing) -> None:
        made = product_of(node)
        if smoothing.shifted:
            weight, shifts = made.weight(), smoothing.shift[made.channels]
            self._behind(node, (shifts[:, None] @ weight).reshape(-1))
        self._scaled(made, made.by_channel(smoothing.scale))

    def _scaled(self, made: Product, scale: Array) -> None:
        """Multiply a weight by ``scale`` while it is saved."""
        node, index = made.node, made.what.weight
        assert index is not None
        value = node.inputs[index]
        assert value is not None
        source = value.const_value
        assert source is not None

        def smoothed() -> ir.TensorProtocol:
            weight = models.read(source)
            return ir.tensor((weight.astype(np.float32) * scale).astype(weight.dtype))

        name = self._free(f"{value.name}_smoothed")
        lazy = ir.LazyTensor(smoothed, dtype=source.dtype, shape=ir.Shape(source.shape.numpy()), name=name)
        new = ir.Value(name=name, shape=value.shape, type=value.type, const_value=lazy)
        self.graph.register_initializer(new)
        node.replace_input_with(index, new)

    def _behind(self, node: ir.Node, constant: F32) -> None:
        """Add the shift's share of the product to the GEMM's output: to a bias that is there, or with an Add of its own."""
        place = output_bias(node, len(constant))
        if place is not None:
            bias = place[0].inputs[place[1]]
            assert bias is not None
            assert bias.const_value is not None
            summed = bias.const_value.numpy() + constant
            place[0].replace_input_with(place[1], self._constant(f"{bias.name}_shifted", summed, bias))
            return
        output = node.outputs[0]
        if node.op_type == "Conv":
            node.resize_inputs(3)
            node.replace_input_with(2, self._constant(f"{node.name}_smoothing_bias", constant, output))
            return
        add = ir.node(
            "Add",
            [output, self._constant(f"{node.name}_smoothing_bias", constant, output)],
            name=self._free(f"{node.name}/smoothing/Add"),
        )
        self._take_over(output, add)
        self.graph.insert_after(node, [add])

    def _beside(self, node: ir.Node, smoothed: ir.Value, outliers: tuple[int, ...]) -> None:
        """Compute the products of some channels in high precision: zero in the GEMM's weight, added to its output."""
        made = product_of(node)
        weight = made.weight()[0]
        rows, channels = weight[list(outliers)], len(weight)
        mask = np.ones(channels, np.float32)
        mask[list(outliers)] = 0
        self._scaled(made, made.by_channel(mask))
        base = f"{node.name}/outliers"
        picked = self._constant(f"{base}_channels", np.asarray(outliers, np.int64), dtype=np.dtype(np.int64))
        gather = ir.node("Gather", [smoothed, picked], attributes={"axis": -1}, name=self._free(f"{base}/Gather"))
        factor = self._constant(f"{base}_weight", rows[0] if len(outliers) == 1 else rows, smoothed)
        kind = "Mul" if len(outliers) == 1 else "MatMul"
        beside = ir.node(kind, [gather.outputs[0], factor], name=self._free(f"{base}/{kind}"))
        place = output_bias(node, rows.shape[1])
        last = place[0] if place is not None else node
        output = last.outputs[0]
        add = ir.node("Add", [output, beside.outputs[0]], name=self._free(f"{base}/Add"))
        self._take_over(output, add)
        for new, name in ((gather, "Gather"), (beside, kind)):
            new.outputs[0].name = self._free(f"{base}_{name}_output")
            new.outputs[0].type = output.type
        beside.outputs[0].shape = output.shape
        if smoothed.shape is not None:
            gather.outputs[0].shape = ir.Shape([*smoothed.shape.dims[:-1], len(outliers)])
        self.graph.insert_after(last, [gather, beside, add])

    def _take_over(self, output: ir.Value, add: ir.Node) -> None:
        """Let the sum have the name and the readers of one of its terms, for graph outputs and whoever looks it up."""
        name, total = output.name or "", add.outputs[0]
        total.shape, total.type = output.shape, output.type
        output.name = self._free(f"{name}_alone")
        total.name = name
        ir.convenience.replace_all_uses_with(output, total, replace_graph_outputs=True)
        add.replace_input_with(list(add.inputs).index(total), output)
        self.values[name] = total

    def _constant(
        self, name: str, values: Array, like: ir.Value | None = None, *, dtype: np.dtype[Any] | None = None
    ) -> ir.Value:
        if dtype is None:
            dtype = like.dtype.numpy() if like is not None and like.dtype is not None else np.dtype(np.float32)
        tensor = ir.tensor(np.asarray(values).astype(dtype))
        made = ir.Value(
            name=self._free(name),
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(made)
        return made

    def _free(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.names:
            candidate, number = f"{name}_{number}", number + 1
        self.names.add(candidate)
        return candidate


def _inverse(scale: F32) -> F32:
    return (np.float32(1.0) / scale).astype(np.float32)
