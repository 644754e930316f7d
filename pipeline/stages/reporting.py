"""From everything a build did to ``report.json``, ``report.html`` and ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engines.compiled_layers import CompiledLayer
from engines.roofline import estimate_ms
from pipeline import model as models
from pipeline.policy.actual import actual_precisions
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.ranges.choose import SiteRange, sketch_of
from pipeline.report import contract
from pipeline.report.html import write_html
from pipeline.report.manifest import MANIFEST, make_manifest, output_files, write_manifest
from pipeline.report.measured import Validation, nothing_measured
from pipeline.report.versions import versions
from pipeline.stages.engine import Engine
from pipeline.stages.run import Run
from pipeline.stages.smoothing import FloatGraph
from pipeline.stages.variants import Variants
from pipeline.validation.measurement import Measurements
from pipeline.validation.thresholds import Verdict

HISTOGRAM_BINS = 48


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the second half of a build came to."""

    engines: tuple[Engine, ...]
    measured: Mapping[str, Measurements]
    verdicts: Mapping[str, Verdict]
    repository: Path | None


def write_reports(run: Run, made: Variants, outcome: Outcome) -> contract.Report:
    """Write manifest and reports into the build directory and return the report."""
    directory = run.directory
    for engine in outcome.engines:
        if engine.runs_here:
            _write_engine_manifest(run, engine)
    manifest = make_manifest(
        directory,
        recipe=run.recipe,
        inputs=_inputs(run, made),
        outputs=_outputs(run),
        hash_file=run.store.sha256,
    )
    write_manifest(manifest, directory)
    report = contract.Report(
        name=run.recipe.name,
        versions=versions(),
        source=_source(run, made),
        calibration=_calibration(run),
        precision_plan=_nodes(made),
        ranges=_ranges(made),
        targets={e.target.name: _target(directory, e, made.plans[e.family]) for e in outcome.engines},
        validation={e.target.name: _validation(outcome, e.target.name) for e in outcome.engines},
        repository=_relative(directory, outcome.repository),
        notices=tuple(contract.Notice(**n.to_dict()) for n in run.notices),
        stages=tuple(contract.Stage(name=r.name, seconds=r.seconds, fresh=r.fresh) for r in run.results),
        manifest=MANIFEST,
    )
    contract.write_json(report, directory / "report.json")
    write_html(report, directory / "report.html")
    return report


def update_report(directory: Path, made: Variants, outcome: Outcome) -> contract.Report:
    """Write the reports of a finished build again, with what was built and measured since, and return the report."""
    path = directory / "report.json"
    report = contract.Report.from_json(path.read_text(encoding="utf-8"), where=str(path))
    targets, validation = dict(report.targets), dict(report.validation)
    for engine in outcome.engines:
        name = engine.target.name
        now = _target(directory, engine, made.plans[engine.family])
        # A check of the compiled layers may have been made on another machine.
        targets[name] = now if now.compiled else now.model_copy(update={"compiled": targets[name].compiled})
        validation[name] = _validation(outcome, name)
    report = report.model_copy(update={"targets": targets, "validation": validation})
    contract.write_json(report, path)
    write_html(report, directory / "report.html")
    return report


def _outputs(run: Run) -> list[Path]:
    """Return the files that this run made or kept; what a build with another recipe left behind is not its own."""
    places = {place for result in run.results for place in result.paths.values()}
    places |= {place.with_name(f"{place.name}.data") for place in places if place.suffix == ".onnx"}
    return [f for f in output_files(run.directory) if any(place == f or place in f.parents for place in places)]


def _inputs(run: Run, made: Variants) -> dict[str, Path]:
    recipe = run.recipe
    given: dict[str, str | Path | None] = {
        "source": recipe.source.onnx or recipe.source.pt2 or made.exported.folder,
        "calibration": recipe.calibration.data,
        "validate": recipe.validate_.data,
        "labels": recipe.validate_.labels,
        "prompts": recipe.validate_.prompts,
        "costs": recipe.costs,
        "classes": recipe.triton.labels,
    }
    return {role: Path(path) for role, path in given.items() if path is not None and Path(path).exists()}


def _write_engine_manifest(run: Run, engine: Engine) -> None:
    files = {f.name: run.store.sha256(f) for f in models.files(engine.path)}
    values = {
        "target": engine.target.name,
        "runtime": engine.target.runtime,
        "versions": {"onnxruntime": versions()["onnxruntime"]},
        "variant": engine.family,
        "canonical_sha256": run.store.sha256(run.directory / "model.fp32.onnx"),
        "files": files,
    }
    contract.write_text(engine.path.parent / MANIFEST, json.dumps(values, indent=1, sort_keys=True) + "\n")


def _source(run: Run, made: Variants) -> contract.Source:
    source = run.recipe.source
    kind: Literal["onnx", "huggingface", "module", "pt2"]
    for kind in ("onnx", "huggingface", "module", "pt2"):
        value = getattr(source, kind)
        if value is not None:
            break
    model = models.load(made.canonical.path)
    name = Path(value).name if kind in ("onnx", "pt2") or Path(str(value)).is_absolute() else str(value)
    file = source.onnx or source.pt2
    differences = (made.exported.max_relative_difference, made.canonical.max_relative_difference)
    known = [d for d in differences if d is not None]
    return contract.Source(
        kind=kind,
        name=name,
        task=made.exported.task,
        sha256=run.store.sha256(file) if file is not None else None,
        opset=made.canonical.opset_to,
        fp32_bytes=models.size_bytes(made.canonical.path),
        max_relative_difference=max(known) if known else None,
        inputs=tuple(_tensor(i) for i in models.inputs(model)),
        outputs=tuple(_tensor(o) for o in models.outputs(model)),
    )


def _tensor(info: Any) -> contract.Tensor:
    return contract.Tensor(name=info.name, dtype=str(info.dtype), shape=info.shape)


def _calibration(run: Run) -> contract.Calibration:
    facts = run.facts("calibrate")
    return contract.Calibration(
        samples=facts.get("samples"),
        seconds=facts.get("seconds"),
        fp32_forward_seconds=facts.get("fp32_forward_seconds"),
        peak_rss_bytes=facts.get("peak_rss_bytes"),
        method=str(run.recipe.calibration.method) if facts else None,
    )


def _nodes(made: Variants) -> tuple[contract.NodePrecision, ...]:
    return tuple(
        contract.NodePrecision(
            variant=name,
            node=n.node,
            op_type=n.op_type,
            role=str(n.role),
            block=n.block,
            precision=str(n.precision),
            rule=n.rule,
        )
        for name, plan in made.plans.items()
        for n in plan.nodes
    )


def _ranges(made: Variants) -> tuple[contract.TensorRange, ...]:
    found = []
    for name, ranges in made.ranges.items():
        for item in ranges:
            scale, zero_point = item.range.scale_zero_point(item.site.spec)
            found.append(
                contract.TensorRange(
                    variant=name,
                    tensor=item.site.tensor,
                    dtype=str(item.site.spec.dtype),
                    method=item.method,
                    min=item.range.min,
                    max=item.range.max,
                    scale=scale,
                    zero_point=zero_point,
                    alternatives=dict(item.errors),
                    options={name: (r.min, r.max) for name, r in item.options.items()},
                    histogram=_histogram(made.floats[name], item),
                )
            )
    return tuple(found)


def _histogram(graph: FloatGraph, item: SiteRange) -> contract.Histogram | None:
    """Return the histogram of what a range was chosen from; ``None`` where a cache gave the range."""
    if graph.statistics is None or not item.options:
        return None
    values = sketch_of(graph.statistics, item.site).distribution()
    if not values.min < values.max:
        return None
    counts, _ = np.histogram(values.mean, bins=HISTOGRAM_BINS, range=(values.min, values.max), weights=values.count)
    return contract.Histogram(min=values.min, max=values.max, counts=tuple(int(c) for c in counts))


def _target(directory: Path, engine: Engine, plan: PrecisionPlan) -> contract.Target:
    return contract.Target(
        status=contract.TargetStatus(engine.status),
        reason=engine.reason,
        variant=engine.family,
        engine=_relative(directory, engine.file),
        bytes=_bytes(engine.file),
        seconds=engine.seconds,
        compiled=_compiled(engine, plan),
    )


def _bytes(file: Path | None) -> int | None:
    if file is None:
        return None
    return models.size_bytes(file) if file.suffix == ".onnx" else file.stat().st_size


def _compiled(engine: Engine, plan: PrecisionPlan) -> contract.Compiled | None:
    if engine.check is None:
        return None
    layers, fp16 = engine.check.layers, engine.check.fp16
    actual = actual_precisions(plan, layers)
    return contract.Compiled(
        builder=layers.builder,
        compute_capability=layers.compute_capability,
        proxy_for=engine.check.proxy_for,
        kernels=layers.kernels,
        fused_attention=layers.fused_attention,
        low_precision_flops_share=layers.low_precision_flops_share,
        bytes_moved=layers.bytes_moved,
        engine_bytes=layers.engine_bytes,
        estimate_ms=estimate_ms(layers, engine.target),
        requested=len(actual),
        met=sum(a.met is True for a in actual),
        not_met=tuple(a.node for a in actual if a.met is not True),
        fp16=None
        if fp16 is None
        else contract.Fp16Twin(
            kernels=fp16.kernels,
            bytes_moved=fp16.bytes_moved,
            engine_bytes=fp16.engine_bytes,
            estimate_ms=estimate_ms(fp16, engine.target),
        ),
        layers=tuple(_kernel(layer) for layer in layers),
    )


def _kernel(layer: CompiledLayer) -> contract.Kernel:
    read = [t.dtype for t in (*layer.inputs, *layer.constants) if len(t.shape) > 1]
    written = dict.fromkeys(t.dtype for t in layer.outputs)
    return contract.Kernel(
        name=layer.name,
        kind=layer.kind,
        types=f"{' x '.join(dict.fromkeys(read)) if len(set(read)) > 1 else ' x '.join(read[:2])} -> {', '.join(written)}",
        bytes_moved=round(layer.bytes_moved),
        nodes=len(layer.origins),
    )


def _validation(outcome: Outcome, name: str) -> Validation:
    if name not in outcome.measured:
        return nothing_measured("no held-out data was given (validate.data)")
    verdict = outcome.verdicts[name].to_dict()
    return Validation.model_validate({**outcome.measured[name].to_dict(), **verdict})


def _relative(directory: Path, path: Path | None) -> str | None:
    return path.relative_to(directory).as_posix() if path is not None else None
