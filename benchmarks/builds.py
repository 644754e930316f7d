"""Our own side: builds as a user would run them, from Python."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.build import BuildOptions, build
from pipeline.recipe import merge, parse

FAMILIES = {"cpu": "cpu", "gpu-int8": "a100"}
"""Variant to a target that uses it."""


def variant(
    model: Path,
    data: Path,
    folder: Path,
    *,
    family: str = "cpu",
    samples: int = 64,
    **settings: str,
) -> Path:
    """Return the Q/DQ model that a build makes, kept in ``folder`` under a name of its own.

    Args:
        model: FP32 ``.onnx``.
        data: Calibration ``.npz``.
        folder: Where the build directories and the results are; calibration is shared by the builds of one family.
        family: ``cpu`` or ``gpu-int8``.
        samples: Calibration samples.
        settings: Recipe keys, ``calibration_method="mse"`` for ``calibration.method``.
    """
    keys = {key.replace("_", ".", 1): value for key, value in settings.items()}
    values = {
        "source": {"onnx": str(model)},
        "calibration": {"data": str(data), "samples": samples},
        "targets": [FAMILIES[family]],
    }
    directory = folder / f"{model.stem}.{family}.{samples}"
    build(parse(merge(values, keys)), directory, options=BuildOptions(until="quantize"))
    made = directory / "variants" / family / "model.onnx"
    kept = folder / ".".join([model.stem, family, str(samples), *settings.values()]) / "model.onnx"
    kept.parent.mkdir(parents=True, exist_ok=True)
    for file in made.parent.glob("model.onnx*"):
        shutil.copyfile(file, kept.parent / file.name)
    return kept


def size_bytes(model: Path) -> int:
    """Return the bytes of a model and its external data."""
    data = (model.with_name(f"{model.name}{suffix}") for suffix in ("", ".data", "_data"))
    return sum(file.stat().st_size for file in data if file.exists())
