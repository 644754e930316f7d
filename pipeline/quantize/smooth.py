"""Apply smoothing to a graph: ``(x - z) / s`` in front of the GEMMs, ``s`` in their weights, ``z @ W`` behind them.

Where nobody else reads the tensor, what makes it absorbs them: a LayerNormalization's scale and bias, the constant by which an
RMS norm multiplies each channel, the value projection before an attention, the projection that a gate multiplies. Otherwise
the elementwise nodes stand between the tensor and its quantizer, where a GPU's compiler merges them with the quantizing
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from pipeline import model as models
from pipeline.graph.operands import Operands, operands, output_bias
from pipeline.quantize.smoothing import F32, Smoothing, rows_by_channel
from pipeline.quantize.upstream import upstream
from pipeline.types import Array


def apply(model: ir.Model, chosen: Mapping[str, Smoothing]) -> tuple[str, ...]:
    """Change ``model`` in place; what it computes stays the same up to float rounding.

    Args:
        model: The canonical graph. Its weights become lazy: each is multiplied while the model is saved.
        chosen: Tensor to what is done to it, from :func:`pipeline.quantize.smoothing.by_tensor`.

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
            made += self._activation(self.values[tensor], readers, smoothing)
        used = {v.name for n in self.graph.all_nodes() for v in n.inputs if v is not None}
        used |= {v.name for v in self.graph.outputs}
        for name in [n for n in self.graph.initializers if n not in used]:
            del self.graph.initializers[name]
        return tuple(made)

    def _activation(self, value: ir.Value, readers: list[ir.Node], smoothing: Smoothing) -> list[str]:
        maker = value.producer()
        alone = {r for r, _ in value.uses()} == set(readers) and not value.is_graph_output()
        if maker is not None and alone:
            if _is_norm(maker):
                self._into_norm(maker, smoothing)
                return [value.name or ""]
            index = _gain(maker)
            if index is not None and not smoothing.shifted:
                self._into_gain(maker, index, smoothing)
                return [value.name or ""]
            source = upstream(value, len(smoothing.scale))
            if source is not None and (source.shifts or not smoothing.shifted):
                self._into_projection(source.gemm, smoothing)
                return [v.name or "" for v in (*source.changed, value)]
        new, current = [], value
        steps = [("Sub", smoothing.shift)] if smoothing.shifted else []
        for kind, operand in (*steps, ("Mul", _inverse(smoothing.scale))):
            constant = self._constant(f"{value.name}_smoothing_{kind}", operand, value)
            node = ir.node(kind, [current, constant], name=self._free(f"{value.name}/smoothing/{kind}"))
            current = node.outputs[0]
            current.name = self._free(f"{value.name}_smoothed_{kind}")
            current.shape, current.type = value.shape, value.type
            new.append(node)
        for node in readers:
            node.replace_input_with(0, current)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], new)
        else:
            self.graph.insert_after(producer, new)
        return [current.name or ""]

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
        what = operands(gemm)
        assert what is not None
        self._scaled(gemm, what, inverse if what.channel_axis == 1 else inverse[:, None])
        place = output_bias(gemm, len(inverse))
        if place is not None:
            bias = place[0].inputs[place[1]]
            assert bias is not None
            assert bias.const_value is not None
            moved = (bias.const_value.numpy() - smoothing.shift) * inverse
            place[0].replace_input_with(place[1], self._constant(f"{bias.name}_smoothed", moved, bias))
        elif smoothing.shifted:
            self._behind(gemm, -smoothing.shift * inverse)

    def _weight(self, node: ir.Node, smoothing: Smoothing) -> None:
        what = operands(node)
        assert what is not None
        assert what.weight is not None
        if smoothing.shifted:
            self._behind(node, smoothing.shift @ rows_by_channel(node))
        self._scaled(node, what, smoothing.scale if what.channel_axis == 0 else smoothing.scale[:, None])

    def _scaled(self, node: ir.Node, what: Operands, scale: Array) -> None:
        """Multiply a weight by ``scale`` while it is saved."""
        assert what.weight is not None
        value = node.inputs[what.weight]
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
        node.replace_input_with(what.weight, new)

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
        add = ir.node(
            "Add",
            [output, self._constant(f"{node.name}_smoothing_bias", constant, output)],
            name=self._free(f"{node.name}/smoothing/Add"),
        )
        add.outputs[0].shape, add.outputs[0].type = output.shape, output.type
        name = output.name or ""
        # The sum takes over the name, for graph outputs and for whoever looks the tensor up.
        output.name = self._free(f"{name}_unshifted")
        add.outputs[0].name = name
        ir.convenience.replace_all_uses_with(output, add.outputs[0], replace_graph_outputs=True)
        add.replace_input_with(0, output)
        self.graph.insert_after(node, [add])
        self.values[name] = add.outputs[0]

    def _constant(self, name: str, values: Array, like: ir.Value) -> ir.Value:
        dtype = like.dtype.numpy() if like.dtype is not None else np.dtype(np.float32)
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


def _is_norm(node: ir.Node) -> bool:
    """Whether this is a LayerNormalization over the last axis whose scale and bias are constants."""
    if node.op_type != "LayerNormalization" or node.domain not in ("", "ai.onnx"):
        return False
    axis, weight = node.attributes.get("axis"), node.inputs[1]
    constants = all(v is None or v.const_value is not None for v in node.inputs[1:])
    return constants and (axis is None or axis.as_int() == -1) and weight is not None and len(weight.shape or ()) == 1


def _gain(node: ir.Node) -> int | None:
    """Return which input multiplies every channel by a constant: an RMS norm's last step, or an RMSNormalization's scale."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Mul", "RMSNormalization"):
        return None
    axis = node.attributes.get("axis")
    if node.op_type == "RMSNormalization" and not (axis is None or axis.as_int() == -1):
        return None
    output = node.outputs[0]
    channels = output.shape[-1] if output.shape is not None and len(output.shape) else None
    for index, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and tuple(value.const_value.shape) == (channels,):
            return index
    return None


def _inverse(scale: F32) -> F32:
    return (np.float32(1.0) / scale).astype(np.float32)
