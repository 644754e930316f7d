from __future__ import annotations

import dataclasses

import pytest

from engines.target import TARGETS, check_precision, target, targets
from pipeline.errors import RecipeError
from pipeline.types import Precision

# NVIDIA's own list of compute capabilities (developer.nvidia.com/cuda-gpus), typed in apart from the table.
CAPABILITY = {
    "t4": "7.5",
    "a100": "8.0",
    "a30": "8.0",
    "a10": "8.6",
    "l4": "8.9",
    "l40s": "8.9",
    "rtx4090": "8.9",
    "h100": "9.0",
    "h200": "9.0",
    "b200": "10.0",
    "rtx5090": "12.0",
}


@pytest.mark.parametrize(("name", "capability"), CAPABILITY.items())
def test_compute_capability(name, capability):
    assert "{}.{}".format(*target(name).compute_capability) == capability


def test_names_are_the_whole_table():
    assert set(TARGETS) == {"cpu", *CAPABILITY} == {t.name for t in targets()}
    assert len(targets()) == len(TARGETS)


def test_fp8_only_from_sm89_on():
    has = {t.name for t in targets() if Precision.FP8 in t.precisions}
    assert has == {"l4", "l40s", "rtx4090", "h100", "h200", "b200", "rtx5090"}


def test_every_gpu_has_fp16_and_int8_and_the_cpu_int8():
    for entry in targets():
        assert {Precision.FP32, Precision.INT8} <= entry.precisions
        assert (Precision.FP16 in entry.precisions) == (entry.name != "cpu")


def test_a_missing_precision_is_refused_with_the_nearest():
    with pytest.raises(RecipeError) as error:
        check_precision(target("a100"), Precision.FP8)
    assert error.value.what == "A100 is SM80 and has no FP8 (needs SM89 or newer); use int8, or --fallback."
    with pytest.raises(RecipeError, match=r"CPU provider .* FP16 .*use fp32"):
        check_precision(target("cpu"), Precision.FP16)
    with pytest.raises(RecipeError, match=r"FP8 .*use int8"):
        check_precision(target("cpu"), Precision.FP8)
    for entry in targets():
        for precision in entry.precisions:
            check_precision(entry, precision)


@pytest.mark.parametrize("written", ["l40s", "L40S", " L40-S ", "rtx 4090"])
def test_names_are_forgiving(written):
    assert target(written).name in ("l40s", "rtx4090")


@pytest.mark.parametrize(
    ("wrong", "near"), [("l40", "l40s"), ("h10", "h100"), ("a1000", "a100"), ("rtx4091", "rtx4090")]
)
def test_unknown_name_gives_the_nearest(wrong, near):
    with pytest.raises(RecipeError, match=f"did you mean {near}") as error:
        target(wrong)
    assert "cpu" in error.value.fix


def test_runtime_of_consumer_cards_is_rtx():
    assert {t.name: t.runtime for t in targets() if t.runtime != "tensorrt"} == {
        "cpu": "onnxruntime",
        "rtx4090": "tensorrt-rtx",
        "rtx5090": "tensorrt-rtx",
    }


def test_targets_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        target("cpu").name = "gpu"
