"""The whole recipe, and how it is read: from a YAML file, from values, with keys set from text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.recipe import text
from pipeline.recipe.builder import BuilderConfig
from pipeline.recipe.data import Calibration, Source, Validation
from pipeline.recipe.policy import PolicyConfig
from pipeline.recipe.section import Section, listed
from pipeline.recipe.triton import TritonConfig


class Recipe(Section):
    """Everything that decides a build."""

    name: str = Field(default="model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the build directory and the served model."""
    source: Source
    calibration: Calibration = Calibration()
    policy: PolicyConfig = PolicyConfig()
    targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("cpu",)
    """GPUs or ``cpu``; ``python -m pipeline doctor`` lists them."""
    validate_: Validation = Field(default=Validation(), alias="validate")
    triton: TritonConfig = TritonConfig()
    builder: BuilderConfig = BuilderConfig()
    costs: Path | None = None
    """``costs.json`` from ``python -m pipeline profile``: nodes that got slower in INT8 stay in high precision."""
    threads: int = Field(default=0, ge=0)
    """Threads for ONNX Runtime; 0 is one per core."""
    executor: Literal["local", "ray"] = "local"
    """``ray`` sends calibration and the builds and checks of GPU targets to the Ray cluster of ``RAY_ADDRESS``; the bytes
    are the same (docs/scaling.md)."""
    memory_mb: int | None = Field(default=None, ge=1)
    """Memory that a model's weights may take while it runs, MiB; a larger model runs in segments (docs/how-it-works.md). Half of what is free if not given."""
    seed: int = 0
    """Seed of everything that draws at random."""

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        """Read a heading with nothing below it (``calibration:``) as the section's defaults."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values


PATHS = (
    *("source.onnx", "source.huggingface", "source.pt2", "calibration.data", "calibration.tokenizer"),
    *("validate.data", "validate.tokenizer", "validate.labels", "validate.prompts", "costs"),
    *("calibration.cache", "builder.timing_cache", "builder.plugin_libraries", "triton.labels"),
)
"""Keys whose value may be a path; a relative one in a YAML file starts at the file's folder."""


def parse(values: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Return the recipe that ``values`` describe.

    Raises:
        RecipeError: A wrong key or value; names the key and, for a wrong key, the nearest right one.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise text.explained(error, Recipe, where=where) from error


def load(path: Path) -> Recipe:
    """Return the recipe in a YAML file; relative paths in it start at the file's folder.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or holds a wrong key or value.
    """
    return parse(read(path), where=str(path))


def read(path: Path) -> dict[str, Any]:
    """Return the keys and values in a YAML file as they stand, except that paths start at the file's folder.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or names a key twice.
    """
    values = text.read_yaml(path)
    for dotted in PATHS:
        text.resolve_path(values, dotted.split("."), path.parent)
    return values


def merge(values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Return ``values`` with dotted keys set from text: ``{"calibration.samples": "64"}``.

    A key that holds text or a path is taken as it stands; any other value is read as YAML (``true``, ``[1, 8]``).

    Raises:
        RecipeError: A key is not in the recipe; names the nearest right one.
    """
    return text.merged(values, overrides, Recipe)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the whole recipe, defaults included, as JSON; ``parse(to_dict(recipe)) == recipe``."""
    return recipe.model_dump(mode="json", by_alias=True)
