"""A build writes its ranges as a TensorRT calibration cache, and takes them from one instead of data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibrators import cache_file
from pipeline.build import build
from pipeline.errors import QuantizeError
from pipeline.recipe import parse
from pipeline.stages.run import BuildOptions
from tests.quantize.graphs import mlp


def _scales(directory: Path) -> dict[str, float]:
    ranges = json.loads((directory / "variants/gpu-int8/ranges.json").read_text(encoding="utf-8"))
    return {r["site"]["tensor"]: max(-r["range"]["min"], r["range"]["max"]) / 127 for r in ranges}


def test_ranges_leave_as_a_cache_and_come_back_from_one(tmp_path: Path) -> None:
    onnx = mlp(tmp_path / "mlp.onnx")[0]
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32))
    source, rest = (
        {"onnx": str(onnx)},
        {"targets": ["a100"], "policy": {"rules": [{"op_type": "MatMul", "precision": "int8"}]}},
    )
    calibration = {"data": str(tmp_path / "data.npz"), "method": "minmax"}
    to_ranges = BuildOptions(until="ranges")

    plain = {**rest, "policy": {**rest.get("policy", {}), "smooth": "off"}}
    build(parse({"source": source, "calibration": calibration, **plain}), tmp_path / "a", options=to_ranges)
    written = cache_file.read(tmp_path / "a/calibration/minmax.cache")
    assert len(written) == 2
    assert written == pytest.approx(_scales(tmp_path / "a"))

    # Whoever reads the cache has the float model without smoothing, so it is the same with it.
    build(parse({"source": source, "calibration": calibration, **rest}), tmp_path / "smoothed", options=to_ranges)
    assert cache_file.read(tmp_path / "smoothed/calibration/minmax.cache") == written
    assert set(_scales(tmp_path / "smoothed")) != set(written)

    foreign = {"cache": str(tmp_path / "a/calibration/minmax.cache")}
    build(parse({"source": source, "calibration": foreign, **rest}), tmp_path / "b", options=to_ranges)
    assert _scales(tmp_path / "b") == pytest.approx(written)

    cache_file.write(tmp_path / "half.cache", dict(list(written.items())[:1]))
    half = parse({"source": source, "calibration": {"cache": str(tmp_path / "half.cache")}, **rest})
    with pytest.raises(QuantizeError, match="lacks 1 of the tensors"):
        build(half, tmp_path / "c", options=to_ranges)
