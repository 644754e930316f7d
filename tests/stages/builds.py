"""A two-layer BERT, data for it, recipes and what a build left behind."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.build import BuildOptions, BuildResult, build
from pipeline.recipe import Recipe, parse
from tests import zoo

TIMED = ("measurements.json", "report.json", "report.html", "costs.json")
"""Files that hold times and so differ between runs."""


def write_inputs(folder: Path, model: Path) -> Path:
    """Put the model and its data into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bert.onnx").write_bytes(model.read_bytes())
    for seed, (name, samples) in enumerate({"calibration": 24, "heldout": 16}.items()):
        rng = np.random.default_rng(seed)
        ids = rng.integers(3, zoo.VOCABULARY, (samples, 12))
        mask = (np.arange(12) < rng.integers(6, 13, (samples, 1))).astype(np.int64)
        np.savez(folder / f"{name}.npz", input_ids=ids, attention_mask=mask)
    return folder


def recipe(inputs: Path, **sections: Any) -> Recipe:
    """The usual recipe for ``inputs``; a section given here is merged into it."""
    values: dict[str, Any] = {
        "name": "tiny",
        "source": {"onnx": str(inputs / "bert.onnx")},
        "calibration": {"data": str(inputs / "calibration.npz")},
        "validate": {"data": str(inputs / "heldout.npz"), "latency": False},
        "threads": 1,
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return parse(values)


def run(made: Recipe, directory: Path, **options: Any) -> BuildResult:
    return build(made, directory, options=BuildOptions(**options))


def fresh(result: BuildResult) -> list[str]:
    """Names of the stages that ran now."""
    assert result.report is not None
    return [s["name"] for s in result.report["stages"] if s["fresh"]]


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every visible file that must be the same in every build of one recipe."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in TIMED and not path.relative_to(directory).parts[0].startswith(".")
    }
