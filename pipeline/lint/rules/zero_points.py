"""Rules about zero points."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from pipeline.lint.qdq_graph import QdqGraph
from pipeline.lint.quantizer import QUANTIZED
from pipeline.lint.rule import Hit, rule


@rule("QDQ101", "nonzero-zero-point", fix="Quantize symmetrically (INT8, zero point 0) and calibrate again.")
def nonzero_zero_point(graph: QdqGraph) -> Iterator[Hit]:
    """TensorRT quantizes symmetrically.

    Zero is stored as 0. Its parser refuses other zero points; for FP8 it does not read them at all, so the engine
    would compute something else.

    Source: onnx-tensorrt, onnxOpImporters.cpp: "Non-zero zero point is not supported"; measured.
    """
    for q in graph.quantizers.values():
        zero = q.zero_point
        if zero is not None and zero.array is not None and np.any(zero.array != 0):
            first = zero.array[zero.array != 0].reshape(-1)[0]
            ignored = zero.dtype == ir.DataType.FLOAT8E4M3FN
            what = f"the zero point is {first:g}" + ("; TensorRT ignores it without a word" if ignored else "")
            yield Hit(node=q.node, tensor=zero.value, message=what)


@rule("QDQ102", "runtime-zero-point", fix="Leave the zero point out, or store it as an initializer of zeros.")
def runtime_zero_point(graph: QdqGraph) -> Iterator[Hit]:
    """A zero point must be a constant of zeros.

    The builder refuses one that is an input or computed from one; for FP8 it is never read.

    Source: measured: "IQuantizeLayer/IDequantizeLayer has `zero_point` which is not an initializer".
    """
    for q in graph.quantizers.values():
        if q.zero_point is not None and not q.zero_point.constant:
            what = "the zero point is only known while the engine runs"
            yield Hit(node=q.node, tensor=q.zero_point.value, message=what)


@rule("QDQ106", "read-as-int8", fix="Quantize to INT8 with zero point 0; UINT8 ranges must be calibrated again.")
def read_as_int8(graph: QdqGraph) -> Iterator[Hit]:
    """A Q that says UINT8 makes INT8 in TensorRT. So does one whose zero point is INT16 or INT32, and one that has neither a zero point nor an output type, which ONNX defines as UINT8. What lies above 127 x scale saturates, so the engine computes something else than the graph says; the parser warns at most.

    Source: onnx-tensorrt, onnxOpImporters.cpp: "Defaulting to INT8 instead"; ONNX QuantizeLinear; measured.
    """
    for q in graph.of_kind(quantizes=True):
        if q.zero_point is not None:
            dtype = q.zero_point.dtype
            if dtype is not None and dtype not in QUANTIZED:
                yield Hit(node=q.node, tensor=q.zero_point.value, message=f"{dtype.name} is read as INT8")
        elif q.output_dtype is None:
            what = "without a zero point or output_dtype ONNX means UINT8, and TensorRT INT8"
            yield Hit(node=q.node, tensor=q.output, message=what)
