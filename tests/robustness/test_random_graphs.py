"""Random networks through preparation and quantization: valid, runnable, and close to FP32."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import graphs

from pipeline.build import BuildOptions, build
from pipeline.recipe import parse

FAMILIES = {"cpu": "cpu", "a100": "gpu-int8"}
LEAST_DB = 10.0
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def run(path: Path, x: np.ndarray, *, optimize: bool) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def sqnr_db(want: np.ndarray, got: np.ndarray) -> float:
    noise = np.square(want.astype(np.float64) - got).sum()
    signal = np.square(want.astype(np.float64)).sum()
    return float("inf") if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise))


def check(proto: onnx.ModelProto, x: np.ndarray, method: str) -> int:
    """Return how many tensors were quantized."""
    logging.getLogger("pipeline.notice").setLevel(logging.CRITICAL)
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
        for family in FAMILIES.values():
            variant = folder / "build" / "variants" / family / "model.onnx"
            onnx.checker.check_model(str(variant), full_check=True)
            stored = onnx.load(variant)
            pairs += sum(n.op_type == "DequantizeLinear" for n in stored.graph.node)
            for optimize in (False, True):
                for output, want, got in zip(stored.graph.output, wanted, run(variant, x, optimize=optimize), strict=True):
                    assert got.shape == want.shape
                    assert got.dtype == want.dtype
                    measured = sqnr_db(want, got)
                    assert measured > LEAST_DB, (family, optimize, output.name, measured)
    return pairs


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
