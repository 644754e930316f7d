"""GPU targets: an engine where this machine can build one, else a check that the variant compiles."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.compile_check import CHECKABLE, available, checked_capability, compile_check
from engines.compiled_layers import CompiledLayers
from engines.roofline import estimate_ms
from engines.target import Target
from engines.tensorrt.build import build_engine, profiles_for
from engines.tensorrt.flavour import Flavour, installed
from engines.tensorrt.options import BuilderOptions
from engines.tensorrt.refusal import refused_node
from pipeline import model as models
from pipeline.errors import EngineError, MissingError, PipelineError, RecipeError
from pipeline.notices import notice
from pipeline.policy.overrides import add_override
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.quantize import quantize
from pipeline.stages.engine import Check, Engine
from pipeline.stages.run import OVERRIDES, Run
from pipeline.stages.variants import Variants
from pipeline.types import Precision, TensorInfo

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


def _build(run: Run, made: Variants, checked: Engine) -> tuple[Path, float]:
    variant, name = made.variants[checked.family], checked.target.name
    key = builder_inputs(run, made, variant, checked.target)
    plan, manifest = f"engines/{name}/model.plan", f"engines/{name}/manifest.json"

    def produce(work: Path) -> None:
        options = BuilderOptions.from_dict(key["options"])
        build_engine(variant, checked.target, options, key["shapes"], progress=run.progress).write((work / plan).parent)

    result = run.stage(f"engines/{name}", key, [plan, manifest], produce)
    return result.paths[plan], result.seconds


def builder_inputs(run: Run, made: Variants, onnx: Path, device: Target) -> dict[str, Any]:
    """Return what an engine depends on: the graph, TensorRT's version, options with profiles, usual shapes."""
    shapes = usual_shapes(run, made)
    options = BuilderOptions.from_dict(run.recipe.builder.model_dump(mode="json"))
    profiles = profiles_for(options, onnx, shapes, run.recipe.triton.max_batch_size)
    return {
        "variant": onnx,
        "tensorrt": installed(Flavour(device.runtime)),
        "options": replace(options, profiles=tuple(profiles)).to_dict(),
        "shapes": shapes,
    }


def _check(run: Run, made: Variants, family: str, device: Target) -> Engine:
    variant = made.variants[family]
    assert device.compute_capability is not None
    capability = checked_capability(device.compute_capability)
    waiting = f"the {device.title} engine is built by TensorRT on that GPU, from variants/{family}/model.onnx"
    if capability is None or not available():
        what = "pip install '.[rtx]' checks here that it compiles" if capability else "no builder here compiles for it"
        return Engine(target=device, family=family, status="skipped", reason=f"{waiting}; {what}", path=variant)
    own = capability == device.compute_capability
    try:
        found, seconds = _compiled(run, made, family, device.name, capability)
    except EngineError as error:
        notice("does-not-compile", error.what, where=f"target {device.name}")
        _remember(run, made, family, error)
        return Engine(target=device, family=family, status="failed", reason=error.what, path=variant)
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


def _compiled(run: Run, made: Variants, family: str, name: str, capability: tuple[int, int]) -> tuple[Check, float]:
    """Compile the variant, and the same model in FP16 beside it: the question is INT8 against FP16."""
    variant, plan = made.variants[family], made.plans[family]
    out, beside = f"checks/{name}/compiled.json", f"checks/{name}/compiled.fp16.json"
    compare = bool(plan.quantized())
    shapes = usual_shapes(run, made)

    def produce(work: Path) -> None:
        layers = compile_check(variant, capability, shapes)
        (work / out).write_text(layers.to_json(), encoding="utf-8")
        if compare:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                fp16 = quantize(made.canonical.path, in_fp16(plan), (), Path(folder) / "model.onnx").path
                layers = compile_check(fp16, capability, shapes)
            (work / beside).write_text(layers.to_json(), encoding="utf-8")

    key = {"variant": variant, "canonical": made.canonical.path, "capability": capability, "shapes": shapes}
    result = run.stage(f"checks/{name}", key, [out, beside] if compare else [out], produce)
    layers, fp16 = (
        CompiledLayers.from_json(result.paths[p].read_text(encoding="utf-8")) if p in result.paths else None
        for p in (out, beside)
    )
    assert layers is not None
    return Check(layers=layers, fp16=fp16, proxy_for=None), result.seconds


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
    """Return a concrete shape for every input: a real batch's where the recipe has data."""
    inputs = models.inputs(models.load(made.canonical.path))
    recipe = run.recipe
    data = run.open(recipe.calibration, made.exported, inputs) or run.open(recipe.validate_, made.exported, inputs)
    if data is not None:
        first = next(iter(data))
        return {i.name: tuple(int(d) for d in first[i.name].shape) for i in inputs}
    return {i.name: tuple(_dimension(i, axis) for axis in range(len(i.shape))) for i in inputs}


def _dimension(info: TensorInfo, axis: int) -> int:
    size = info.shape[axis]
    if isinstance(size, int):
        return size
    return UNKNOWN_BATCH if axis == 0 else UNKNOWN_DIMENSION
