"""Builder options: which TensorRT has which, and that the recipe's keys are the builder's."""

from __future__ import annotations

import typing
from dataclasses import fields
from pathlib import Path

import pytest

from engines.tensorrt import options as module
from engines.tensorrt.flavour import Flavour, installed, release
from engines.tensorrt.options import KEYS, VALUES, BuilderOptions, check_options
from pipeline.errors import RecipeError
from pipeline.recipe import BuilderConfig, parse
from tests.engines.tensorrt_names import table

VERSIONS, API = table()


@pytest.mark.parametrize(("key", "since"), [*KEYS.items(), *((f"{k}: {v}", s) for (k, v), s in VALUES.items())])
def test_every_version_range_is_what_the_bindings_have(key: str, since: module.Since) -> None:
    first, last = API[since.api]
    assert since.first == first, key
    assert (since.last or VERSIONS[-1]) == last, key


@pytest.mark.parametrize("enumeration", ["ProfilingVerbosity:Verbosity", "TilingOptimizationLevel:Tiling"])
def test_every_value_is_a_member_of_tensorrts_enumeration(enumeration: str) -> None:
    theirs, ours = enumeration.split(":")
    assert {f"{theirs}.{value.upper()}" for value in typing.get_args(getattr(module, ours))} <= API.keys()


def test_the_recipe_has_the_builders_keys_and_defaults() -> None:
    assert set(BuilderConfig.model_fields) == {f.name for f in fields(BuilderOptions)}
    assert BuilderOptions.from_dict(BuilderConfig().model_dump(mode="json")) == BuilderOptions()
    assert set(KEYS) | {"quantization", "calibrator"} == set(BuilderConfig.model_fields)


def test_a_recipes_builder_section_becomes_options() -> None:
    section = {
        "profiles": [{"x": {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}}],
        "tactic_sources": ["jit_convolutions"],
        "timing_cache": "t.cache",
        "plugin_libraries": "a.so",
    }
    recipe = parse({"source": {"onnx": "m.onnx"}, "builder": section})
    made = BuilderOptions.from_dict(recipe.builder.model_dump(mode="json"))
    assert made.profiles[0]["x"].max == (8, 4)
    assert made.tactic_sources == ("jit_convolutions",)
    assert (made.timing_cache, made.plugin_libraries) == (Path("t.cache"), (Path("a.so"),))
    assert set(made.asked()) == set(section)
    assert made.to_dict()["timing_cache"] == "t.cache"


@pytest.mark.parametrize(
    ("asked", "flavour", "version", "says"),
    [
        (
            {"tiling": "full"},
            Flavour.TENSORRT,
            "10.7.0",
            r"10\.7\.0 has no `builder\.tiling`.*TensorRT 10\.8 and newer",
        ),
        (
            {"timing_cache": Path("t")},
            Flavour.RTX,
            "1.7.1.116",
            r"TensorRT for RTX 1\.7.*timing_cache.*10\.0 and newer",
        ),
        ({"tactic_sources": ("cudnn",)}, Flavour.TENSORRT, "11.0.0.114", r"tactic_sources: cudnn.*10\.0 to 10\.16"),
        (
            {"quantization": "implicit"},
            Flavour.TENSORRT,
            "11.4.0.106",
            r"(?s)implicit.*10\.16.*fix:.*Q/DQ.*calibration\.cache",
        ),
        (
            {"hardware_compatibility": "same_compute_capability"},
            Flavour.TENSORRT,
            "10.8.0.43",
            r"same_compute_capability.*10\.9 and newer",
        ),
    ],
)
def test_an_option_that_the_version_lacks_is_refused_with_the_versions_that_have_it(
    asked: dict[str, typing.Any], flavour: Flavour, version: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        check_options(BuilderOptions(**asked), flavour, version)


def test_the_documentation_has_the_same_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    for name, since in [*KEYS.items(), *((f"{k}: {v}", s) for (k, v), s in VALUES.items())]:
        assert f"| `{name}` | `{since.api}` | {since} |" in page


def test_options_that_the_version_has_pass() -> None:
    check_options(BuilderOptions(tiling="full", tactic_sources=("cudnn",)), Flavour.TENSORRT, "10.13.3.9.post1")
    check_options(BuilderOptions(quantization="implicit", calibrator="minmax"), Flavour.TENSORRT, "10.0.1")
    check_options(BuilderOptions(max_aux_streams=0, tiling="none"), Flavour.RTX, "1.7.1.116")


def test_type_stubs_alone_are_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed(Flavour.TENSORRT) is None
    assert release("10.13.3.9.post1") == (10, 13)
