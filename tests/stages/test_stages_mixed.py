"""Builds that measure their layers and give some of them back to high precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.onnxruntime import OnnxRuntimeRunner
from pipeline.errors import RecipeError
from pipeline.notices import collecting
from pipeline.policy.plan import PrecisionPlan
from pipeline.stages.mixed import OVERFLOW, _Trials
from pipeline.types import Precision
from pipeline.validation.metrics import Comparison, sqnr_db
from tests import zoo
from tests.stages.builds import fresh, recipe, run, tree


def made(inputs: Path, target: str = "cpu", **mixed: float) -> Any:
    policy: dict[str, Any] = {"mixed_precision": mixed} if mixed else {}
    return recipe(inputs, policy=policy, targets=[target])


def read(directory: Path, family: str = "cpu") -> dict[str, Any]:
    text = (directory / f"variants/{family}/mixed_precision.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def plan_of(directory: Path, family: str = "cpu") -> PrecisionPlan:
    return PrecisionPlan.from_json((directory / f"variants/{family}/precision_plan.json").read_text(encoding="utf-8"))


def sqnr(directory: Path, inputs: Path) -> float:
    with np.load(inputs / "calibration.npz") as arrays:
        feeds = {name: arrays[name][:8] for name in arrays.files}
    comparison = Comparison()
    with (
        OnnxRuntimeRunner(directory / "model.fp32.onnx", threads=1, optimize=False) as fp32,
        OnnxRuntimeRunner(directory / "variants/cpu/model.onnx", threads=1, optimize=False) as quantized,
    ):
        comparison.update(fp32.infer(feeds), quantized.infer(feeds), feeds["attention_mask"])
    return sqnr_db(*comparison.worst()) or 0.0


def test_a_share_of_the_products_stays_narrow_and_the_rest_is_spent_on_accuracy(inputs: Path, tmp_path: Path) -> None:
    run(made(inputs), tmp_path / "all", until="quantize")
    with collecting() as notices:
        run(made(inputs, low_share=0.6), tmp_path / "mixed", until="quantize")
    found, plan = read(tmp_path / "mixed"), plan_of(tmp_path / "mixed")
    high = {node for unit in found["units"] if unit["high"] for node in unit["nodes"]}
    assert high
    assert 0.6 <= found["low_share_after"] < found["low_share_before"]
    precisions = plan.precisions()
    assert all(precisions[node] is Precision.FP32 for node in high)
    assert all(
        precisions[n] is Precision.INT8 for u in found["units"] if not u["high"] and u["products_share"]
        for n in u["nodes"]
    )  # fmt: skip
    assert all("mixed precision" in n.rule for n in plan if n.node in high)
    assert sqnr(tmp_path / "mixed", inputs) > sqnr(tmp_path / "all", inputs) + 0.5
    (said,) = [n.message for n in notices if n.code == "mixed-precision"]
    assert f"{len(high)} of" in said


def test_as_few_nodes_as_reach_the_accuracy(inputs: Path, tmp_path: Path) -> None:
    run(made(inputs), tmp_path / "all", until="quantize")
    wanted = sqnr(tmp_path / "all", inputs) + 3
    run(made(inputs, sqnr_db=wanted), tmp_path / "mixed", until="quantize")
    found = read(tmp_path / "mixed")
    assert found["sqnr_db_after"] >= wanted > found["sqnr_db_before"]
    assert sqnr(tmp_path / "mixed", inputs) >= wanted - 1  # smoothing was searched again for what is left
    high = [unit for unit in found["units"] if unit["high"]]
    assert 0 < len(high) < len(found["units"])


def test_projections_that_are_merged_go_together(inputs: Path, tmp_path: Path) -> None:
    run(made(inputs, "a100", low_share=0.5), tmp_path / "b", until="quantize")
    units = read(tmp_path / "b", "gpu-int8")["units"]
    assert [len(unit["nodes"]) for unit in units if len(unit["nodes"]) > 1] == [3] * zoo.LAYERS


def test_a_residual_add_is_charged_for_the_pair_that_it_shares_with_smoothed_gemms(
    inputs: Path, tmp_path: Path
) -> None:
    run(made(inputs, "a100", low_share=0.5), tmp_path / "b", until="mixed")
    plan = PrecisionPlan.from_json((tmp_path / "b/draft/gpu-int8/precision_plan.json").read_text(encoding="utf-8"))
    adds = {n.node for n in plan.quantized() if n.op_type == "Add"}
    units = {u["nodes"][0]: u for u in read(tmp_path / "b", "gpu-int8")["units"]}
    assert adds
    assert all(units[add]["noise_share"] > 0 for add in adds)


def test_accuracy_that_is_there_already_keeps_everything_narrow(inputs: Path, tmp_path: Path) -> None:
    run(made(inputs), tmp_path / "all", until="quantize")
    run(made(inputs, sqnr_db=1.0), tmp_path / "mixed", until="quantize")
    assert not any(unit["high"] for unit in read(tmp_path / "mixed")["units"])
    one, two = (
        {k: v for k, v in tree(tmp_path / d).items() if k.startswith("variants/cpu/model")} for d in ("all", "mixed")
    )
    assert one == two


def test_accuracy_out_of_reach_is_said(inputs: Path, tmp_path: Path) -> None:
    asked = recipe(inputs, policy={"mixed_precision": {"sqnr_db": 90.0, "low_share": 0.6}}, targets=["cpu", "a100"])
    with collecting() as notices:
        run(asked, tmp_path / "b", until="mixed")
    said = {n.where: n.message for n in notices if n.code == "mixed-precision-short"}
    for family in ("cpu", "gpu-int8"):
        after = read(tmp_path / "b", family)["sqnr_db_after"]
        message = said.pop(f"variants/{family}/mixed_precision.json")
        assert message == f"90 dB are not reached with a low_share of 60.0%: {after:.1f} dB is what it leaves room for."
    assert not said


def test_a_share_that_the_plan_does_not_have_is_said(inputs: Path, tmp_path: Path) -> None:
    with collecting() as notices:
        run(made(inputs, sqnr_db=90.0, low_share=0.99), tmp_path / "b", until="mixed")
    assert not any(unit["high"] for unit in read(tmp_path / "b")["units"])
    codes = [n.code for n in notices]
    assert codes.count("mixed-precision-share") == 1
    assert "mixed-precision-short" not in codes


def test_a_variant_without_quantized_nodes_has_nothing_to_choose(inputs: Path, tmp_path: Path) -> None:
    asked = recipe(inputs, policy={"preset": "fp16", "mixed_precision": {"low_share": 0.6}}, targets=["a100"])
    with collecting() as notices:
        run(asked, tmp_path / "b", until="mixed")
    assert [n.code for n in notices].count("mixed-precision-unused") == 1
    assert not (tmp_path / "b/variants/gpu-fp16/mixed_precision.json").exists()


def test_nothing_of_it_stays_when_it_is_no_longer_asked_for(inputs: Path, tmp_path: Path) -> None:
    run(made(inputs), tmp_path / "plain", until="quantize")
    run(made(inputs, low_share=0.6), tmp_path / "b", until="quantize")
    run(made(inputs), tmp_path / "b", dry_run=True)
    assert read(tmp_path / "b")
    run(made(inputs), tmp_path / "b", until="quantize")
    assert not (tmp_path / "b/draft").exists()
    one, two = ({k: v for k, v in tree(tmp_path / d).items() if k.startswith("variants/")} for d in ("plain", "b"))
    assert one == two


def test_padding_is_no_noise() -> None:
    class Live:
        def infer(self, feeds: Any, on: Any) -> dict[str, Any]:
            values = np.ones((1, 2, 3), np.float32)
            for node in on:
                values[:, int(node)] += np.float32(0.1)
            return {"y": values}

    feeds = [{"attention_mask": np.array([[1, 0]])}]
    trials = _Trials(Live(), feeds, [{"y": np.ones((1, 2, 3), np.float32)}])  # type: ignore[arg-type]
    assert trials.noise(["0"]) == trials.noise(["0", "1"]) == pytest.approx(0.01, rel=1e-4)
    assert trials.noise(["1"]) == 0


def test_a_variant_with_bf16_is_measured_in_emulation_as_one_with_fp16_is(inputs: Path, tmp_path: Path) -> None:
    """Residual adds among it, whose pair the emulation's casts follow."""
    found = {}
    for half in ("fp16", "bf16"):
        asked = recipe(inputs, policy={"half": half, "mixed_precision": {"low_share": 0.6}}, targets=["a100"])
        run(asked, tmp_path / half, until="mixed")
        found[half] = {"all": read(tmp_path / half, "gpu-int8")["sqnr_db_before"]}
        found[half] |= {u["nodes"][0]: u["sqnr_db_alone"] for u in read(tmp_path / half, "gpu-int8")["units"]}
    assert found["bf16"] == pytest.approx(found["fp16"], abs=1.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_makes_nan_or_infinity_counts_as_more_noise_than_anything(bad: float) -> None:
    class Live:
        def infer(self, feeds: Any, on: Any) -> dict[str, Any]:
            values = np.ones((2, 3), np.float32)
            if "overflows" in on:
                values[:] = bad
            return {"y": values + np.float32(0.1) * ("rounds" in on)}

    feeds = [{"x": np.zeros((2, 1), np.float32)}]
    trials = _Trials(Live(), feeds, [{"y": np.ones((2, 3), np.float32)}])  # type: ignore[arg-type]
    assert trials.noise([]) == 0
    assert trials.noise(["rounds"]) == pytest.approx(0.01, rel=1e-4)
    assert trials.noise(["overflows"]) == trials.noise(["overflows", "rounds"]) == OVERFLOW
    assert sqnr_db(1.0, OVERFLOW) == pytest.approx(-300.0)


def test_a_second_build_measures_nothing_again(inputs: Path, tmp_path: Path) -> None:
    asked = made(inputs, low_share=0.6)
    first = run(asked, tmp_path / "b")
    assert "mixed/cpu" in fresh(first)
    assert "quantize/draft/cpu" in fresh(first)
    before = tree(tmp_path / "b")
    assert fresh(run(asked, tmp_path / "b")) == []
    assert tree(tmp_path / "b") == before


def test_another_bound_in_the_same_directory_is_chosen_for_anew_from_the_same_draft(
    inputs: Path, tmp_path: Path
) -> None:
    run(made(inputs, low_share=0.6), tmp_path / "b", until="mixed")
    drafted = tree(tmp_path / "b/draft")
    first = read(tmp_path / "b")["low_share_after"]
    run(made(inputs, low_share=0.8), tmp_path / "b", until="mixed")
    assert 0.6 <= first < 0.8 <= read(tmp_path / "b")["low_share_after"]
    assert tree(tmp_path / "b/draft") == drafted


def test_it_needs_data_and_says_so_before_it_drafts(inputs: Path, tmp_path: Path) -> None:
    asked = recipe(
        inputs, calibration={"data": None}, policy={"activations": "dynamic", "mixed_precision": {"low_share": 0.5}}
    )
    with pytest.raises(RecipeError, match="chosen on calibration data"):
        run(asked, tmp_path / "b")
    assert not (tmp_path / "b/draft").exists()


def test_a_dry_run_says_that_it_chose_nothing(inputs: Path, tmp_path: Path) -> None:
    with collecting() as notices:
        run(made(inputs, low_share=0.6), tmp_path / "b", dry_run=True)
    assert [n.code for n in notices].count("mixed-not-chosen") == 1
    assert not (tmp_path / "b/draft").exists()


def test_one_bound_at_least(inputs: Path) -> None:
    with pytest.raises(RecipeError, match="low_share"):
        made(inputs, samples=4)
