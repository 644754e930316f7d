"""The CI job matrix of a recipe: one job for every GPU target, on a runner that has that GPU."""

from __future__ import annotations

from typing import Any

from engines.target import target
from pipeline.recipe import Recipe


def matrix(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return ``{"include": [{target, sm, runner}]}`` as GitHub's ``strategy.matrix`` takes it.

    ``runner`` holds the labels a self-hosted runner must have: ``self-hosted``, ``gpu`` and the target's name. Targets
    whose engine any machine can build (``cpu``, and cards that run TensorRT for RTX) need no job of their own.
    """
    devices = [target(name) for name in recipe.targets]
    return {
        "include": [
            {"target": d.name, "sm": d.sm, "runner": ["self-hosted", "gpu", d.name]}
            for d in devices
            if d.runtime == "tensorrt"
        ]
    }
