"""From variants to engines, or to compile checks where this machine has no such GPU."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engines.compile_check import CHECKABLE, available, checked_capability, compile_check
from engines.compiled_layers import CompiledLayers
from engines.target import Target
from pipeline import model as models
from pipeline.errors import EngineError
from pipeline.notices import notice
from pipeline.stages.run import Run, step
from pipeline.stages.variants import Variants
from pipeline.types import TensorInfo

UNKNOWN_BATCH = 8
UNKNOWN_DIMENSION = 128


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What became of one target.

    Attributes:
        target: The device.
        family: The variant it is made from.
        status: ``built``, ``compile_checked``, ``skipped`` or ``failed``.
        reason: Why there is no engine; ``None`` if there is one.
        path: The engine, or the variant that stands in for it in simulation.
        seconds: Time to build or check it.
        compiled: What a compile check found.
    """

    target: Target
    family: str
    status: str
    reason: str | None
    path: Path
    seconds: float | None = None
    compiled: CompiledLayers | None = None

    @property
    def built(self) -> bool:
        """Whether there is an engine."""
        return self.status == "built"


@step
def engines(run: Run, made: Variants) -> tuple[Engine, ...]:
    """An engine, a compile check, or the reason why there is neither, for every target."""
    return tuple(
        _serve_variant(run, made, name, device) if device.runtime == "onnxruntime" else _check(run, made, name, device)
        for name, devices in run.families.items()
        for device in devices
    )


def _serve_variant(run: Run, made: Variants, family: str, device: Target) -> Engine:
    """The ``cpu`` engine is the variant itself as ONNX Runtime runs it."""
    variant, out = made.variants[family], f"engines/{device.name}/model.onnx"

    def produce(work: Path) -> None:
        for file in models.files(variant):
            shutil.copyfile(file, (work / out).parent / file.name)

    result = run.stage(f"engines/{device.name}", {"variant": variant}, [out], produce)
    return Engine(
        target=device, family=family, status="built", reason=None, path=result.paths[out], seconds=result.seconds
    )


def _check(run: Run, made: Variants, family: str, device: Target) -> Engine:
    """Compile the variant for the GPU (or its nearest) with TensorRT for RTX, which needs none."""
    variant = made.variants[family]
    assert device.compute_capability is not None
    capability = checked_capability(device.compute_capability)
    waiting = f"the {device.title} engine is built by TensorRT on that GPU, from variants/{family}/model.onnx"
    if capability is None or not available():
        what = "pip install '.[rtx]' checks here that it compiles" if capability else "no builder here compiles for it"
        return Engine(target=device, family=family, status="skipped", reason=f"{waiting}; {what}", path=variant)
    out = f"checks/{device.name}/compiled.json"
    shapes = _shapes(run, made)

    def produce(work: Path) -> None:
        (work / out).write_text(compile_check(variant, capability, shapes).to_json(), encoding="utf-8")

    proxy = "" if capability == device.compute_capability else f", a proxy for {device.sm}"
    try:
        key = {"variant": variant, "capability": capability, "shapes": shapes}
        result = run.stage(f"checks/{device.name}", key, [out], produce)
    except EngineError as error:
        notice("does-not-compile", error.what, where=f"target {device.name}")
        return Engine(target=device, family=family, status="failed", reason=error.what, path=variant)
    return Engine(
        target=device,
        family=family,
        status="compile_checked",
        reason=f"it compiles for {CHECKABLE[capability]}{proxy}; {waiting}",
        path=variant,
        seconds=result.seconds,
        compiled=CompiledLayers.from_json(result.paths[out].read_text(encoding="utf-8")),
    )


def _shapes(run: Run, made: Variants) -> dict[str, tuple[int, ...]]:
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
