"""``costs.json``: what each quantized node costs in INT8 and in FP32, measured, for planning to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.policy.plan import PrecisionPlan


def node_costs(
    variant: Path, plan: PrecisionPlan, fp32_ms: Mapping[str, float], int8_ms: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Return node name to ``{"fp32_ms", "int8_ms"}`` for every quantized node that both profiles show.

    A node's INT8 cost includes its part of the QuantizeLinear in front of it, shared by all that read the pair, and
    the DequantizeLinear behind a table that is looked up.

    Args:
        variant: The Q/DQ model.
        plan: Its plan.
        fp32_ms: Node name to milliseconds in the FP32 model.
        int8_ms: The same in the variant.
    """
    model = models.load(variant)
    nodes = {n.name or "": n for n in model.graph}
    costs = {}
    for entry in plan.quantized():
        name = entry.node
        if name in fp32_ms and name in int8_ms and name in nodes:
            costs[name] = {"fp32_ms": fp32_ms[name], "int8_ms": int8_ms[name] + _quantization(nodes[name], int8_ms)}
    return costs


def _quantization(node: ir.Node, int8_ms: Mapping[str, float]) -> float:
    total = 0.0
    for value in node.inputs:
        dequantize = value.producer() if value is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
            continue
        quantize = dequantize.inputs[0].producer()
        if quantize is not None:
            readers = len(dequantize.outputs[0].uses())
            total += int8_ms.get(quantize.name or "", 0.0) / max(readers, 1)
    if node.op_type == "Gather":
        total += sum(int8_ms.get(reader.name or "", 0.0) for reader, _ in node.outputs[0].uses())
    return total


def write_costs(
    path: Path, costs: Mapping[str, Mapping[str, float]], *, machine: str, batch: int, threads: int
) -> None:
    """Write ``costs.json``."""
    values = {"machine": machine, "batch": batch, "threads": threads, "nodes": costs}
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_costs(path: Path | None) -> dict[str, dict[str, float]]:
    """Return node name to ``{"fp32_ms", "int8_ms"}``; empty without a file.

    Raises:
        RecipeError: The file cannot be read or is no ``costs.json``.
    """
    if path is None:
        return {}
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
        return {n: {"fp32_ms": float(c["fp32_ms"]), "int8_ms": float(c["int8_ms"])} for n, c in nodes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"The node costs cannot be read: {error}.",
            where=str(path),
            fix="Write them with `python -m pipeline profile`.",
        ) from error
