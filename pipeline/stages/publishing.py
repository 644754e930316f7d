"""From engines to a Triton repository."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calibrators.data.preprocessing import preprocessing
from calibrators.data.spec import DataSpec
from calibrators.data.text import encoder_of
from engines.tensorrt.build import profiles_for
from engines.tensorrt.options import BuilderOptions
from pipeline import model as models
from pipeline.errors import MissingError, PublishError
from pipeline.notices import notice
from pipeline.sources.export import Exported
from pipeline.stages.checks import usual_shapes
from pipeline.stages.engine import Engine
from pipeline.stages.run import Run
from pipeline.stages.variants import Variants
from pipeline.triton.checker import check_repository
from pipeline.triton.ensemble import (
    LABELS,
    SERVING,
    ensemble_parts,
    front_of,
    preprocessing_files,
    tokenizer_files,
    write_ensemble,
)
from pipeline.triton.labels import label_text, read_labels
from pipeline.triton.repository import write_repository
from pipeline.triton.served import onnx_model
from pipeline.types import Feeds, TensorInfo
from pipeline.validation.thresholds import Verdict


def publish(run: Run, made: Variants, engines: tuple[Engine, ...], verdicts: dict[str, Verdict]) -> Path | None:
    """A Triton repository with the engine that ONNX Runtime serves, and on request the graphs that the server builds from.

    ``None`` where a verdict forbids it or there is nothing to serve.

    Raises:
        PublishError: The server would refuse the repository.
        MissingError: The package that writes it is not installed, and publishing is what was asked for.
    """
    if run.options.until == "validate":
        return None
    name = run.recipe.triton.name or run.recipe.name
    kept = _keep(run, made)
    built, later = [e for e in engines if e.runs_here], _at_load(run, made, engines)
    reason = _refusal(run, engines, verdicts) or (
        "" if built or later else "no engine that Triton serves was built on this machine"
    )
    if reason:
        notice("not-published", f"Nothing was published: {reason}.")
        # What an earlier run published must not be taken for this build.
        unbuilt = (f"{name}-{family}" for family in run.families)
        for folder in (
            name,
            *(f"{name}_{part}" for part in ("tokenizer", "pooling", "text", "preprocessing", "image")),
            *unbuilt,
        ):
            shutil.rmtree(run.directory / "triton" / folder, ignore_errors=True)
        return None
    try:
        places = [_repository(run, made.exported, built[0], name, kept)] if built else []
        places += [_unbuilt(run, made, family, f"{name}-{family}") for family in later]
        return places[0]
    except MissingError as error:
        if run.options.until == "publish":
            raise
        # Everything else is done and worth its report.
        notice("not-published", f"Nothing was published: {error.what} {error.fix}", where=error.where)
        return None


def _refusal(run: Run, engines: tuple[Engine, ...], verdicts: dict[str, Verdict]) -> str:
    """Return why the verdicts forbid publishing, empty if they do not."""
    for engine in engines:
        verdict = verdicts.get(engine.target.name)
        status = "not_measured" if verdict is None else str(verdict.status)
        if status == "failed" or (run.options.require_verdict and status != "passed"):
            return f"the verdict on {engine.target.name} is {status}"
    return ""


def _repository(run: Run, exported: Exported, engine: Engine, name: str, kept: Path | None) -> Path:
    out = f"triton/{name}"
    inputs = models.inputs(models.load(engine.path))
    row, labels = _row(run, exported, inputs), run.recipe.triton.labels
    front = front_of(kept) if kept is not None else {}
    # The ensemble's models lie beside the engine's.
    outputs = [out, *(f"triton/{name}_{part}" for part in ensemble_parts(run.recipe.triton))]

    def produce(work: Path) -> None:
        served = onnx_model(engine.path, name=name, threads=run.recipe.threads, row=row, labels=labels)
        write_repository(work / "triton", model=served, config=run.recipe.triton)
        if front:
            write_ensemble(work / "triton", served, run.recipe.triton, front)
        _check(work / "triton")

    key = _key(run, name, engine.path, row) | {"threads": run.recipe.threads, "front": front}
    return run.stage("publish", key, outputs, produce).paths[out]


def _keep(run: Run, made: Variants) -> Path | None:
    """Keep in the build directory what serving needs beside engines, so that builds of several machines can be merged anywhere.

    Returns:
        The folder; ``None`` where nothing is needed.
    """
    files, labels = _front(run, made), run.recipe.triton.labels
    if labels is not None:
        files[LABELS] = label_text(read_labels(labels))
    if not files:
        return None

    def produce(work: Path) -> None:
        for name, text in files.items():
            (work / SERVING / name).write_text(text, encoding="utf-8")

    outputs = [f"{SERVING}/{name}" for name in sorted(files)]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return run.stage("publish/kept", {"files": digest}, outputs, produce).paths[outputs[0]].parent


def _at_load(run: Run, made: Variants, engines: tuple[Engine, ...]) -> list[str]:
    """Return the variants that the server is to build engines from: those of GPUs of Triton's that have no engine."""
    if not run.recipe.triton.build_at_load:
        return []
    found = dict.fromkeys(e.family for e in engines if e.file is None and e.target.runtime == "tensorrt")
    for family in list(found):
        if made.plans[family].emulated:
            notice(
                "not-built-at-load",
                f"{family} is not published to be built at load: ONNX Runtime cannot check a graph with BF16 or FP4 here.",
                where="triton.build_at_load",
            )
            del found[family]
    return list(found)


def _unbuilt(run: Run, made: Variants, family: str, name: str) -> Path:
    """Publish a variant's Q/DQ ONNX for ONNX Runtime's TensorRT provider."""
    variant, out = made.variants[family], f"triton/{name}"
    inputs = models.inputs(models.load(variant))
    row = _row(run, made.exported, inputs)
    options = BuilderOptions.from_dict(run.recipe.builder.model_dump(mode="json"))
    shapes, labels = usual_shapes(run, made), run.recipe.triton.labels
    profiles = tuple(profiles_for(options, variant, shapes, run.recipe.triton.max_batch_size))

    def produce(work: Path) -> None:
        served = onnx_model(variant, name=name, sample=shapes, row=row, labels=labels)
        write_repository(work / "triton", model=replace(served, at_load=profiles), config=run.recipe.triton)
        _check(work / "triton")

    key = _key(run, name, variant, row) | {"profiles": [{n: asdict(s) for n, s in p.items()} for p in profiles]}
    place = run.stage(f"publish/{family}", key, [out], produce).paths[out]
    notice(
        "built-at-load",
        "The engine of this model is built by the server, on its GPU, when it loads it: it was not run or measured here.",
        where=f"triton model {name}",
    )
    return place


def _check(repository: Path) -> None:
    for problem in check_repository(repository):
        if problem.severity == "error":
            raise PublishError(problem.message, where=problem.where, fix=problem.fix)
        notice(problem.rule, problem.message, where=problem.where)


def _key(run: Run, name: str, engine: Path, row: Feeds) -> dict[str, Any]:
    labels = run.recipe.triton.labels
    return {
        "engine": engine,
        "triton": run.recipe.triton.model_dump(mode="json"),
        "labels": read_labels(labels) if labels is not None else None,
        "name": name,
        "row": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in row.items()},
        "row_shapes": {name: list(values.shape) for name, values in row.items()},
    }


def _row(run: Run, exported: Exported, inputs: tuple[TensorInfo, ...]) -> Feeds:
    """Return one sample of the held-out data, else of calibration's; empty without data."""
    data = run.open(run.recipe.validate_, exported, inputs) or run.open(run.recipe.calibration, exported, inputs)
    return _first_row(next(iter(data)), inputs) if data is not None else {}


def _first_row(batch: Feeds, inputs: tuple[TensorInfo, ...]) -> Feeds:
    """Return one sample of a batch, or all of it where the model's batch is fixed."""
    fixed = any(not info.shape or isinstance(info.shape[0], int) for info in inputs)
    return batch if fixed else {name: values[:1] for name, values in batch.items()}


def _front(run: Run, made: Variants) -> dict[str, str]:
    """Return the files of what an ensemble has in front of the model: calibration's tokenizer or preprocessing."""
    kind, section = run.recipe.triton.ensemble, run.recipe.calibration
    if kind == "none":
        return {}
    inputs = models.inputs(models.load(made.canonical.path))
    if kind == "image":
        folder = section.tokenizer or made.exported.folder
        return preprocessing_files(preprocessing(section.preprocessing, folder, "triton.ensemble"), inputs)
    tokenizer = section.tokenizer if section.tokenizer is not None else made.exported.folder
    if tokenizer is None:
        raise PublishError(
            "An ensemble of texts needs a tokenizer.",
            where="triton.ensemble",
            fix="Set calibration.tokenizer to the model's folder or tokenizer.json.",
        )
    spec = DataSpec(data="triton.ensemble", tokenizer=Path(tokenizer), max_length=section.max_length)
    return tokenizer_files(encoder_of(spec, inputs))
