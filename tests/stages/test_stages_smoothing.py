"""Builds with smoothing: what they leave, and that they can be repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.build import build
from pipeline.recipe import parse
from tests.quantize.test_quantize_smoothing import normed, outlying


def made(folder: Path, smooth: object, *, per_layer: bool = False) -> Path:
    model = normed(folder / "m.onnx", shared=True, gemm=False)
    np.savez(folder / "data.npz", x=outlying(4096, seed=1))
    np.savez(folder / "held.npz", x=outlying(64, seed=2))
    recipe = parse(
        {
            "source": {"onnx": str(model)},
            "calibration": {"data": str(folder / "data.npz"), "method": "minmax", "samples": 4096},
            "policy": {"smooth": smooth, "rules": [{"op_type": "MatMul", "precision": "int8"}]},
            "validate": {"data": str(folder / "held.npz"), "latency": False, "per_layer": per_layer},
            "targets": ["cpu"],
        }
    )
    out = folder / f"build-{smooth}"
    build(recipe, out)
    return out


def test_a_smoothed_build_is_closer_to_fp32_and_says_what_it_did(tmp_path: Path) -> None:
    plain, smoothed = made(tmp_path, "off"), made(tmp_path, "auto")
    feeds = {"x": outlying(4096, seed=2)}
    errors = []
    with OnnxRuntimeRunner(tmp_path / "m.onnx") as reference:
        expected = reference.infer(feeds)["y"]
    for folder in (plain, smoothed):
        with OnnxRuntimeRunner(folder / "engines/cpu/model.onnx") as runner:
            errors.append(float(np.square(runner.infer(feeds)["y"] - expected).sum()))
    assert errors[1] < errors[0]
    assert not (plain / "variants/cpu/smoothing.json").exists()
    choices = json.loads((smoothed / "variants/cpu/smoothing.json").read_text(encoding="utf-8"))
    assert all(0 <= c["alpha"] <= 1 and c["error"] < c["plain_error"] for c in choices if c["alpha"] is not None)
    assert any(c["alpha"] is not None for c in choices)


def test_layers_are_ranked_against_the_smoothed_float_graph(tmp_path: Path) -> None:
    """A single quantized node cannot lose more than all of them; against the unsmoothed graph's weights it would."""
    report = json.loads((made(tmp_path, "auto", per_layer=True) / "report.json").read_text(encoding="utf-8"))
    found = report["validation"]["cpu"]
    whole = found["stages"]["qdq_plain"]["y"]["sqnr_db"]
    isolated = [layer["isolated_sqnr_db"] for layer in found["layers"]]
    assert len(isolated) == 3
    assert all(value > whole - 3 for value in isolated)  # not of the same samples, so with room


def test_what_is_not_smoothed_any_more_leaves_no_smoothed_graph(tmp_path: Path) -> None:
    """`validate DIR` compares the variant with ``float.onnx`` where there is one."""
    out = made(tmp_path, "auto")
    assert (out / "variants/cpu/float.onnx").is_file()
    out.rename(tmp_path / "build-off")
    again = made(tmp_path, "off")
    assert not {"float.onnx", "float.safetensors", "smoothing.json"} & {
        p.name for p in (again / "variants/cpu").iterdir()
    }


@pytest.mark.parametrize("smooth", ["auto", 0.5])
def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path, smooth: object) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = made(tmp_path / "a", smooth), made(tmp_path / "b", smooth)
    for name in ("model.onnx", "float.onnx", "float.safetensors", "smoothing.json"):
        assert (one / "variants/cpu" / name).read_bytes() == (two / "variants/cpu" / name).read_bytes(), name


def test_a_second_run_does_nothing_again(tmp_path: Path) -> None:
    out = made(tmp_path, "auto")
    before = (out / "variants/cpu/float.onnx").stat().st_mtime_ns
    assert made(tmp_path, "auto") == out
    assert (out / "variants/cpu/float.onnx").stat().st_mtime_ns == before


def test_an_extracted_layer_is_compared_with_the_graph_that_it_was_quantized_from(tmp_path: Path) -> None:
    """The norm absorbed scales, so what the layer reads is not what the canonical graph has there."""
    from pipeline.build import extract

    out = made(tmp_path, "auto")
    assert any(c["alpha"] is not None for c in json.loads((out / "variants/cpu/smoothing.json").read_text()))
    for node in ("one", "three"):
        found = extract(out, (node,), tmp_path / f"layer-{node}")
        assert found.expected_quantized is not None
        expected, got = (np.load(f)[np.load(f).files[0]] for f in (found.expected, found.expected_quantized))
        assert 10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()) > 20, node


def test_what_nobody_speaks_of_is_smoothed_where_nobody_knows_the_tensors_as_they_were() -> None:
    from pipeline.recipe import parse as parsed
    from pipeline.stages.smoothing import may_smooth

    source = {"onnx": "m.onnx"}
    assert not may_smooth(parsed({"source": source}))
    assert may_smooth(parsed({"source": source, "calibration": {"data": "c.npz"}}))
    assert not may_smooth(parsed({"source": source, "calibration": {"data": "c.npz", "cache": "a.cache"}}))
