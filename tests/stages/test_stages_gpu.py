"""A GPU stood in for: that engines built on it are run, timed beside FP16 and reported, not what they compute.

The stand-in's engine file holds the path of its graph, and its runner is ONNX Runtime. What a real GPU says is in
``tests/engines/test_tensorrt_gpu.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from engines.tensorrt.gpus import Gpu
from pipeline.errors import EngineError, MissingError, RecipeError, StoreError
from pipeline.measuring import measure_build
from pipeline.stages import checks, gpu
from pipeline.stages.heldout import first
from pipeline.validation import engine_on_gpu
from tests.stages.builds import recipe, run
from tests.stages.conftest import Built

A100 = Gpu(name="A stand-in", capability=(8, 0), uuid="GPU-0", driver="580.1")


class StandIn:
    """Everything of a machine with an A100 and TensorRT that the pipeline touches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[str] = []
        self.fp16_fails = False
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for module in ("engines.tensorrt.build", "pipeline.stages.gpu", "pipeline.measuring"):
            monkeypatch.setattr(f"{module}.gpus", lambda: (A100,))
        monkeypatch.setattr("pipeline.executors.executor.ready", lambda flavour: "10.13.0")
        monkeypatch.setattr(gpu, "installed", lambda flavour: "10.13.0")
        monkeypatch.setattr("pipeline.measuring.require", lambda flavour, what: "10.13.0")
        monkeypatch.setattr(checks, "build_engine", self.build)
        monkeypatch.setattr(gpu, "build_engine", self.build)
        monkeypatch.setattr(engine_on_gpu, "TrtRunner", self.runner)
        monkeypatch.setattr(engine_on_gpu, "latencies_ms", self.latencies)

    def build(self, onnx: Path, target: Any, options: Any, shapes: Any, **_: Any) -> Any:
        self.built.append(f"{target.name} {onnx.parent.name}")
        if self.fp16_fails and "variants" not in onnx.parts:
            raise EngineError("no tactic", where=str(onnx))

        class Made:
            def write(self, folder: Path) -> None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "model.plan").write_text(str(onnx))
                (folder / "manifest.json").write_text("{}")

        return Made()

    def runner(self, plan: Path, *, flavour: Any) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(Path(plan.read_text()), threads=1)

    def latencies(self, plans: Mapping[str, Path], feeds: Any, *_: Any, **__: Any) -> dict[str, tuple[float, ...]]:
        assert {value.shape[0] for value in feeds.values()} <= {1, 8}
        return {name: (1.0, 2.0, 3.0) if name == "engine" else (3.0, 4.0, 5.0) for name in plans}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Path:
    """A build directory alone, as another machine gets it: the model and the data it was made from are not there."""
    directory = tmp_path / "elsewhere"
    shutil.copytree(built.directory, directory)
    recipe_file = directory / ".stages/recipe.json"
    source = str(Path(built.recipe.source.onnx or "").parent)
    assert source in recipe_file.read_text()
    recipe_file.write_text(recipe_file.read_text().replace(source, "/not/on/this/machine"))
    return directory


def test_a_build_on_the_gpu_runs_its_engine_and_times_it_beside_fp16(
    machine: StandIn, inputs: Path, tmp_path: Path
) -> None:
    made = recipe(inputs, targets=["a100"], validate={"latency": True, "gates": {"speedup_fp16": ">= 1.5"}})
    result = run(made, tmp_path)
    assert result.report is not None
    found = result.report["validation"]["a100"]
    assert (found["mode"], found["verdict"]) == ("measured", "passed")
    assert found["device"] == "A stand-in, driver 580.1, TensorRT 10.13.0"
    assert all(metrics["sqnr_db"] > 10 for metrics in found["stages"]["engine"].values())
    row = found["latency_ms"]["b8"]
    assert (row["p50"], row["fp16"]["p50"], row["speedup_fp16"], row["fp32"], row["speedup"]) == (2, 4, 2, None, None)
    assert "batch 8: 2 ms, FP16 4 ms (2.00x)" in result.summary
    assert "FP16" in (tmp_path / "report.html").read_text()
    assert result.report["targets"]["a100"]["engine"] == "engines/a100/model.plan"
    assert len(machine.built) == 2
    assert run(made, tmp_path).report is not None
    assert len(machine.built) == 2  # nothing is built again


def test_the_build_directory_alone_is_enough_on_the_gpu(machine: StandIn, copied: Path, built: Built) -> None:
    assert f"python -m pipeline validate {built.directory} --target a100" in built.result.summary
    before = (copied / ".stages/recipe.json").read_text()
    result = measure_build(copied, targets=["a100"])
    assert (result.exit_code, len(machine.built)) == (0, 1)  # this recipe times nothing, so there is no FP16 engine
    assert result.report is not None
    assert built.result.report is not None
    found = result.report["validation"]["a100"]
    assert (found["mode"], found["samples"], found["task"]) == ("measured", 16, None)
    # ONNX Runtime stands in for the engine, so what was simulated is now measured, on the same samples.
    assert found["stages"]["qdq_plain"] == built.result.report["validation"]["a100"]["stages"]["qdq_plain"]
    assert result.report["targets"]["a100"]["status"] == "built"
    assert result.report["validation"]["cpu"] == built.result.report["validation"]["cpu"]
    assert (copied / ".stages/recipe.json").read_text() == before


def test_a_failed_fp16_engine_is_said_and_costs_only_the_comparison(
    machine: StandIn, inputs: Path, tmp_path: Path
) -> None:
    machine.fp16_fails = True
    result = run(recipe(inputs, targets=["a100"], validate={"latency": True}), tmp_path)
    assert result.report is not None
    assert result.report["validation"]["a100"]["latency_ms"]["b1"]["fp16"] is None
    assert "no-fp16-engine" in [n["code"] for n in result.report["notices"]]
    assert "latency   batch 1: 2 ms\n" in result.summary


@pytest.mark.parametrize("file", ["variants/gpu-int8/model.onnx", "validation/heldout.npz", "model.fp32.onnx"])
def test_files_of_another_model_are_refused(machine: StandIn, copied: Path, file: str) -> None:
    path = copied / file
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    with pytest.raises(StoreError, match="another than its manifest lists"):
        measure_build(copied)


def test_without_the_gpu_the_error_names_it(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"Measuring needs A100 \(SM80\); the GPUs of this machine: none"):
        measure_build(copied, targets=["a100"])
    with pytest.raises(RecipeError, match="no GPU target h100; its targets are cpu, a100"):
        measure_build(copied, targets=["h100"])
    with pytest.raises(RecipeError, match="holds no build"):
        measure_build(tmp_path)


def test_without_kept_samples_nothing_can_be_measured(machine: StandIn, inputs: Path, tmp_path: Path) -> None:
    result = run(recipe(inputs, targets=["a100"], validate={"kept_samples": 0}), tmp_path)
    assert "needs this folder only" not in result.summary
    with pytest.raises(RecipeError, match="holds no held-out samples"):
        measure_build(tmp_path)


def test_kept_samples_are_bounded_and_padded_only_where_a_mask_says_so(tmp_path: Path) -> None:
    def batches(*shapes: tuple[int, int], mask: bool) -> Any:
        for shape in shapes:
            ids = np.ones(shape, np.int64)
            yield {"input_ids": ids, "attention_mask": ids} if mask else {"x": ids}

    kept = first(batches((2, 3), (2, 5), mask=True), 3, 10**6)
    assert kept["input_ids"].shape == (3, 5)
    np.testing.assert_array_equal(kept["attention_mask"].sum(1), [3, 3, 5])
    assert first(batches((2, 3), (2, 5), mask=False), 3, 10**6)["x"].shape == (2, 3)
    assert first(batches((4, 3), mask=False), 9, 1)["x"].shape == (1, 3)
    assert first(batches((4, 3), (4, 3), mask=False), 9, 8 * 3 * 5)["x"].shape == (5, 3)
