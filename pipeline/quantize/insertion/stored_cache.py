"""Store a key-value cache in INT8 or FP8: what the model reads as past and gives as present has the narrow type.

The pair on the new keys (or values) stands before the Concat already. Both sides of the Concat have one scale, so its
DequantizeLinear moves behind it and an INT8 cache is joined as it is stored: ``QuantizeLinear -> Concat -> DequantizeLinear``.
ONNX has no Concat of FP8 values; there the past is dequantized before it and what is stored is quantized again behind it,
which changes no value. TensorRT for RTX compiles both, and keeps the fused attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from pipeline.quantize.insertion.insert import Inserter

_MOVING = ("Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""What moves or repeats values between the cache and the attention matmuls."""


def store_quantized(inserter: Inserter, concat: ir.Node) -> None:
    """Give the cache that ``concat`` joins the type of the Q/DQ pair that its new values have.

    Args:
        inserter: Has inserted the activation pairs.
        concat: A node of the role ``kv_cache``: past (a graph input) and new values to present (a graph output).
    """
    past, new, present = concat.inputs[0], concat.inputs[1], concat.outputs[0]
    assert past is not None
    assert new is not None
    dequantize = new.producer()
    assert dequantize is not None
    quantized, *pair = (value for value in dequantize.inputs if value is not None)
    dtype = pair[-1].dtype
    assert dtype is not None
    past.dtype = dtype
    if dtype is ir.DataType.INT8:
        concat.replace_input_with(1, quantized)
        # ONNX Runtime 1.32 moves a DequantizeLinear over a Transpose or Unsqueeze itself by adding a pair of the wrong
        # type, so on a CPU it stands behind these from the start, and they move a quarter of the bytes.
        _dequantize_late(inserter, present, dtype, pair, over=_MOVING if inserter.plan.family == "cpu" else ())
        if not new.uses():
            inserter.graph.remove(dequantize, safe=True)
        return
    read = inserter.node("DequantizeLinear", [past, *pair], f"{past.name}_DequantizeLinear")
    _type(read.outputs[0], new.dtype, past.shape)
    inserter.graph.insert_before(concat, [read])
    concat.replace_input_with(0, read.outputs[0])
    stored = inserter.node("QuantizeLinear", [present, *pair], f"{present.name}_QuantizeLinear")
    _type(stored.outputs[0], dtype, present.shape)
    inserter.graph.insert_after(concat, [stored])
    inserter.give_output(present, stored.outputs[0])


def _dequantize_late(
    inserter: Inserter, value: ir.Value, dtype: ir.DataType, pair: list[ir.Value], *, over: tuple[str, ...]
) -> None:
    """Let ``value`` be quantized, and what reads it read it dequantized, behind nodes of the kinds in ``over``."""
    floating, producer = value.dtype, value.producer()
    value.dtype = dtype
    others = []
    for reader, index in list(value.uses()):
        if reader.op_type in over and index == 0 and not reader.outputs[0].is_graph_output():
            _dequantize_late(inserter, reader.outputs[0], dtype, pair, over=over)
        elif reader.op_type != "Shape":
            others.append((reader, index))
    if not others:
        return
    node = inserter.node("DequantizeLinear", [value, *pair], f"{value.name}_DequantizeLinear")
    _type(node.outputs[0], floating, value.shape)
    assert producer is not None
    inserter.graph.insert_after(producer, [node])
    for reader, index in others:
        reader.replace_input_with(index, node.outputs[0])


def _type(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
    value.type = None if dtype is None else ir.TensorType(dtype)
    value.shape = shape
