"""From engines to measurements, and from measurements to verdicts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from calibrators.collector import CollectOptions, collect
from calibrators.data.checks import beyond_range, check_data, overlap
from pipeline import model as models
from pipeline.notices import notice
from pipeline.quantize.emulate import emulate
from pipeline.recipe import Validation
from pipeline.sources.export import Exported
from pipeline.stages.engine import Engine
from pipeline.stages.gpu import engine_on_gpu
from pipeline.stages.heldout import keep_heldout
from pipeline.stages.run import Run
from pipeline.stages.variants import Variants
from pipeline.types import CalibrationData, Range, Role, TensorInfo
from pipeline.validation.engine_on_gpu import GpuEngine
from pipeline.validation.generation import open_prompts
from pipeline.validation.latency import LatencyOptions
from pipeline.validation.layers import LayerOptions
from pipeline.validation.measurement import Measurements, Mode
from pipeline.validation.tasks import open_task
from pipeline.validation.thresholds import Verdict
from pipeline.validation.thresholds import judge as judge_measurements
from pipeline.validation.validate import ValidateOptions
from pipeline.validation.validate import validate as measure


def validate(run: Run, made: Variants, engines: tuple[Engine, ...]) -> dict[str, Measurements]:
    """What every target costs in accuracy and gains in speed, on held-out data; empty without such data."""
    inputs, section = models.inputs(models.load(made.canonical.path)), run.recipe.validate_
    data = run.open(section, made.exported, inputs)
    if data is None:
        notice("not-validated", "No held-out data was given (--validate DATA), so nothing was measured.")
        return {}
    if section.kept_samples and any(device.compute_capability for device in run.targets.values()):
        keep_heldout(run, data)
    measured: dict[str, Measurements] = {}
    found = {}
    for engine in engines:
        gpu = engine_on_gpu(run, made, engine)
        # Targets that are simulated run the same graph, so it is measured once for all of them.
        name = engine.target.name if engine.runs_here or gpu is not None else engine.family
        if name not in measured:
            measured[name] = _measured(run, made, engine, gpu, data, inputs)
        found[engine.target.name] = measured[name]
    return found


def _measured(
    run: Run,
    made: Variants,
    engine: Engine,
    gpu: GpuEngine | None,
    data: CalibrationData,
    inputs: tuple[TensorInfo, ...],
) -> Measurements:
    """Return what one engine, or one variant that stands in for several, costs and gains."""
    section, fp32 = run.recipe.validate_, made.canonical.path
    built = engine.runs_here or gpu is not None
    name = engine.target.name if built else engine.family
    out = f"engines/{name}/measurements.json" if built else f"variants/{name}/measurements.json"

    def produce(work: Path) -> None:
        _check_heldout(run, made, data, engine.family, inputs)
        nodes = tuple(n.node for n in made.plans[engine.family].quantized() if n.role is not Role.KV_CACHE)
        emulated = made.plans[engine.family].emulated and not engine.runs_here
        mode = Mode.EMULATED if emulated else Mode.SIMULATED
        options = ValidateOptions(
            mode=Mode.MEASURED if built else mode,
            engine=gpu,
            threads=run.recipe.threads,
            task=open_task(with_tokenizer(section, made.exported), inputs),
            prompts=open_prompts(with_tokenizer(section, made.exported), inputs),
            latency=LatencyOptions(batches=section.latency_batches) if section.latency else None,
            layers=LayerOptions(nodes=nodes) if section.per_layer else None,
            unquantized=made.floats[engine.family].path,
        )
        with tempfile.TemporaryDirectory(dir=work) as folder:
            own = made.floats[engine.family].path
            variant = emulate(engine.path, Path(folder) / "model.onnx", like=own) if emulated else engine.path
            found = measure(fp32, variant, data, options=options, progress=run.progress)
        (work / out).write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")

    key = {
        "fp32": fp32,
        "unquantized": made.floats[engine.family].path if section.per_layer else None,
        "engine": engine.path,
        "measured": built,
        "data": data.digest(),
        "labels": Path(section.labels) if section.labels else None,
        "prompts": Path(section.prompts) if section.prompts else None,
        "section": section.model_dump(mode="json", exclude={"gates", "kept_samples"}),
        "threads": run.recipe.threads,
        "gpu": [gpu.plan, gpu.fp16, gpu.device] if gpu is not None else None,
    }
    path = run.stage(f"validate/{name}", key, [out], produce).paths[out]
    return Measurements.from_dict(json.loads(path.read_text(encoding="utf-8")), where=str(path))


def judge(run: Run, measured: dict[str, Measurements]) -> dict[str, Verdict]:
    """Judge what was measured by the recipe's gates; runs nothing."""
    return {name: judge_measurements(found, run.recipe.validate_.gates) for name, found in measured.items()}


def _check_heldout(
    run: Run,
    made: Variants,
    data: CalibrationData,
    family: str,
    inputs: tuple[TensorInfo, ...],
) -> None:
    check_data(data, name="held-out data")
    used = run.open(run.recipe.calibration, made.exported, inputs)
    if used is None or not made.ranges[family]:
        return
    ranges, graph = made.ranges[family], made.floats[family]
    if graph.statistics is None:
        return
    overlap(used, data)
    seen = graph.statistics
    tensors = [t for t in dict.fromkeys(r.site.tensor for r in ranges) if t in seen]
    options = CollectOptions(threads=run.recipe.threads, mask=run.mask(inputs), refuse_nonfinite=False)
    wanted = [r for r in seen.requests if r.tensor in tensors and r.statistic == "sketch"]
    found = collect(graph.path, wanted, data, options)
    beyond_range(
        {t: (found[t].min, found[t].max) for t in tensors},
        {t: Range(min=seen[t].min, max=seen[t].max) for t in tensors},
    )


def with_tokenizer(section: Validation, exported: Exported) -> Validation:
    """Return the section with the source's own tokenizer where it names none."""
    if section.tokenizer is not None or exported.folder is None:
        return section
    return section.model_copy(update={"tokenizer": exported.folder})
