"""GPU targets: an engine where this machine can build one, else a check that the variant compiles."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.compile_check import CHECKABLE, checked_capability, compile_check
from engines.compiled_layers import CompiledLayers
from engines.roofline import estimate_ms
from engines.target import Target
from engines.tensorrt.build import EngineBuild, build_engine, profiles_for
from engines.tensorrt.flavour import Flavour
from engines.tensorrt.options import BuilderOptions
from engines.tensorrt.refusal import refused_node
from pipeline import kv_cache
from pipeline import model as models
from pipeline.errors import EngineError, MissingError, PipelineError, RecipeError
from pipeline.executors.executor import Task
from pipeline.notices import notice
from pipeline.policy.overrides import add_override
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.quantize import quantize
from pipeline.stages.engine import Check, Engine
from pipeline.stages.run import OVERRIDES, Job, Run
from pipeline.stages.variants import Variants
from pipeline.types import Precision, Progress, TensorInfo

UNKNOWN_BATCH = 8
UNKNOWN_DIMENSION = 128


def build_or_check(run: Run, made: Variants, family: str, device: Target) -> Engine:
    """Return the target's engine: TensorRT's on such a GPU, TensorRT for RTX's anywhere for targets that run it.

    Where it cannot be built here, the variant is compiled for the GPU (or its nearest) with TensorRT for RTX, which
    needs no GPU; that is a check, not the engine.
    """
    checked = _check(run, made, family, device)
    if checked.status == "failed":
        return checked
    try:
        file, seconds = _build(run, made, checked)
    except MissingError:  # no such GPU, or no TensorRT: the check's reason says where the engine is built
        return checked
    except (EngineError, RecipeError) as error:
        notice("does-not-build", error.what, where=f"target {device.name}")
        _remember(run, made, family, error)
        return replace(checked, status="failed", reason=error.what)
    return replace(checked, status="built", reason=None, file=file, seconds=seconds)


def begin(run: Run, made: Variants, family: str, device: Target) -> None:
    """Start the target's check and build where they run elsewhere, beside those of other targets.

    A build that cannot start, or whose key cannot be made, says why when its turn comes.
    """
    with contextlib.suppress(EngineError, MissingError, RecipeError):
        if checked_capability(device.compute_capability or (0, 0)) and run.executor.installed(Flavour.RTX, device):
            run.begin(_check_job(run, made, family, device))
    with contextlib.suppress(EngineError, MissingError, RecipeError):
        run.begin(_build_job(run, made, family, device))


def _build(run: Run, made: Variants, checked: Engine) -> tuple[Path, float]:
    job = _build_job(run, made, checked.family, checked.target)
    result = run.finish(job)
    return result.paths[job.outputs[0]], result.seconds


def _build_job(run: Run, made: Variants, family: str, device: Target) -> Job:
    variant, folder, flavour = made.variants[family], f"engines/{device.name}", Flavour(device.runtime)
    key = builder_inputs(run, made, variant, device, run.executor.installed(flavour, device))
    return Job(
        key=key,
        outputs=[f"{folder}/model.plan", f"{folder}/manifest.json"],
        task=Task(
            name=folder,
            function=_built,
            graphs=(variant,),
            arguments=(device, BuilderOptions.from_dict(key["options"]), key["shapes"]),
            device=device,
            flavour=flavour,
        ),
        write=lambda built, work: built.write(work / folder),
    )


def _built(
    variant: Path,
    device: Target,
    options: BuilderOptions,
    shapes: dict[str, tuple[int, ...]],
    *,
    scratch: Path,
    progress: Progress,
) -> EngineBuild:
    """Build one engine, on whichever machine this runs."""
    return build_engine(variant, device, options, shapes, progress=progress)


def builder_inputs(run: Run, made: Variants, onnx: Path, device: Target, version: str | None) -> dict[str, Any]:
    """Return what an engine depends on: the graph, TensorRT's version, options with profiles, usual shapes."""
    shapes = usual_shapes(run, made)
    options = BuilderOptions.from_dict(run.recipe.builder.model_dump(mode="json"))
    profiles = profiles_for(options, onnx, shapes, run.recipe.triton.max_batch_size)
    return {
        "variant": onnx,
        "tensorrt": version,
        "options": replace(options, profiles=tuple(profiles)).to_dict(),
        "shapes": shapes,
    }


def _check(run: Run, made: Variants, family: str, device: Target) -> Engine:
    variant = made.variants[family]
    assert device.compute_capability is not None
    capability = checked_capability(device.compute_capability)
    waiting = f"the {device.title} engine is built by TensorRT on that GPU, from variants/{family}/model.onnx"
    if capability is None or run.executor.installed(Flavour.RTX, device) is None:
        what = "pip install '.[rtx]' checks here that it compiles" if capability else "no builder here compiles for it"
        return Engine(target=device, family=family, status="skipped", reason=f"{waiting}; {what}", path=variant)
    own = capability == device.compute_capability
    try:
        found, seconds = _compiled(run, made, family, device)
    except EngineError as error:
        notice("does-not-compile", error.what, where=f"target {device.name}")
        _remember(run, made, family, error)
        return Engine(target=device, family=family, status="failed", reason=error.what, path=variant)
    except MissingError as error:  # the last node that could compile was lost
        return Engine(target=device, family=family, status="skipped", reason=f"{waiting}; {error.what}", path=variant)
    _say_if_nothing_gained(found, device)
    proxy = "" if own else f", a proxy for {device.sm}"
    return Engine(
        target=device,
        family=family,
        status="compile_checked",
        reason=f"it compiles for {CHECKABLE[capability]}{proxy}; {waiting}",
        path=variant,
        seconds=seconds,
        check=replace(found, proxy_for=None if own else device.sm),
    )


def _remember(run: Run, made: Variants, family: str, error: PipelineError) -> None:
    """Say which node a builder refused and which rule gave it its precision, and keep it for the next planning."""
    named = refused_node(error) if isinstance(error, EngineError) else None
    plan = made.plans[family]
    entry = next((n for n in plan if named is not None and named in (n.node, f"{n.node}_QuantizeLinear")), None)
    if entry is None or entry.precision is plan.elsewhere:
        return
    why = " ".join(error.what.split())[:200]
    if add_override(run.directory / OVERRIDES, family, entry.node, why):
        notice(
            "node-refused",
            f"The node {entry.node} ({entry.role}) is in {entry.precision} by the rule {entry.rule!r}. "
            f"The next run plans it in {plan.elsewhere} (--retry does so at once); delete {OVERRIDES} to forget that.",
            where=f"variants/{family}",
        )


def _compiled(run: Run, made: Variants, family: str, device: Target) -> tuple[Check, float]:
    """Compile the variant, and the same model in FP16 beside it: the question is INT8 against FP16."""
    job = _check_job(run, made, family, device)
    result = run.finish(job)
    texts = [result.paths[out].read_text(encoding="utf-8") for out in job.outputs]
    layers, *beside = map(CompiledLayers.from_json, texts)
    return Check(layers=layers, fp16=beside[0] if beside else None, proxy_for=None), result.seconds


def _check_job(run: Run, made: Variants, family: str, device: Target) -> Job:
    variant, canonical, plan = made.variants[family], made.canonical.path, made.plans[family]
    capability, shapes = checked_capability(device.compute_capability or (0, 0)), usual_shapes(run, made)
    compare = bool(plan.quantized())
    outputs = [f"checks/{device.name}/compiled.json", f"checks/{device.name}/compiled.fp16.json"][: 1 + compare]

    def write(compiled: list[CompiledLayers], work: Path) -> None:
        for out, layers in zip(outputs, compiled, strict=True):
            (work / out).write_text(layers.to_json(), encoding="utf-8")

    return Job(
        key={"variant": variant, "canonical": canonical, "capability": capability, "shapes": shapes},
        outputs=outputs,
        task=Task(
            name=f"checks/{device.name}",
            function=_checked if compare else _checked_alone,
            graphs=(variant, canonical) if compare else (variant,),
            arguments=(in_fp16(plan), capability, shapes) if compare else (capability, shapes),
            device=device,
            flavour=Flavour.RTX,
        ),
        write=write,
    )


def _checked(
    variant: Path,
    canonical: Path,
    fp16: PrecisionPlan,
    capability: tuple[int, int],
    shapes: dict[str, tuple[int, ...]],
    *,
    scratch: Path,
    progress: Progress,
) -> list[CompiledLayers]:
    """Compile the variant and the canonical graph in FP16, on whichever machine this runs."""
    found = _checked_alone(variant, capability, shapes, scratch=scratch, progress=progress)
    beside = quantize(canonical, fp16, (), scratch / "model.onnx").path
    return [*found, *_checked_alone(beside, capability, shapes, scratch=scratch, progress=progress)]


def _checked_alone(
    variant: Path,
    capability: tuple[int, int],
    shapes: dict[str, tuple[int, ...]],
    *,
    scratch: Path,
    progress: Progress,
) -> list[CompiledLayers]:
    """Compile the variant, on whichever machine this runs."""
    return [compile_check(variant, capability, shapes, progress=progress)]


def in_fp16(plan: PrecisionPlan) -> PrecisionPlan:
    """Return the plan with everything in FP16 that it quantizes or has in BF16; FP32 islands stay."""
    nodes = tuple(n if n.precision is Precision.FP32 else replace(n, precision=Precision.FP16) for n in plan.nodes)
    return replace(plan, family="gpu-fp16", elsewhere=Precision.FP16, formats={}, nodes=nodes)


def _say_if_nothing_gained(found: Check, device: Target) -> None:
    if found.fp16 is None:
        return
    here, fp16 = estimate_ms(found.layers, device), estimate_ms(found.fp16, device)
    if here is not None and fp16 is not None and here >= fp16:
        notice(
            "no-gain-over-fp16",
            f"By estimate the {device.title} gains nothing from this variant over FP16 ({here:.3g} against {fp16:.3g} ms "
            "at the data sheet's rates): its kernels move as many bytes. Quantize more of the network, or serve FP16.",
            where=f"target {device.name}",
        )


def usual_shapes(run: Run, made: Variants) -> dict[str, tuple[int, ...]]:
    """Return a concrete shape for every input: a real batch's where the recipe has data.

    A key-value cache, which is empty there, has as many past tokens as the batch has new ones.
    """
    inputs = models.inputs(models.load(made.canonical.path))
    recipe = run.recipe
    data = run.open(recipe.calibration, made.exported, inputs) or run.open(recipe.validate_, made.exported, inputs)
    first = next(iter(data)) if data is not None else None
    shapes = {
        i.name: tuple(int(d) for d in first[i.name].shape)
        if first is not None
        else tuple(_dimension(i, axis) for axis in range(len(i.shape)))
        for i in inputs
    }
    return _with_past(shapes) if kv_cache.has_cache(inputs) else shapes


def _with_past(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    batch, tokens = shapes["input_ids"]
    past = {n: (batch, s[1], tokens, s[3]) for n, s in shapes.items() if kv_cache.is_past(n)}
    return {**shapes, **past, "attention_mask": (batch, 2 * tokens)}


def _dimension(info: TensorInfo, axis: int) -> int:
    size = info.shape[axis]
    if isinstance(size, int):
        return size
    return UNKNOWN_BATCH if axis == 0 else UNKNOWN_DIMENSION
