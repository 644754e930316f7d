"""TensorRT for RTX compiles small graphs here, without a GPU; what it says it made is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from engines.compile_check import CHECKABLE, available, checked_capability, compile_check
from engines.compiled_layers import CompiledLayers
from engines.layer_log import parse_layers
from pipeline.errors import EngineError
from pipeline.quantize.quantize import quantize
from tests.quantize.graphs import cnn, mlp, save
from tests.quantize.planning import plan_for
from tests.quantize.test_quantize_variants import ranges_for

needs_rtx = pytest.mark.skipif(not available(), reason="needs pip install '.[rtx]'")

LOG = (
    "Layers:\n"
    "Name: /q/MatMul+/k/MatMul_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1024,384], Strides: [384,1], "
    "StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ { Name: w, Dimensions: "
    "[384,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], "
    "Outputs: [ { Name: y, Dimensions: [1024,768], Strides: [768,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) "
    "Row major linear format }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: /q/MatMul]\x1f[ONNX Layer: /k/MatMul]"
    "\x1f[ONNX Layer: odd [name], with: commas]\n"
    "Name: wait, LayerType: wait, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
)


def test_a_log_line_becomes_a_layer() -> None:
    gemm, wait = parse_layers([LOG])
    assert (gemm.kind, gemm.tactic) == ("gemm", "stub")
    assert gemm.origins == ("/q/MatMul", "/k/MatMul", "odd [name], with: commas")
    assert [(t.name, t.shape, t.dtype) for t in (*gemm.inputs, *gemm.constants, *gemm.outputs)] == [
        ("x", (1024, 384), "Int8"),
        ("w", (384, 768), "Int8"),
        ("y", (1024, 768), "Half"),
    ]
    assert gemm.bytes_moved == 1024 * 384 + 384 * 768 + 2 * 1024 * 768
    assert gemm.flops == 2 * 1024 * 384 * 768
    assert gemm.is_low_precision
    assert not wait.is_kernel


def test_layers_survive_json() -> None:
    layers = CompiledLayers(builder="b", compute_capability="SM80", engine_bytes=7, layers=parse_layers([LOG]))
    assert CompiledLayers.from_json(layers.to_json()) == layers
    assert layers.kernels == 1


def test_text_that_is_no_layer_is_passed_over() -> None:
    assert parse_layers(["Name: nothing", "LayerType: gemm", "", "[W] something, LayerType: x"]) == ()


def test_proxies_are_never_the_gpu_itself() -> None:
    assert checked_capability((8, 0)) == (8, 0)
    assert checked_capability((9, 0)) == (8, 9)
    assert checked_capability((7, 0)) is None


@needs_rtx
@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_quantized_matmuls_become_int8_gemms(tmp_path: Path, capability: tuple[int, int]) -> None:
    path, _ = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "gpu-int8", {"up", "down"})
    variant = quantize(path, plan, ranges_for(path, plan, {"x": (-3, 3), "r": (0, 25)}), tmp_path / "q.onnx").path
    layers = compile_check(variant, capability, {"x": (64, 32)})
    assert layers.compute_capability == CHECKABLE[capability]
    low = [layer for layer in layers if layer.is_low_precision]
    assert {node for layer in low for node in layer.origins} >= {"up", "down"}
    assert layers.low_precision_flops_share == pytest.approx(1.0)
    assert sum(layer.flops for layer in layers) == pytest.approx(2 * 64 * (32 * 48 + 48 * 24))
    assert layers.engine_bytes > 0


@needs_rtx
def test_quantized_convolutions_become_int8_kernels(tmp_path: Path) -> None:
    path = cnn(tmp_path / "cnn.onnx")
    plan = plan_for(path, "gpu-int8", {"conv0", "conv1", "skip", "conv2"})
    known = {"x": (-4, 4), "r0": (0, 6), "r1": (0, 9)}
    variant = quantize(path, plan, ranges_for(path, plan, known), tmp_path / "q.onnx").path
    layers = compile_check(variant, (8, 0), {"x": (2, 16, 12, 12)})
    low = {node for layer in layers if layer.is_low_precision for node in layer.origins}
    assert low >= {"conv0", "conv1", "conv2"}
    assert sum(layer.flops for layer in layers) == pytest.approx(3 * 2 * 2 * 16 * 12 * 12 * 16 * 9)


@needs_rtx
def test_a_refusal_names_the_node(tmp_path: Path) -> None:
    weights = {"s": np.float32(0.1).reshape(()), "z": np.asarray(3, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="off_centre"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="back"),
    ]
    path = save(tmp_path / "bad.onnx", nodes, [("x", ["b", 4])], [("y", ["b", 4])], weights)
    with pytest.raises(EngineError, match=r"(?s)parser refuses.*off_centre.*zero point"):
        compile_check(path, (8, 0), {"x": (1, 4)})
