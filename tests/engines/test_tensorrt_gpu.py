"""What only a GPU can show: engines of full TensorRT are built, run and timed. Run with ``pytest -m gpu``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from engines.target import Target
from engines.tensorrt.build import build_engine, profiles_for
from engines.tensorrt.flavour import Flavour, installed, release
from engines.tensorrt.gpus import gpus
from engines.tensorrt.options import BuilderOptions, Implicit
from pipeline.errors import EngineError
from pipeline.quantize.quantize import quantize
from pipeline.types import Precision
from tests.quantize.graphs import mlp
from tests.quantize.planning import plan_for
from tests.quantize.test_quantize_variants import ranges_for

pytestmark = pytest.mark.gpu
SHAPES = {"x": (64, 32)}
KNOWN = {"x": (-3.0, 3.0), "r": (0.0, 25.0)}


@pytest.fixture
def here() -> Target:
    found = gpus()
    assert found, "nvidia-smi lists no GPU"
    gpu = found[0]
    return Target(name="here", title=gpu.name, compute_capability=gpu.capability)


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    path, _ = mlp(tmp_path / "mlp.onnx")
    plan = plan_for(path, "gpu-int8", {"up", "down"})
    return quantize(path, plan, ranges_for(path, plan, KNOWN), tmp_path / "q.onnx").path


def _options(variant: Path, **asked: object) -> BuilderOptions:
    options = BuilderOptions(**asked)  # type: ignore[arg-type]
    return replace(options, profiles=tuple(profiles_for(options, variant, SHAPES, 128)))


def test_an_engine_is_built_inspected_and_gives_the_simulations_outputs(
    variant: Path, here: Target, tmp_path: Path
) -> None:
    from engines.tensorrt.runner import TrtRunner

    made = build_engine(variant, here, _options(variant), SHAPES)
    low = {node for layer in made.layers if layer.is_low_precision for node in layer.origins}
    assert low >= {"up", "down"}
    made.write(tmp_path)
    feeds = {"x": np.random.default_rng(0).normal(size=SHAPES["x"]).astype(np.float32)}
    with TrtRunner(tmp_path / "model.plan") as engine, OnnxRuntimeRunner(variant, optimize=False) as reference:
        ours, theirs = engine.infer(feeds), reference.infer(feeds)
        with pytest.raises(EngineError, match="No optimization profile"):
            engine.infer({"x": np.zeros((4096, 32), np.float32)})
    for name, expected in theirs.items():
        assert np.corrcoef(ours[name].ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engines_are_timed_side_by_side(variant: Path, here: Target, tmp_path: Path, cuda_graph: bool) -> None:
    from engines.tensorrt.latency import GpuTiming, latencies_ms

    build_engine(variant, here, _options(variant), SHAPES).write(tmp_path / "a")
    build_engine(variant, here, _options(variant, optimization_level=0), SHAPES).write(tmp_path / "b")
    feeds = {"x": np.zeros(SHAPES["x"], np.float32)}
    plans = {name: tmp_path / name / "model.plan" for name in ("a", "b")}
    times = latencies_ms(plans, feeds, GpuTiming(warmup=2, repeats=9, cuda_graph=cuda_graph))
    assert [len(found) for found in times.values()] == [9, 9]
    assert all(time > 0 for found in times.values() for time in found)


def test_a_timing_cache_is_written_and_makes_the_engine_again(variant: Path, here: Target, tmp_path: Path) -> None:
    options = _options(variant, timing_cache=tmp_path / "timing.cache")
    first, second = (build_engine(variant, here, options, SHAPES) for _ in range(2))
    assert options.timing_cache is not None
    assert options.timing_cache.stat().st_size > 0
    assert first.manifest["timing_cache_sha256"] == second.manifest["timing_cache_sha256"]


def test_tensorrt_10_quantizes_implicitly_with_our_ranges(here: Target, tmp_path: Path) -> None:
    if release(installed(Flavour.TENSORRT) or "0.0") >= (11, 0):
        pytest.skip("TensorRT 11 has no implicit quantization")
    path, _ = mlp(tmp_path / "mlp.onnx")
    scales = {name: high / 127 for name, (_, high) in KNOWN.items()}
    asked = Implicit(precisions=frozenset({Precision.INT8, Precision.FP16}), scales=scales)
    made = build_engine(path, here, _options(path, quantization="implicit"), SHAPES, implicit=asked)
    assert made.layers.kernels > 0
