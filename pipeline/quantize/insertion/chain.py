"""Chains of small nodes on an activation: what dynamic quantization and the simulation of schemes are made of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.quantize.insertion.insert import Inserter

FLOAT = ir.DataType.FLOAT
_TINY = 1e-30
"""Least magnitude that is divided by: rows of zeros stay zeros."""


class Chain:
    """Nodes in the order in which they are made, with free names and known types."""

    def __init__(self, names: Inserter) -> None:
        self.names = names
        self.nodes: list[ir.Node] = []

    def add(
        self, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType = FLOAT, **attributes: int
    ) -> ir.Value:
        """Make a node and return its only output."""
        (output,) = self.add_all(op_type, inputs, name, (dtype,), **attributes)
        return output

    def add_all(
        self, op_type: str, inputs: list[ir.Value], name: str, dtypes: tuple[ir.DataType, ...], **attributes: int
    ) -> tuple[ir.Value, ...]:
        """Make a node and return its outputs, one for each type."""
        node = self.names.node(op_type, inputs, name, len(dtypes), attributes)
        for output, dtype in zip(node.outputs, dtypes, strict=True):
            output.dtype = dtype
        self.nodes.append(node)
        return tuple(node.outputs)

    def number(self, name: str, number: float) -> ir.Value:
        """Return a float32 scalar."""
        return self.names.constant(name, np.array(number, np.float32))

    def integers(self, name: str, *numbers: int) -> ir.Value:
        """Return an int64 vector, such as axes or a shape."""
        return self.names.constant(name, np.array(numbers, np.int64))


def row_largest(new: Chain, value: ir.Value, name: str) -> ir.Value:
    """Return the largest magnitude of every row of the last axis, ``[..., 1]``, above 0."""
    magnitudes = new.add("Abs", [value], f"{name}_row_magnitudes")
    largest = new.add("ReduceMax", [magnitudes, new.integers(f"{name}_last_axis", -1)], f"{name}_row_largest")
    return new.add("Max", [largest, new.number(f"{name}_row_least", _TINY)], f"{name}_row_scale")


def outlier_columns(new: Chain, value: ir.Value, width: int, threshold: float) -> ir.Value:
    """Return whether each column of ``value`` ``[..., width]`` has a magnitude above ``threshold``, bool ``[width]``."""
    name = value.name or ""
    magnitudes = new.add("Abs", [value], f"{name}_magnitudes")
    rows = new.add("Reshape", [magnitudes, new.integers(f"{name}_as_rows", -1, width)], f"{name}_magnitudes_rows")
    largest = new.add("ReduceMax", [rows, new.integers(f"{name}_first_axis", 0)], f"{name}_column_largest", keepdims=0)
    limit = new.number(f"{name}_threshold", threshold)
    return new.add("Greater", [largest, limit], f"{name}_is_outlier", ir.DataType.BOOL)
