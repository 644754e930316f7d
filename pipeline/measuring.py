"""What only a GPU can show of a finished build: its engine, built and measured on that GPU from the build directory alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engines.target import Target
from engines.target import target as find_target
from engines.tensorrt.flavour import Flavour, require
from engines.tensorrt.gpus import gpus
from pipeline import model as models
from pipeline.build import BuildResult
from pipeline.errors import MissingError, RecipeError, StoreError
from pipeline.graph.prepare import Prepared
from pipeline.policy.plan import PrecisionPlan
from pipeline.recipe import Calibration, Recipe
from pipeline.report.manifest import read_manifest
from pipeline.report.measured import VerdictStatus
from pipeline.report.summary import HELD_OUT, summary_lines
from pipeline.sources.export import Exported
from pipeline.stages.checks import build_or_check
from pipeline.stages.gpu import gpu_of
from pipeline.stages.reporting import Outcome, update_report
from pipeline.stages.run import CANONICAL, BuildOptions, Run, stored_recipe
from pipeline.stages.smoothing import FloatGraph
from pipeline.stages.validation import judge, validate
from pipeline.stages.variants import Variants
from pipeline.types import Progress, silent

_KEPT = "Keep the whole directory of the build, hidden files too, as it was written."


def measure_build(directory: Path, *, targets: Sequence[str] = (), progress: Progress = silent) -> BuildResult:
    """Build and measure the engines of this machine's GPU, and write the build's reports again.

    Reads the build directory only: the variant, the canonical FP32 graph that it is compared with, the kept held-out samples,
    the recipe's gates. The engine, an FP16 engine of the same model and ``measurements.json`` go to ``engines/<target>``.
    A task of the recipe needs its own data and is not scored here.

    Args:
        directory: A finished build.
        targets: Which of its GPU targets; those that a GPU of this machine runs if none are given.
        progress: Told how far each long stage is.

    Raises:
        RecipeError: No build, no such target in it, or no samples were kept.
        StoreError: A file is not the one that the build's manifest lists.
        MissingError: The GPU or TensorRT is missing; says which.
        EngineError: The engine does not run.
    """
    recipe = stored_recipe(directory)
    wanted = _wanted(recipe, directory, targets)
    if not (directory / HELD_OUT).is_file():
        raise RecipeError(
            "The build directory holds no held-out samples to measure with.",
            where=str(directory / HELD_OUT),
            fix="Build again with validate.data, and validate.kept_samples above 0.",
        )
    run = Run(_here(recipe, directory, wanted), directory, BuildOptions(), progress)
    with run.running(record=False):
        made = _variants(run)
        _unchanged(run, made)
        built = tuple(
            build_or_check(run, made, family, device) for family, devices in run.families.items() for device in devices
        )
        measured = validate(run, made, built)
        verdicts = judge(run, measured)
        report = update_report(directory, made, Outcome(built, measured, verdicts, None))
    failed = [e.target.name for e in built if e.status == "failed"] + [
        name for name in verdicts if report.validation[name].verdict is VerdictStatus.FAILED
    ]
    return BuildResult(
        directory=directory,
        report=report.model_dump(mode="json"),
        exit_code=3 if failed else 0,
        summary="\n".join(summary_lines(report, directory)),
    )


def _wanted(recipe: Recipe, directory: Path, asked: Sequence[str]) -> list[Target]:
    known = {name: find_target(name) for name in recipe.targets}
    on_gpus = {name: device for name, device in known.items() if device.compute_capability is not None}
    for name in asked:
        if name not in on_gpus:
            raise RecipeError(
                f"The build has no GPU target {name}; its targets are {', '.join(known)}.",
                where=str(directory),
                fix="Name one of its GPUs, or build with that target.",
            )
    found = [device for name, device in on_gpus.items() if (name in asked if asked else gpu_of(device) is not None)]
    here = ", ".join(f"{g.name} ({g.sm})" for g in gpus()) or "none"
    lacking = [device for device in found if gpu_of(device) is None]
    if lacking or not found:
        needed = ", ".join(f"{d.title} ({d.sm})" for d in lacking or on_gpus.values()) or "a GPU among its targets"
        raise MissingError(
            f"Measuring needs {needed}; the GPUs of this machine: {here}.",
            where=str(directory),
            fix=f"Copy the directory to that machine and run `python -m pipeline validate {directory}` there.",
        )
    for device in found:
        require(Flavour(device.runtime), f"Measuring on {device.title}")
    return found


def _here(recipe: Recipe, directory: Path, wanted: Sequence[Target]) -> Recipe:
    """Return the recipe as far as this machine can follow it: these targets, the kept samples, no task or prompts, no cluster."""
    section = recipe.validate_.model_copy(
        update={
            "data": str(directory / HELD_OUT),
            "tokenizer": None,
            "join": False,
            "preprocessing": None,
            "task": None,
            "labels": None,
            "prompts": None,
            "kept_samples": 0,
        }
    )
    targets = tuple(device.name for device in wanted)
    return recipe.model_copy(
        update={"targets": targets, "calibration": Calibration(), "validate_": section, "executor": "local"}
    )


def _variants(run: Run) -> Variants:
    canonical = run.directory / CANONICAL
    folders = {name: run.directory / "variants" / name for name in run.families}
    for folder in folders.values():
        if not (folder / "model.onnx").is_file():
            raise StoreError("The build lacks a variant.", where=str(folder / "model.onnx"), fix=_KEPT)
    plans = {
        name: PrecisionPlan.from_json((folder / "precision_plan.json").read_text(encoding="utf-8"))
        for name, folder in folders.items()
    }
    return Variants(
        exported=Exported(onnx=canonical),
        canonical=Prepared(path=canonical, changes=(), max_relative_difference=None, opset_from=0, opset_to=0),
        plans=plans,
        floats={
            name: FloatGraph(path=_first(f / "float.onnx", canonical), statistics=None) for name, f in folders.items()
        },
        ranges=dict.fromkeys(plans, ()),
        variants={name: folder / "model.onnx" for name, folder in folders.items()},
    )


def _first(smoothed: Path, canonical: Path) -> Path:
    return smoothed if smoothed.is_file() else canonical


def _unchanged(run: Run, made: Variants) -> None:
    """Refuse files that are not those of the build's manifest: a figure must belong to the model that it is told of."""
    listed = {o.path: o.sha256 for o in read_manifest(run.directory).outputs}
    folders = [f"variants/{name}/" for name in made.variants]
    for path, wanted in listed.items():
        if path == HELD_OUT or path.startswith((CANONICAL, *folders)):
            file = run.directory / path
            if not file.is_file() or models.sha256(file) != wanted:
                what = "is another than" if file.is_file() else "is missing; it is one of those that"
                raise StoreError(f"A file of the build {what} its manifest lists.", where=str(file), fix=_KEPT)
