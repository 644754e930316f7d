"""Rules about the numbers in scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from pipeline.lint.finding import Severity
from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.repair import silence_dead_channels
from pipeline.lint.rule import Hit, rule

_SMALLEST_NORMAL_FP16 = 2.0**-14


@rule(
    "QDQ104",
    "bad-scale",
    fix="Give every channel a positive scale (1 where all values are 0); in FP16 at least 6.1e-5, or use FP32 scales.",
    repair=silence_dead_channels,
)
def bad_scale(graph: QdqGraph) -> Iterator[Hit]:
    """A scale must be a positive, finite number.

    TensorRT divides by it. Its parser refuses zero, negative and NaN scales in initializers and constants; infinite
    ones, and all of them behind an Identity or Cast, it takes without a word.

    Source: onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper: "Scale coefficients must all be positive";
    measured.
    """
    for q in graph.quantizers.values():
        array = q.scale.array
        if array is None or not array.size:
            continue
        # Measured: of INT4 that is dequantized, zero and negative scales are taken, and mean what they say.
        signed = not q.quantizes and graph.dtype(q.data) is ir.DataType.INT4
        bad = ~(np.isfinite(array) & ((array > 0) | signed))
        if bad.any():
            worst = array[bad].reshape(-1)[0]
            what = f"{int(bad.sum())} of {array.size} scales are not positive and finite (such as {worst:g})"
            if worst == 0 and q.scale.dtype == ir.DataType.FLOAT16:
                what += "; in FP16 everything below 6e-8 is 0"
            refused = q.scale.checked and not signed and not bool(np.all(array[bad] == np.inf))
            yield Hit(
                node=q.node, tensor=q.scale.value, message=what + ("" if refused else "; the parser does not see it")
            )


@rule(
    "QDQ116",
    "runtime-scale",
    severity=Severity.WARNING,
    fix="Store the scale as an initializer.",
)
def runtime_scale(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT's documentation wants scales that are constants when the engine is built.

    TensorRT for RTX takes scales that are inputs or computed, and does not check their values.

    Source: NvInfer.h, IQuantizeLayer and IDequantizeLayer (allowed scale subgraphs); measured.
    """
    for q in graph.quantizers.values():
        if not q.scale.constant and graph.dequantizer(q.scale.value) is None:
            yield Hit(node=q.node, tensor=q.scale.value, message="the scale is only known while the engine runs")


@rule(
    "QDQ117",
    "fp16-scale-underflow",
    severity=Severity.WARNING,
    fix="Store the scale in FP32, or scale the tensor up before it is quantized.",
)
def fp16_scale_underflow(graph: QdqGraph) -> Iterator[Hit]:
    """FP16 numbers below 6.1e-5 are subnormal and lose a bit of precision with every halving.

    At 6e-8 a scale is wrong by up to a third. What underflows to 0 is QDQ104.

    Source: IEEE 754 binary16; measured: parser and builder take such scales without a word.
    """
    for q in graph.quantizers.values():
        array = q.scale.array
        if array is None or q.scale.dtype != ir.DataType.FLOAT16:
            continue
        small = (array > 0) & (array < _SMALLEST_NORMAL_FP16)
        if small.any():
            what = f"{int(small.sum())} of {array.size} FP16 scales are subnormal (smallest {array[small].min():.2g})"
            yield Hit(node=q.node, tensor=q.scale.value, message=what)
