"""From variants to engines, or to compile checks where this machine has no such GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.saturation import products_saturate
from engines.target import Target
from pipeline import model as models
from pipeline.notices import notice
from pipeline.stages.checks import begin, build_or_check
from pipeline.stages.engine import Engine
from pipeline.stages.run import Run, step
from pipeline.stages.variants import Variants


@step
def engines(run: Run, made: Variants) -> tuple[Engine, ...]:
    """An engine, a compile check, or the reason why there is neither, for every target."""
    for family, devices in run.families.items():
        for device in devices:
            if device.runtime != "onnxruntime":
                begin(run, made, family, device)
    return tuple(
        _serve_variant(run, made, family, device)
        if device.runtime == "onnxruntime"
        else build_or_check(run, made, family, device)
        for family, devices in run.families.items()
        for device in devices
    )


def _serve_variant(run: Run, made: Variants, family: str, device: Target) -> Engine:
    """The ``cpu`` engine is the variant itself as ONNX Runtime runs it."""
    variant, out = made.variants[family], f"engines/{device.name}/model.onnx"

    def produce(work: Path) -> None:
        for file in models.files(variant):
            shutil.copyfile(file, (work / out).parent / file.name)

    forms = made.plans[family].formats.values()
    if any(form.activations is not None for form in forms) and products_saturate():
        notice(
            "saturating-products",
            "This CPU has no VNNI, so ONNX Runtime's uint8 x int8 products saturate: what is measured here is less "
            "accurate than the engine is on CPUs that have it.",
            where=f"target {device.name}",
        )
    result = run.stage(f"engines/{device.name}", {"variant": variant}, [out], produce)
    path = result.paths[out]
    return Engine(
        target=device, family=family, status="built", reason=None, path=path, file=path, seconds=result.seconds
    )
