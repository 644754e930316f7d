"""Smoothing: a float graph for each family whose activations are easier to quantize, and its changed statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibrators.channel_range import ChannelRange
from calibrators.collector import CollectOptions, Request, Statistics
from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.insertion.sites import sites
from pipeline.quantize.transforms import awq_search
from pipeline.quantize.transforms.awq_search import scaled_groups
from pipeline.quantize.transforms.groups import Group, groups
from pipeline.quantize.transforms.smooth import apply
from pipeline.quantize.transforms.smoothing import F32, Smoothing, by_tensor, to_json
from pipeline.quantize.transforms.smoothing_search import SearchOptions, search
from pipeline.recipe import Recipe
from pipeline.sources.export import Exported
from pipeline.stages.rounding_options import rounding_options
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What may change one family's float graph: smoothing of what is quantized, AWQ of what weights alone multiply."""

    smooth: bool
    awq: bool


@step
def smooth(
    run: Run, exported: Exported, canonical: Prepared, plans: dict[str, PrecisionPlan], statistics: Statistics | None
) -> dict[str, FloatGraph]:
    """The float graph that each family is quantized from: scaled where the policy asks for it and it gains."""
    plain = FloatGraph(
        path=canonical.path,
        statistics=statistics,
        files=(run.directory / STATISTICS,) if statistics is not None else (),
    )
    found = dict.fromkeys(plans, plain)
    model = models.load(canonical.path)
    for name, made in plans.items():
        wanted = _Wanted(
            smooth=statistics is not None and any(g.smooth != "off" for g in groups(model, made)),
            awq=bool(scaled_groups(model, made)),
        )
        if wanted.smooth or wanted.awq:
            found[name] = _scaled(run, exported, name, made, plain, wanted)
        else:
            run.forget("smooth", name)
        _unscaled(model, made, name)
    return found


def _scaled(
    run: Run, exported: Exported, name: str, made: PrecisionPlan, plain: FloatGraph, wanted: _Wanted
) -> FloatGraph:
    """Return one family's scaled graph."""
    inputs = models.inputs(models.load(plain.path))
    data, mask = run.open(run.recipe.calibration, exported, inputs), run.mask(inputs)
    if data is None:
        raise RecipeError(
            "Smoothing needs the calibration data again, to see what it does to the activations.",
            where="policy.smooth",
            fix="Give --calibration DATA, or set policy.smooth to off.",
        )
    folder, files = run.folder(name), ("float.onnx", "float.safetensors", "smoothing.json")
    graph, sketches, choices = outputs = [f"{folder}/{file}" for file in files]

    def produce(work: Path) -> dict[str, Any]:
        smoothed: tuple[Smoothing, ...] = ()
        if wanted.smooth:
            assert plain.statistics is not None
            extremes = _extremes(plain.statistics, groups(models.load(plain.path), made))
            feeds = first_batches(data, TUNING_SAMPLES, inputs)
            smoothed = search(plain.path, made, extremes, feeds, _search_options(run, mask), run.progress)
        scaled: tuple[Smoothing, ...] = ()
        if wanted.awq:
            scaled = awq_search.search(plain.path, made, data, rounding_options(run, mask), run.progress)
        model = models.load(plain.path)
        changed = apply(model, by_tensor([*smoothed, *scaled]))
        models.save(model, work / graph)
        _collected(run, work / graph, _observed(made, work / graph, changed), data, mask).save(work / sketches)
        (work / choices).write_text(to_json([*smoothed, *scaled]), encoding="utf-8")
        return {
            "smoothed": len(by_tensor(smoothed)),
            "groups": len(smoothed),
            "scaled": len(by_tensor(scaled)),
            "inputs": len(scaled),
        }

    key = {
        "model": plain.path,
        "plan": made.reading("smooth", *(("rounding", "block_size") if wanted.awq else ())),
        "statistics": list(plain.files),
        "data": data.digest(),
        "mask": mask,
        "smooth": wanted.smooth,
        "awq": wanted.awq,
    }
    result = run.stage(run.part("smooth", name), key, outputs, produce)
    if wanted.smooth:
        notice(
            "smoothed",
            f"{result.facts['smoothed']} of {result.facts['groups']} activations are smoothed before they are quantized",
            where=choices,
        )
    if wanted.awq:
        notice("awq", f"AWQ scales {result.facts['scaled']} of {result.facts['inputs']} inputs", where=choices)
    return FloatGraph(
        path=result.paths[graph],
        statistics=_together(plain.statistics, Statistics.load(result.paths[sketches])),
        files=(*plain.files, result.paths[sketches]),
        before=plain,
    )


def _unscaled(model: ir.Model, made: PrecisionPlan, family: str) -> None:
    """Say which weights AWQ clips, but does not scale the input of."""
    scaled = {node for group in scaled_groups(model, made) for node in group.nodes}
    left = [n.node for n in made.quantized() if n.rounding == "awq" and n.node not in scaled]
    if left:
        notice(
            "awq-not-scaled",
            f"AWQ clips the blocks of {len(left)} weights and does not scale their inputs, which nodes that it does not round read too, "
            f"such as {left[0]}'s.",
            where=family,
        )


def _search_options(run: Run, mask: str | None) -> SearchOptions:
    return SearchOptions(
        mask=mask,
        threads=run.recipe.threads,
        memory_bytes=run.recipe.calibration.memory_mb << 20,
    )


def may_smooth(recipe: Recipe) -> bool:
    """Whether what the recipe does not speak of is smoothed: there is data to collect again, and nobody who knows the tensors as they were.

    Such are another tool's ranges, and a builder that quantizes by itself. Whoever asks for smoothing gets it, or an error.
    """
    foreign = recipe.calibration.cache is not None or recipe.builder.quantization == "implicit"
    return not foreign and recipe.calibration.data is not None


def _extremes(statistics: Statistics, wanted: Sequence[Group]) -> dict[str, tuple[F32, F32]]:
    """Return the range of every channel of the tensors that it was collected of."""
    requests = {g.tensor: Request(g.tensor, "channel_range", g.axis) for g in wanted}
    collected = {t: statistics.of(r) for t, r in requests.items() if r in statistics.requests}
    return {t: (f.min, f.max) for t, f in collected.items() if isinstance(f, ChannelRange)}


def _observed(made: PrecisionPlan, graph: Path, changed: Sequence[str]) -> tuple[str, ...]:
    """Return those of the changed tensors whose statistics give the range of something quantized."""
    needed = {tensor for site in sites(models.load(graph), made) for tensor in site.observed}
    return tuple(tensor for tensor in changed if tensor in needed)


def _collected(run: Run, path: Path, changed: tuple[str, ...], data: CalibrationData, mask: str | None) -> Statistics:
    """Collect again what scaling changed, and nothing else."""
    if not changed:
        return Statistics({}, model_sha256="", samples=0)
    options = CollectOptions(
        threads=run.recipe.threads,
        memory_bytes=run.recipe.calibration.memory_mb << 20,
        mask=mask,
        refuse_nonfinite=False,
    )
    return run.executor.collect(path, [Request(t) for t in changed], data, options, run.progress)


def _together(first: Statistics | None, again: Statistics) -> Statistics | None:
    """Return the statistics of a scaled graph: the new sketches before the old ones of the same name."""
    if first is None or not again.requests:
        return first
    chosen = {r: first.of(r) for r in first.requests} | {r: again.of(r) for r in again.requests}
    return Statistics(chosen, model_sha256=again.model_sha256, samples=first.samples)
