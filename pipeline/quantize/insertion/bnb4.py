"""NF4 weights for ONNX Runtime on a CPU: ``com.microsoft.MatMulBnb4``, which widens them to the graph's float type as it multiplies.

Doubly quantized absolute maxima are stored as they are and expanded in the graph by nodes that read constants alone, which ONNX Runtime
folds when it loads the model: the file is smaller, what runs is not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pipeline.quantize.weights.nf4 import SecondLevel, dynamic_code
from pipeline.quantize.weights.weight import QuantizedWeight
from pipeline.types import Array

DOMAIN, OPERATOR = "com.microsoft", "MatMulBnb4"
_NF4 = 1
"""The operator's ``quant_type``; 0 is bitsandbytes' FP4."""


def packed(weight: QuantizedWeight, name: str) -> tuple[ir.LazyTensor, Array]:
    """Return the weight as the kernel wants it, computed while the model is saved, and its absolute maxima.

    Returns:
        uint8 ``[outputs * summed / 2]``, two codes in a byte, the first in the high half, output after output; and float32
        ``[outputs * blocks]`` in the same order.
    """
    source, summed_axis = weight.tensor, weight.axis or 0

    def compute() -> ir.TensorProtocol:
        codes = source.numpy()
        flat = (codes.T if summed_axis == 0 else codes).reshape(-1)
        return ir.tensor(flat[0::2] << 4 | flat[1::2])

    size = int(np.prod(source.shape.numpy())) // 2
    maxima = weight.scale.T if summed_axis == 0 else weight.scale
    lazy = ir.LazyTensor(compute, dtype=ir.DataType.UINT8, shape=ir.Shape((size,)), name=name)
    return lazy, np.ascontiguousarray(maxima).reshape(-1)


def attributes(weight: QuantizedWeight) -> dict[str, int]:
    """Return the operator's attributes."""
    assert weight.block is not None
    blocks, outputs = weight.scale.shape if weight.axis == 0 else weight.scale.shape[::-1]
    return {"K": blocks * weight.block, "N": outputs, "block_size": weight.block, "quant_type": _NF4}


def expansion(
    maxima: SecondLevel, dtype: npt.DTypeLike
) -> tuple[dict[str, Array], list[tuple[str, list[str], dict[str, int]]]]:
    """Return the constants that stand for doubly quantized maxima, by a short name, and the steps that expand them.

    A step is an operator, its inputs (constants, or the step before as ``""``) and its attributes; the last gives ``[count]``.
    """
    constants: dict[str, Array] = {
        "codes": maxima.codes,
        "code": dynamic_code(),
        "scale": maxima.scale,
        "offset": maxima.offset,
        "flat": np.array([-1]),
    }
    steps: list[tuple[str, list[str], dict[str, int]]] = [
        ("Cast", ["codes"], {"to": int(ir.DataType.INT32)}),
        ("Gather", ["code", ""], {}),
        ("Mul", ["", "scale"], {}),
        ("Add", ["", "offset"], {}),
        ("Reshape", ["", "flat"], {}),
    ]
    if maxima.codes.size != maxima.count:
        constants |= {"begin": np.array([0]), "end": np.array([maxima.count])}
        steps.append(("Slice", ["", "begin", "end"], {}))
    if np.dtype(dtype) == np.float16:
        steps.append(("Cast", [""], {"to": int(ir.DataType.FLOAT16)}))
    return constants, steps
