"""From calibration data to the range of every quantized activation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibrators.collector import CollectOptions, Statistics, model_digest
from calibrators.data.checks import ModelKind, check_data
from calibrators.sketch import Sketch
from pipeline import model as models
from pipeline.errors import DataError, RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.graph.roles import find_roles
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import plan as make_plan
from pipeline.quantize.insertion.sites import Site, sites
from pipeline.quantize.ranges import choose as range_files
from pipeline.quantize.ranges.choose import SiteRange, choose_ranges
from pipeline.quantize.ranges.foreign_cache import cached_ranges
from pipeline.quantize.ranges.own_cache import write_cache
from pipeline.quantize.ranges.requests import requests
from pipeline.quantize.ranges.tune import tune
from pipeline.recipe import Calibration, Method
from pipeline.sources.export import Exported
from pipeline.stages.run import STATISTICS, Reached, Run, step
from pipeline.stages.shards import identity_file, merged, shard_file, write_identity
from pipeline.stages.smoothing import FloatGraph
from pipeline.stages.tuning_samples import TUNING_SAMPLES, first_batches
from pipeline.types import TensorInfo


@step
def calibrate(run: Run, exported: Exported, canonical: Prepared) -> Statistics | None:
    """Statistics of every tensor that any policy could quantize; ``None`` where nothing needs them."""
    model = models.load(canonical.path)
    inputs = models.inputs(model)
    wanted = requests(model, find_roles(model), run.policies)
    data = run.open(run.recipe.calibration, exported, inputs)
    unneeded = run.recipe.calibration.cache is not None or not _quantizes(run, model)
    if run.options.dry_run or not wanted or (data is None and unneeded):
        return None
    if data is None:
        raise RecipeError(
            "Static INT8 needs calibration data, and the recipe names none.",
            where="calibration.data",
            fix="Give --calibration DATA (100-500 samples for vision and encoders, 1,000-5,000 for LLMs), "
            "or for cpu only --policy.activations dynamic.",
        )
    shard, mask = run.options.shard, run.mask(inputs)
    files = [run.store.sha256(file) for file in models.files(canonical.path)]
    identity = {
        "model": files,
        "data": data.digest(),
        "mask": mask,
    }
    requested = [[r.tensor, r.statistic, r.axis] for r in wanted]
    out = STATISTICS if shard is None else shard_file(shard)

    def produce(work: Path) -> dict[str, Any]:
        check_data(data, kind=_kind(exported, inputs))
        if run.options.merge:
            found = merged(run.options.merge, identity, wanted)
        else:
            options = _options(run, mask, model_digest(files))
            found = run.executor.collect(canonical.path, wanted, data, options, run.progress)
        found.save(work / out)
        if shard is not None:
            write_identity(work / identity_file(out), identity)
        return {
            "samples": found.samples,
            "seconds": found.seconds,
            "fp32_forward_seconds": found.fp32_forward_seconds,
            "peak_rss_bytes": found.peak_rss_bytes,
        }

    # A merge gives bit for bit what one run gives, so it is not part of the key.
    name = "calibrate" if shard is None else f"calibrate/shard-{shard[0]}-of-{shard[1]}"
    outputs = [out] if shard is None else [out, identity_file(out)]
    result = run.stage(name, {**identity, "requests": requested, "shard": shard}, outputs, produce)
    if shard is not None:
        raise Reached
    return Statistics.load(result.paths[out])


@step
def ranges(
    run: Run,
    exported: Exported,
    plans: dict[str, PrecisionPlan],
    floats: dict[str, FloatGraph],
) -> dict[str, tuple[SiteRange, ...]]:
    """The range of every activation that a plan quantizes."""
    section = run.recipe.calibration
    inputs = models.inputs(models.load(next(iter(floats.values())).path))
    data = run.open(section, exported, inputs)
    found: dict[str, tuple[SiteRange, ...]] = {}
    for name, made in plans.items():
        path, statistics = floats[name].path, floats[name].statistics
        if made.dynamic or not made.quantized() or (statistics is None and section.cache is None):
            found[name] = ()
            continue
        out = f"{run.folder(name)}/ranges.json"
        # TensorRT's calibration cache holds symmetric INT8 ranges and nothing else.
        own_cache = f"calibration/{section.method}.cache" if name == "gpu-int8" and not run.drafts else None

        def produce(
            work: Path,
            made: PrecisionPlan = made,
            graph: FloatGraph = floats[name],
            out: str = out,
            own_cache: str | None = own_cache,
        ) -> None:
            model = models.load(graph.path)
            chosen = _chosen(section, sites(model, made), graph.statistics, models.inputs(model))
            if section.method is Method.AUTO and section.cache is None:
                feeds = first_batches(data, TUNING_SAMPLES, inputs)
                chosen = tune(
                    graph.path, made, chosen, feeds,
                    mask=run.mask(inputs), threads=run.recipe.threads, progress=run.progress,
                )  # fmt: skip
            (work / out).write_text(range_files.to_json(chosen), encoding="utf-8")
            if own_cache is not None:
                # Whoever reads the cache has the float model as it was, without smoothing.
                if graph.before is not None:
                    before = models.load(graph.before.path)
                    chosen = _chosen(section, sites(before, made), graph.before.statistics, models.inputs(before))
                write_cache(work / own_cache, chosen)

        read = {
            "model": path,
            "plan": made.reading(),
            "statistics": list(floats[name].files),
            "cache": section.cache,
            "method": section.method,
            "percentile": section.percentile,
            # Statistics do not depend on the samples' order, but the ones that `auto` tries out do.
            "tuned_on": data.digest() if data is not None and section.method is Method.AUTO else None,
            "mask": run.mask(inputs),
        }
        outputs = [out] if own_cache is None else [out, own_cache]
        result = run.stage(run.part("ranges", name), read, outputs, produce)
        found[name] = range_files.from_json(result.paths[out].read_text(encoding="utf-8"))
    return found


def _kind(exported: Exported, inputs: tuple[TensorInfo, ...]) -> ModelKind:
    if exported.task == "causal-lm":
        return ModelKind.LLM
    return ModelKind.VISION if any(len(i.shape) == 4 for i in inputs) else ModelKind.ENCODER


def _options(run: Run, mask: str | None, model_sha256: str) -> CollectOptions:
    # What is not finite is counted, and refused only if a plan quantizes it.
    memory_bytes = run.recipe.calibration.memory_mb << 20
    return CollectOptions(
        threads=run.recipe.threads,
        memory_bytes=memory_bytes,
        mask=mask,
        shard=run.options.shard,
        refuse_nonfinite=False,
        model_sha256=model_sha256,
    )


def _chosen(
    section: Calibration, places: tuple[Site, ...], statistics: Statistics | None, inputs: tuple[TensorInfo, ...]
) -> tuple[SiteRange, ...]:
    """Return a range for every place: from a calibration cache as far as one has it, otherwise from the statistics."""

    def choose(some: Sequence[Site]) -> tuple[SiteRange, ...]:
        assert statistics is not None
        _refuse_nonfinite_inputs(tuple(some), statistics, inputs, section.data)
        return choose_ranges(some, statistics, section.method, percentile=section.percentile)

    if section.cache is None:
        return choose(places)
    return cached_ranges(section.cache, places, choose if statistics is not None else None)


def _refuse_nonfinite_inputs(
    places: tuple[Site, ...], statistics: Statistics, inputs: tuple[TensorInfo, ...], data: str | None
) -> None:
    """Blame the data, not the model, for NaN in a model input that is to be quantized."""
    observed = {tensor for place in places for tensor in place.observed}
    for info in inputs:
        found = statistics.get(info.name) if info.name in observed else None
        if isinstance(found, Sketch) and found.nonfinite:
            raise DataError(
                f"The calibration data holds {found.nonfinite} NaN or infinite values for the input {info.name!r}.",
                where=data or "",
                fix="Take those samples out of the data, or give the values that the model is given in use.",
            )


def _quantizes(run: Run, model: ir.Model) -> bool:
    """Return whether any variant needs the range of an activation, and so calibration data."""
    roles = find_roles(model)
    plans = [make_plan(model, roles, policy, name) for name, policy in run.policies.items()]
    return any(sites(model, made) for made in plans if not made.dynamic)
