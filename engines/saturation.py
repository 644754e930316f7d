"""Whether this CPU's INT8 kernels compute what the graph says."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from pipeline.running.session import run, session


@functools.cache
def products_saturate() -> bool:
    """Return whether ONNX Runtime's uint8 x int8 products overflow on this machine.

    x86 without VNNI adds two products in 16 bits, and saturates: a product of large activations and large weights comes
    out smaller. VNNI, AMX and Arm add them in 32 bits. Asked of the kernel itself, with the largest operands.
    """
    rows, inner, columns = 4, 64, 32
    a = ir.Value(name="a", shape=ir.Shape([rows, inner]), type=ir.TensorType(ir.DataType.UINT8))
    weight = ir.tensor(np.full((inner, columns), 127, np.int8), name="b")
    b = ir.Value(name="b", shape=ir.Shape([inner, columns]), type=ir.TensorType(ir.DataType.INT8), const_value=weight)
    node = ir.node("MatMulInteger", [a, b], name="product")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([rows, columns]), ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([a], [y], nodes=[node], initializers=[b], opset_imports={"": 21}, name="g")
    serialized = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = run(session(serialized, threads=1), ["y"], {"a": np.full((rows, inner), 255, np.uint8)})
    return bool((found != inner * 255 * 127).any())
