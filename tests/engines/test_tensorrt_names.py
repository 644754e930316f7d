"""Every TensorRT name in our code exists in 10.13 and in 11.4, except in the one module that is for 10 alone."""

from __future__ import annotations

from pathlib import Path

import pytest

import engines.tensorrt
from engines.tensorrt.options import VALUES
from tests.engines.tensorrt_names import has, names_lacking

SOURCES = sorted(Path(engines.tensorrt.__file__).parent.glob("*.py"))
FOR_10_ALONE = "implicit.py"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("version", [(10, 13), (11, 4)])
def test_every_name_exists(source: Path, version: tuple[int, int]) -> None:
    lacking = names_lacking(source.read_text(encoding="utf-8"), version)
    if source.name == FOR_10_ALONE and version >= (11, 0):
        gated = {since.api for since in VALUES.values() if since.last is not None and since.last < version}
        assert {name.split(".")[0] for name in lacking} <= gated
        assert lacking, "nothing in it needs a gate"
    else:
        assert lacking == set()


@pytest.mark.parametrize(
    ("source", "version", "lacking"),
    [
        ("config.int8_calibrator = c", (11, 4), {"int8_calibrator"}),
        ("config.set_flag(trt.BuilderFlag.FP16)", (11, 4), {"BuilderFlag.FP16"}),
        ("config.set_flag(trt.BuilderFlag.FP16)", (10, 13), set()),
        ("config.tiling_optimization_level = 1", (10, 7), {"tiling_optimization_level"}),
        ("trt.BuilderFlag.NO_SUCH", (10, 13), {"BuilderFlag.NO_SUCH"}),
        ("engine.device_memory_size", (11, 4), {"device_memory_size"}),
        ("config.progress_monitor, text.strip(), trt.Runtime(log)", (11, 4), set()),
    ],
)
def test_the_search_itself_finds_what_is_missing(source: str, version: tuple[int, int], lacking: set[str]) -> None:
    assert names_lacking(source, version) == lacking


def test_the_table_agrees_with_the_migration_guide() -> None:
    """A few of the removals that "Removed Python APIs and Replacements" (TensorRT 11 documentation) lists."""
    for name in ("BuilderFlag.INT8", "BuilderFlag.FP8", "IBuilderConfig.int8_calibrator", "BuilderFlag.FP4"):
        assert has(name, (10, 16))
        assert not has(name, (11, 0))
    for name in ("BuilderFlag.TF32", "BuilderFlag.STRIP_PLAN", "BuilderFlag.EDITABLE_TIMING_CACHE"):
        assert has(name, (11, 4))
