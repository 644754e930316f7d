"""One Triton repository from what several machines built."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import PublishError
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.emulate import emulate
from pipeline.recipe import TritonConfig
from pipeline.report.summary import HELD_OUT
from pipeline.triton.checker import check_repository
from pipeline.triton.ensemble import LABELS, SERVING, front_of, write_ensemble
from pipeline.triton.gather import BuiltEngine, Gathered, by_capability, gather, largest_batch, plan_of, usual_shapes
from pipeline.triton.repository import republish, write_repository
from pipeline.triton.served import ServedModel, onnx_model
from pipeline.types import Feeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was published.

    Attributes:
        repository: Its folder; ``None`` if a verdict forbids it.
        exit_code: 0; 3 if a verdict forbids publishing.
        summary: What happened, for people.
    """

    repository: Path | None
    exit_code: int
    summary: str


def publish_builds(
    directories: Sequence[Path],
    out: Path,
    *,
    chosen: Sequence[str] = (),
    split: bool = False,
    require_verdict: bool = False,
) -> Published:
    """Write one repository with the engines of all build directories.

    TensorRT engines become one model that picks its engine by compute capability; ONNX Runtime's engine becomes a model
    of its own, ``<name>-cpu`` where there are both; with ``triton.build_at_load`` the graphs of GPUs without an engine are there too.

    Args:
        directories: Finished builds of one model and recipe, each with its own targets.
        out: The repository.
        chosen: Targets to take where several have one compute capability.
        split: Write a model for each target (``<name>-a100``) instead.
        require_verdict: A verdict that is not ``passed`` forbids publishing.

    Raises:
        PublishError: The builds or engines do not belong together, or the server would refuse the repository.
        MissingError: ``tritonclient`` is not installed.
    """
    found = gather(directories)
    judged = {engine.target.name: engine.verdict for engine in found.engines}
    if found.recipe.triton.build_at_load:
        judged |= {name: verdict for verdicts in found.unbuilt.values() for name, verdict in verdicts.items()}
    forbidden = {n: v for n, v in judged.items() if v == "failed" or (require_verdict and v != "passed")}
    if forbidden:
        why = ", ".join(f"{name} {verdict}" for name, verdict in forbidden.items())
        return Published(repository=None, exit_code=3, summary=f"nothing was published: the verdict on {why}")
    lines = _written(found, out, chosen, split=split)
    if not lines:
        raise PublishError(
            "None of these builds holds an engine that Triton serves.",
            where=", ".join(map(str, directories)),
            fix="Build a target on its GPU (`python -m pipeline build --target a100`), or the target cpu.",
        )
    for problem in check_repository(out):
        if problem.severity == "error":
            raise PublishError(problem.message, where=problem.where, fix=problem.fix)
        notice(problem.rule, problem.message, where=problem.where)
    summary = "\n".join([f"published to {out}:", *(f"  {line}" for line in lines)])
    return Published(repository=out, exit_code=0, summary=summary)


def _written(found: Gathered, out: Path, chosen: Sequence[str], *, split: bool) -> list[str]:
    """Write every model, and the ensembles around them; return what to say of each."""
    lines = []
    asked = found.recipe.triton.ensemble != "none"
    front = next(filter(None, (front_of(folder / SERVING) for folder in found.folders)), {}) if asked else {}
    for model, config in _models(found, chosen, split=split):
        folder = write_repository(out, model=model, config=config)
        served = ", ".join(f"{c}: {plan.target}" for c, plan in sorted(model.engines.items())) or "cpu"
        lines.append(f"{folder.name} ({model.backend}; {served})")
        if front:
            lines.append(f"{write_ensemble(out, model, config, front)[-1]} (ensemble)")
    if asked and not front:
        notice(
            "no-ensemble",
            f"No build kept its tokenizer or preprocessing (the folder {SERVING}), so the ensemble is left out. Build one again.",
            where="triton.ensemble",
        )
    return [*lines, *(_at_load(found, out) if found.recipe.triton.build_at_load else [])]


def _at_load(found: Gathered, out: Path) -> list[str]:
    """Publish the graphs that the server builds engines from, as each build published them; return what to say."""
    name, lines = found.recipe.triton.name or found.recipe.name, []
    for variant, targets in found.unbuilt.items():
        places = [place for folder in found.folders if (place := folder / f"triton/{name}-{variant}").is_dir()]
        if places:
            lines.append(f"{republish(places[0], out).name} (onnxruntime; builds at load for {', '.join(targets)})")
            continue
        notice(
            "no-build-at-load",
            f"No build published the graph {variant} for {', '.join(targets)} to be built at load: its report says why.",
            where="triton.build_at_load",
        )
    return lines


def _models(found: Gathered, chosen: Sequence[str], *, split: bool) -> Iterator[tuple[ServedModel, TritonConfig]]:
    recipe = found.recipe
    name = recipe.triton.name or recipe.name
    plans = [e for e in found.engines if e.target.runtime == "tensorrt"]
    others = [e for e in found.engines if e.target.runtime == "onnxruntime"]
    row, labels = _held_out(found.folders), _labels(found)
    _one_version(plans)
    if split:
        parts = [(f"{name}-{e.target.name}", {e.capability: e}) for e in plans]
    else:
        # One model has one graph: engines of another variant (FP8 beside INT8) have the same inputs and outputs.
        parts = [(name, by_capability(plans, chosen=chosen))] if plans else []
    for title, engines in parts:
        yield _tensorrt_model(title, engines, row, labels=labels), _batching(recipe.triton, list(engines.values()))
    for engine in others:
        title = f"{name}-{engine.target.name}" if plans or split else name
        yield onnx_model(engine.file, name=title, threads=recipe.threads, row=row, labels=labels), recipe.triton


def _one_version(plans: Sequence[BuiltEngine]) -> None:
    versions = {e.target.name: str(e.manifest.get("version")) for e in plans}
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise PublishError(
            f"The engines were built by different versions of TensorRT, and a server has one: {listed}.",
            where="manifest.json: version",
            fix="Build them with the TensorRT of the Triton release that will serve them.",
        )


def _labels(found: Gathered) -> Path | None:
    """Return the label file that a build kept, or the recipe's; ``None`` without labels."""
    if found.recipe.triton.labels is None:
        return None
    kept = (folder / SERVING / LABELS for folder in found.folders)
    return next((path for path in kept if path.is_file()), found.recipe.triton.labels)


def _held_out(folders: Sequence[Path]) -> Feeds:
    """Return the first of the samples that a build kept for the GPU's machine; empty where none did."""
    for folder in folders:
        if (folder / HELD_OUT).is_file():
            with np.load(folder / HELD_OUT, allow_pickle=False) as kept:
                return {name: kept[name][:1] for name in kept.files}
    return {}


def _tensorrt_model(name: str, engines: dict[str, BuiltEngine], row: Feeds, *, labels: Path | None) -> ServedModel:
    first = next(iter(engines.values()))
    with tempfile.TemporaryDirectory() as folder:
        # ONNX Runtime tells the shapes, and runs neither BF16 nor FP4.
        runs = first.onnx
        planned = PrecisionPlan.from_json(first.onnx.with_name("precision_plan.json").read_text(encoding="utf-8"))
        if planned.emulated:
            runs = emulate(first.onnx, Path(folder) / "model.onnx", like=first.onnx)
        described = onnx_model(runs, name=name, sample=usual_shapes(first), row=row, labels=labels)
    return replace(
        described, engine=first.onnx, backend="tensorrt", engines={c: plan_of(e) for c, e in engines.items()}
    )


def _batching(config: TritonConfig, engines: Sequence[BuiltEngine]) -> TritonConfig:
    for engine in engines:
        largest = largest_batch(engine)
        if largest is not None and config.max_batch_size > largest:
            raise PublishError(
                f"triton.max_batch_size is {config.max_batch_size}, but the engine for {engine.target.title} takes batches "
                f"of at most {largest}.",
                where="triton.max_batch_size",
                fix="Lower it, or build the engine with a larger profile.",
            )
    return config
