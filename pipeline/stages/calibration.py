"""From calibration data to the range of every quantized activation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from calibrators.collector import CollectOptions, Statistics, collect
from calibrators.data.checks import ModelKind, check_data
from pipeline import model as models
from pipeline.errors import DataError, RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.graph.roles import find_roles
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize import ranges as range_files
from pipeline.quantize.ranges import SiteRange, choose_ranges
from pipeline.quantize.requests import requests
from pipeline.quantize.sites import sites
from pipeline.quantize.tune import tune
from pipeline.recipe import Method
from pipeline.sources.export import Exported
from pipeline.stages.run import MASK, STATISTICS, Reached, Run, step
from pipeline.types import CalibrationData, Feeds, TensorInfo

TUNING_SAMPLES = 8


@step
def calibrate(run: Run, exported: Exported, canonical: Prepared) -> Statistics | None:
    """Statistics of every tensor that any policy could quantize; ``None`` where nothing needs them."""
    model = models.load(canonical.path)
    wanted = requests(model, find_roles(model), list(run.families))
    static = run.recipe.policy.activations == "static" and any(f.endswith(("cpu", "int8")) for f in run.families)
    data = run.open(run.recipe.calibration, exported, models.inputs(model))
    if run.options.dry_run or not wanted or (data is None and not static):
        return None
    if data is None:
        raise RecipeError(
            "Static INT8 needs calibration data, and the recipe names none.",
            where="calibration.data",
            fix="Give --calibration DATA (100-500 samples for vision and encoders, 1,000-5,000 for LLMs), "
            "or for cpu only --policy.activations dynamic.",
        )
    section = run.recipe.calibration
    mask = MASK if section.ignore_padding and any(i.name == MASK for i in models.inputs(model)) else None
    shard = run.options.shard
    options = CollectOptions(
        threads=run.recipe.threads,
        memory_bytes=section.memory_mb << 20,
        mask=mask,
        shard=shard,
        refuse_nonfinite=False,
    )
    out = STATISTICS if shard is None else f"calibration/shard-{shard[0]}-of-{shard[1]}.safetensors"

    def produce(work: Path) -> dict[str, Any]:
        check_data(data, kind=_kind(exported, models.inputs(model)))
        if run.options.merge:
            found = Statistics.merge([Statistics.load(p) for p in _shards(run.options.merge)])
        else:
            found = collect(canonical.path, wanted, data, options, run.progress)
        found.save(work / out)
        return {
            "samples": found.samples,
            "seconds": found.seconds,
            "fp32_forward_seconds": found.fp32_forward_seconds,
            "peak_rss_bytes": found.peak_rss_bytes,
        }

    inputs = {
        "model": canonical.path,
        "data": data.digest(),
        "requests": [[r.tensor, r.statistic, r.axis] for r in wanted],
        "mask": mask,
        "shard": shard,
    }
    name = "calibrate" if shard is None else f"calibrate/shard-{shard[0]}-of-{shard[1]}"
    result = run.stage(name, inputs, [out], produce)
    if shard is not None:
        raise Reached
    return Statistics.load(result.paths[out])


@step
def ranges(
    run: Run,
    exported: Exported,
    canonical: Prepared,
    plans: dict[str, PrecisionPlan],
    statistics: Statistics | None,
) -> dict[str, tuple[SiteRange, ...]]:
    """The range of every activation that a plan quantizes."""
    section = run.recipe.calibration
    found: dict[str, tuple[SiteRange, ...]] = {}
    for name, made in plans.items():
        if made.dynamic or not made.quantized() or statistics is None:
            found[name] = ()
            continue
        out = f"variants/{name}/ranges.json"

        def produce(work: Path, made: PrecisionPlan = made, out: str = out) -> None:
            assert statistics is not None
            model = models.load(canonical.path)
            places = sites(model, made)
            chosen = choose_ranges(model, places, statistics, section.method, percentile=section.percentile)
            if section.method is Method.AUTO:
                data = run.open(section, exported, models.inputs(model))
                feeds = _first(data, TUNING_SAMPLES)
                mask = MASK if section.ignore_padding else None
                chosen = tune(
                    canonical.path, made, chosen, feeds,
                    mask=mask, threads=run.recipe.threads, progress=run.progress,
                )  # fmt: skip
            (work / out).write_text(range_files.to_json(chosen), encoding="utf-8")

        inputs = {
            "model": canonical.path,
            "plan": run.directory / f"variants/{name}/precision_plan.json",
            "statistics": run.directory / STATISTICS,
            "method": section.method,
            "percentile": section.percentile,
        }
        result = run.stage(f"ranges/{name}", inputs, [out], produce)
        found[name] = range_files.from_json(result.paths[out].read_text(encoding="utf-8"))
    return found


def _kind(exported: Exported, inputs: tuple[TensorInfo, ...]) -> ModelKind:
    if exported.task == "causal-lm":
        return ModelKind.LLM
    return ModelKind.VISION if any(len(i.shape) == 4 for i in inputs) else ModelKind.ENCODER


def _first(data: CalibrationData | None, samples: int) -> list[Feeds]:
    """Return the first batches that hold ``samples`` samples, the last one cut."""
    feeds: list[Feeds] = []
    left = samples
    for batch in data if data is not None else ():
        size = len(next(iter(batch.values())))
        feeds.append({k: v[:left] for k, v in batch.items()} if size > left else batch)
        left -= size
        if left <= 0:
            break
    return feeds


def _shards(places: tuple[Path, ...]) -> list[Path]:
    files = sorted(
        itertools.chain.from_iterable(
            [p] if p.is_file() else sorted(p.glob("calibration/shard-*-of-*.safetensors")) for p in places
        )
    )
    numbers = [f.stem.removeprefix("shard-").partition("-of-")[::2] for f in files]
    totals = {n for _, n in numbers}
    if len(totals) != 1 or sorted(int(i) for i, _ in numbers) != list(range(int(next(iter(totals))))):
        raise DataError(
            f"The shards are not complete: found {', '.join(f.name for f in files) or 'none'}.",
            where="--merge",
            fix="Give every build directory in which `calibrate --shard i/n` ran, each i from 0 to n-1 once.",
        )
    return files
