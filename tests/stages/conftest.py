from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.build import BuildResult
from pipeline.recipe import Recipe
from tests import zoo
from tests.stages.builds import recipe, run, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), zoo.exported("bert", "legacy"))


@dataclass(frozen=True)
class Built:
    recipe: Recipe
    directory: Path
    result: BuildResult


@pytest.fixture(scope="session")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The usual build for a CPU and a GPU target; tests copy it before they change anything."""
    made = recipe(inputs, targets=["cpu", "a100"])
    directory = tmp_path_factory.mktemp("built") / "tiny"
    return Built(made, directory, run(made, directory))
