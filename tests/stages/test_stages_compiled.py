"""GPU targets on a machine without one: checked by the real compiler, or built where the target runs TensorRT for RTX."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, RecipeError
from pipeline.inspection_compiled import compiled_tables
from tests.stages.builds import recipe, run


@pytest.fixture(scope="module")
def checked(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checked")
    run(recipe(inputs, targets=["cpu", "a100", "h100"]), directory)
    return directory


def test_a_gpu_target_is_checked_and_never_called_built(inputs: Path, checked: Path) -> None:
    report = run(recipe(inputs, targets=["cpu", "a100", "h100"]), checked).report
    assert report is not None
    a100, h100 = report["targets"]["a100"], report["targets"]["h100"]
    assert (a100["status"], a100["engine"], a100["bytes"]) == ("compile_checked", None, None)
    assert a100["compiled"]["compute_capability"] == "SM80"
    assert (h100["compiled"]["compute_capability"], h100["compiled"]["proxy_for"]) == ("SM89", "SM90")
    assert "a proxy for SM90" in h100["reason"]
    # Two layers of six projections, and nothing else, are quantized; each is found again in the compiled layers.
    assert (a100["compiled"]["requested"], a100["compiled"]["met"], a100["compiled"]["not_met"]) == (12, 12, [])
    assert a100["compiled"]["fp16"]["engine_bytes"] > 0
    assert report["validation"]["a100"]["mode"] == "simulated"


def test_require_built_refuses_a_check(inputs: Path, checked: Path) -> None:
    made = recipe(inputs, targets=["cpu", "a100", "h100"])
    assert run(made, checked, require_built=True).exit_code == 4


def test_the_compiled_layers_as_tables(checked: Path) -> None:
    figures, nodes, kernels = compiled_tables(checked, "a100", against=checked, verbose=True)
    rows = {row[0]: row[1:] for row in figures.rows}
    assert rows["kernels"][0] == str(len(kernels.rows))
    assert nodes.title.startswith("12 of 12")
    assert all(row[2] == "Int8 x Int8" for row in nodes.rows)
    with pytest.raises(PipelineError, match="its targets are"):
        compiled_tables(checked, "t4")


def test_what_was_compiled_without_a_report_has_no_tables_yet(checked: Path, tmp_path: Path) -> None:
    (tmp_path / "checks").mkdir()
    shutil.copytree(checked / "checks/a100", tmp_path / "checks/a100")
    with pytest.raises(PipelineError, match="does not speak of a100"):
        compiled_tables(tmp_path, "a100")


def test_an_rtx_target_gets_its_engine_here(inputs: Path, tmp_path: Path) -> None:
    result = run(recipe(inputs, targets=["rtx4090"], policy={"preset": "fp8"}), tmp_path)
    assert result.report is not None
    target = result.report["targets"]["rtx4090"]
    engine = tmp_path / target["engine"]
    assert (target["status"], target["reason"]) == ("built", None)
    assert engine.read_bytes()[:4] == b"vtrt"
    assert target["bytes"] == engine.stat().st_size
    assert target["compiled"]["met"] == 12
    assert result.report["validation"]["rtx4090"]["mode"] == "simulated"
    # Triton's TensorRT backend does not load such an engine.
    assert result.report["repository"] is None


def test_a_precision_that_the_gpu_lacks_is_refused_before_any_work(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"A100 is SM80 and has no FP8 \(needs SM89 or newer\); use int8"):
        run(recipe(inputs, targets=["a100"], policy={"preset": "fp8"}), tmp_path)
    assert not (tmp_path / "model.fp32.onnx").exists()


def test_on_the_gpu_the_engine_is_built_although_the_check_was_a_proxy(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for TensorRT on an H100, which this machine lacks: only that it is asked, and what becomes of it."""

    class Built:
        def write(self, folder: Path) -> None:
            (folder / "model.plan").write_bytes(b"engine")
            (folder / "manifest.json").write_text("{}")

    asked = []

    def build_engine(onnx, target, options, shapes, *, progress):
        asked.append((target.name, options.profiles[0]["input_ids"].max[0]))
        return Built()

    monkeypatch.setattr("pipeline.stages.checks.build_engine", build_engine)
    report = run(recipe(inputs, targets=["h100"]), tmp_path).report
    assert report is not None
    assert asked == [("h100", 32)]
    assert (report["targets"]["h100"]["status"], report["targets"]["h100"]["bytes"]) == ("built", len(b"engine"))
    assert report["targets"]["h100"]["compiled"]["proxy_for"] == "SM90"
