"""Which types of one matrix product compile for which GPU: asked of the real builder, not of a table."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.compile_check import CHECKABLE, available, compile_check
from pipeline.errors import EngineError

pytestmark = pytest.mark.skipif(not available(), reason="needs pip install '.[rtx]'")

K, N = 256, 128
SM = {name: capability for capability, name in CHECKABLE.items()}
FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

COMPILES = {
    "fp32": ("SM80", "SM86", "SM89", "SM120"),
    "fp16": ("SM75", "SM80", "SM86", "SM89", "SM120"),
    "bf16": ("SM80", "SM86", "SM89", "SM120"),
    "int8": ("SM75", "SM80", "SM86", "SM89", "SM120"),
    "fp8": ("SM89", "SM120"),
    "int4": ("SM80", "SM86", "SM89", "SM120"),
    "fp4": ("SM120",),
    "mxfp8": (),
}
"""Type to the GPUs that TensorRT for RTX 1.7 compiles it for: one product, FP16 scales, INT4 in blocks of 128, FP4 of 16.

Its parser imports no constant of E8M0, MXFP8's scales, so there is nothing to compile for any GPU."""

FAST = {
    ("fp32", "SM75"),
    ("int8", "SM80"),
    ("fp8", "SM80"),
    ("fp8", "SM89"),
    ("int4", "SM75"),
    ("bf16", "SM80"),
    ("mxfp8", "SM120"),
}
CELLS = [
    pytest.param(kind, sm, marks=() if (kind, sm) in FAST else pytest.mark.slow, id=f"{kind}-{sm}")
    for kind in COMPILES
    for sm in ("SM75", "SM80", "SM86", "SM89", "SM120")
]


def product(path: Path, kind: str) -> Path:
    """y = x @ w, with x and w in ``kind``; INT4 and FP4 are weights alone."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(K, N)).astype(np.float32)
    outer = FLOATS.get(kind, TensorProto.FLOAT16)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    x, w = "x", "w"
    if kind in FLOATS:
        constants.append(helper.make_tensor("w", outer, (K, N), values.ravel()))
    elif kind in ("int8", "fp8"):
        stored = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
        zero = helper.make_tensor("zero", stored, (), [0])
        constants += [numpy_helper.from_array(np.float16(0.02), "scale"), zero]
        constants.append(helper.make_tensor("stored", stored, (K, N), np.clip(np.rint(values * 30), -100, 100).ravel()))
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["w"], name="weight"))
        x = "d"
    elif kind == "mxfp8":
        eights = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tobytes()
        ones = np.full(K // 32 * N, 127, np.uint8).tobytes()  # the exponent of 1
        constants.append(helper.make_tensor("stored", TensorProto.FLOAT8E4M3FN, (K, N), eights, raw=True))
        constants.append(helper.make_tensor("scale", TensorProto.FLOAT8E8M0, (K // 32, N), ones, raw=True))
        form = {"axis": 0, "block_size": 32, "output_dtype": outer}
        nodes.append(helper.make_node("DequantizeLinear", ["stored", "scale"], ["w"], name="weight", **form))
    else:
        block, stored, numpy_type = (
            (128, TensorProto.INT4, ml_dtypes.int4)
            if kind == "int4"
            else (16, TensorProto.FLOAT4E2M1, ml_dtypes.float4_e2m1fn)
        )
        nibbles = np.clip(np.rint(values * 2), -6, 6).astype(numpy_type).view(np.uint8).ravel() & 15
        packed = (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()
        constants.append(helper.make_tensor("stored", stored, (K, N), packed, raw=True))
        constants.append(numpy_helper.from_array(np.full((K // block, N), 0.1, np.float16), "scale"))
        nodes.append(
            helper.make_node("DequantizeLinear", ["stored", "scale"], ["w"], name="weight", axis=0, block_size=block)
        )
    nodes.append(helper.make_node("MatMul", [x, w], ["y"], name="product"))
    ends = [helper.make_tensor_value_info(n, outer, s) for n, s in (("x", (8, K)), ("y", (8, N)))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.mark.parametrize(("kind", "sm"), CELLS)
def test_the_builder_agrees(tmp_path: Path, kind: str, sm: str) -> None:
    path = product(tmp_path / "m.onnx", kind)
    if sm in COMPILES[kind]:
        layers = compile_check(path, SM[sm], {"x": (8, K)})
        assert sum(layer.flops for layer in layers) == 2 * 8 * K * N
    else:
        with pytest.raises(EngineError, match=sm):
            compile_check(path, SM[sm], {"x": (8, K)})
