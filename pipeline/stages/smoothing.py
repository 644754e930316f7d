"""Smoothing: a float graph for each family whose activations are easier to quantize, and its changed statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrators.channel_range import ChannelRange
from calibrators.collector import CollectOptions, Request, Statistics
from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import smoothing_for
from pipeline.quantize.smooth import apply
from pipeline.quantize.smoothing import F32, Group, by_tensor, groups, to_json
from pipeline.quantize.smoothing_search import SearchOptions, search
from pipeline.recipe import Recipe
from pipeline.sources.export import Exported
from pipeline.stages.run import STATISTICS, Run, step
from pipeline.stages.tuning_samples import TUNING_SAMPLES, first_batches
from pipeline.types import CalibrationData


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatGraph:
    """What a family is quantized from.

    Attributes:
        path: The float model: the canonical one, or with smoothing in it.
        statistics: The sketches of its tensors; ``None`` where nothing was calibrated.
        files: Where those are.
        before: The graph without smoothing, which a calibration cache names; ``None`` where this is it.
    """

    path: Path
    statistics: Statistics | None
    files: tuple[Path, ...] = ()
    before: FloatGraph | None = None


@step
def smooth(
    run: Run, exported: Exported, canonical: Prepared, plans: dict[str, PrecisionPlan], statistics: Statistics | None
) -> dict[str, FloatGraph]:
    """The float graph that each family is quantized from: smoothed where the policy asks for it and it gains."""
    plain = FloatGraph(
        path=canonical.path,
        statistics=statistics,
        files=(run.directory / STATISTICS,) if statistics is not None else (),
    )
    found = dict.fromkeys(plans, plain)
    given = run.recipe.policy.smooth is not None
    if given and run.recipe.policy.smooth != "off" and any(made.dynamic for made in plans.values()):
        notice("not-smoothed", "Nothing is smoothed where activations are dynamic.", where="policy.smooth")
    if statistics is None or not may_smooth(run.recipe):
        return found
    inputs = models.inputs(models.load(canonical.path))
    data = run.open(run.recipe.calibration, exported, inputs)
    if data is None:
        raise RecipeError(
            "Smoothing needs the calibration data again, to see what it does to the activations.",
            where="policy.smooth",
            fix="Give --calibration DATA, or set policy.smooth to off.",
        )
    mask = run.mask(inputs)
    wanted = smoothing_for(run.recipe.policy)
    for name, made in plans.items():
        smoothable = groups(models.load(canonical.path), made)
        if made.dynamic or not smoothable:
            continue
        folder = run.folder(name)
        graph, sketches, choices = (f"{folder}/{f}" for f in ("float.onnx", "float.safetensors", "smoothing.json"))

        def produce(
            work: Path,
            made: PrecisionPlan = made,
            files: tuple[str, str, str] = (graph, sketches, choices),
        ) -> dict[str, Any]:
            options = SearchOptions(
                alpha=None if wanted == "auto" else float(wanted),
                mask=mask,
                threads=run.recipe.threads,
                memory_bytes=run.recipe.calibration.memory_mb << 20,
            )
            extremes = _extremes(statistics, groups(models.load(canonical.path), made))
            feeds = first_batches(data, TUNING_SAMPLES, inputs)
            chosen = search(canonical.path, made, extremes, feeds, options, run.progress)
            model = models.load(canonical.path)
            changed = apply(model, by_tensor(chosen))
            models.save(model, work / files[0])
            _collected(run, work / files[0], changed, data, mask).save(work / files[1])
            (work / files[2]).write_text(to_json(chosen), encoding="utf-8")
            return {"smoothed": len(by_tensor(chosen)), "groups": len(chosen)}

        key = {
            "model": canonical.path,
            "plan": run.directory / folder / "precision_plan.json",
            "statistics": run.directory / STATISTICS,
            "data": data.digest(),
            "mask": mask,
            "smooth": wanted,
        }
        result = run.stage(run.part("smooth", name), key, [graph, sketches, choices], produce)
        notice(
            "smoothed",
            f"{result.facts['smoothed']} of {result.facts['groups']} activations are smoothed before they are quantized",
            where=choices,
        )
        again = Statistics.load(result.paths[sketches])
        found[name] = FloatGraph(
            path=result.paths[graph],
            statistics=_together(statistics, again),
            files=(run.directory / STATISTICS, result.paths[sketches]),
            before=plain,
        )
    return found


def may_smooth(recipe: Recipe) -> bool:
    """Whether anything can be smoothed: there is data to collect again, and nobody who knows the tensors as they were.

    Such are another tool's ranges, and a builder that quantizes by itself. Whoever asks for smoothing gets it, or an error.
    """
    if recipe.policy.smooth == "off":
        return False
    foreign = recipe.calibration.cache is not None or recipe.builder.quantization == "implicit"
    return recipe.policy.smooth is not None or (not foreign and recipe.calibration.data is not None)


def _extremes(statistics: Statistics, wanted: Sequence[Group]) -> dict[str, tuple[F32, F32]]:
    """Return the range of every channel of the tensors that it was collected of."""
    requests = {g.tensor: Request(g.tensor, "channel_range", g.axis) for g in wanted}
    collected = {t: statistics.of(r) for t, r in requests.items() if r in statistics.requests}
    return {t: (f.min, f.max) for t, f in collected.items() if isinstance(f, ChannelRange)}


def _collected(run: Run, path: Path, changed: tuple[str, ...], data: CalibrationData, mask: str | None) -> Statistics:
    """Collect again what smoothing changed, and nothing else."""
    options = CollectOptions(
        threads=run.recipe.threads,
        memory_bytes=run.recipe.calibration.memory_mb << 20,
        mask=mask,
        refuse_nonfinite=False,
    )
    return run.executor.collect(path, [Request(t) for t in changed], data, options, run.progress)


def _together(first: Statistics, again: Statistics) -> Statistics:
    """Return the statistics of a smoothed graph: the new sketches before the old ones of the same name."""
    chosen = {r: first.of(r) for r in first.requests} | {r: again.of(r) for r in again.requests}
    return Statistics(chosen, model_sha256=again.model_sha256, samples=first.samples)
