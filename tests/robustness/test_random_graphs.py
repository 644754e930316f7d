"""Random networks through preparation and quantization: valid, runnable, and close to FP32."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import Builder, graphs

from pipeline.build import BuildOptions, build
from pipeline.recipe import parse

FAMILIES = {"cpu": "cpu", "a100": "gpu-int8"}
LEAST_DB = 10.0
MARGIN_DB = 6.0
"""Activations are rounded at every layer and not only at the input."""
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


FP16_BIAS = "WeightBiasQuantization"
"""ONNX Runtime's optimizer gives a float bias behind Q/DQ the scale ``scale(x) * scale(w)`` in the scales' own type, and
in FP16 that product is soon zero: not a property of the variant, which has a float bias on purpose."""


def run(path: Path, x: np.ndarray, *, optimize: bool) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    skipped = [FP16_BIAS] if path.parent.name.startswith("gpu") else []
    live = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped)
    return live.run(None, {"x": x})


def sqnr_db(want: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(want.astype(np.float64) - got).sum()
    signal = np.square(want.astype(np.float64)).sum()
    return float("inf") if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise))


def sensitivity_db(proto: onnx.ModelProto, x: np.ndarray, wanted: list[np.ndarray]) -> list[float]:
    """Return the SQNR of each output if weights and input are off by a random part of an 8-bit step, in float.

    Where that is low the network itself is ill-conditioned (its terms cancel), whatever quantizes it.
    """
    rng = np.random.default_rng(0)

    def shaken(array: np.ndarray) -> np.ndarray:
        step = np.abs(array).max(initial=0.0) / 127
        return (array + rng.uniform(-step / 2, step / 2, array.shape)).astype(np.float32)

    worst = [float("inf")] * len(wanted)
    for _ in range(3):
        noisy = onnx.ModelProto()
        noisy.CopyFrom(proto)
        for tensor in noisy.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.CopyFrom(onnx.numpy_helper.from_array(shaken(onnx.numpy_helper.to_array(tensor)), tensor.name))
        live = ort.InferenceSession(noisy.SerializeToString(), providers=["CPUExecutionProvider"])
        found = live.run(None, {"x": shaken(x)})
        worst = [min(w, sqnr_db(a, b)) for w, a, b in zip(worst, wanted, found, strict=True)]
    return worst


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Few samples are said once a graph otherwise; the level is put back for the tests that look at notices."""
    log = logging.getLogger("pipeline.notice")
    before = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(before)


def check(proto: onnx.ModelProto, x: np.ndarray, method: str) -> int:
    """Return how many tensors were quantized."""
    pairs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model.onnx"
        source.write_bytes(proto.SerializeToString())
        np.savez(folder / "c.npz", x=x)
        rules = [{"op_type": op, "precision": "int8"} for op in ("MatMul", "Gemm", "Conv", "ConvTranspose")]
        recipe = parse(
            {
                "source": {"onnx": str(source)},
                "calibration": {"data": str(folder / "c.npz"), "method": method},
                "policy": {"preset": "int8-all", "rules": rules},
                "targets": list(FAMILIES),
                "threads": 1,
            }
        )
        build(recipe, folder / "build", options=BuildOptions(until="quantize"))
        wanted = run(source, x, optimize=False)
        bounds = [min(LEAST_DB, db - MARGIN_DB) for db in sensitivity_db(proto, x, wanted)]
        for family in FAMILIES.values():
            variant = folder / "build" / "variants" / family / "model.onnx"
            onnx.checker.check_model(str(variant), full_check=True)
            stored = onnx.load(variant)
            pairs += sum(n.op_type == "DequantizeLinear" for n in stored.graph.node)
            for optimize in (False, True):
                found = run(variant, x, optimize=optimize)
                for output, want, got, bound in zip(stored.graph.output, wanted, found, bounds, strict=True):
                    assert got.shape == want.shape
                    assert got.dtype == want.dtype
                    measured = sqnr_db(want, got)
                    assert measured > bound, (family, optimize, output.name, measured, bound)
    return pairs


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e3])
def test_activations_of_any_size(size: float) -> None:
    """Biases would drown small activations; without them only their relative error counts."""
    builder = Builder(rng=np.random.default_rng(3))
    builder.add("MatMul", ["x", builder.weight(32, 64, fan_in=32)], (64,))
    builder.add("Relu", ["v0"], (64,))
    builder.add("MatMul", ["v1", builder.weight(64, 16, fan_in=64)], (16,))
    x = (size * builder.rng.normal(size=(8, 32))).astype(np.float32)
    assert check(builder.model((32,), [("v2", (16,))]), x, "minmax") >= 8


@given(graphs(), st.sampled_from(["minmax", "mse", "auto"]))
@settings(QUIET, max_examples=25, derandomize=True)
def test_random_graphs(case: tuple[onnx.ModelProto, np.ndarray], method: str) -> None:
    check(*case, method)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(graphs(most_nodes=12), st.sampled_from(["minmax", "mse", "auto"]))
@settings(QUIET, max_examples=400)
def test_many_random_graphs(case: tuple[onnx.ModelProto, np.ndarray], method: str) -> None:
    check(*case, method)
