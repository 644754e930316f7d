"""From variants to engines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.target import Target
from pipeline import model as models
from pipeline.stages.run import Run, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What became of one target.

    Attributes:
        target: The device.
        family: The variant it is made from.
        status: ``built`` or ``skipped``.
        reason: Why there is no engine; ``None`` if there is one.
        path: The engine, or the variant that stands in for it in simulation.
        seconds: Time to build it.
    """

    target: Target
    family: str
    status: str
    reason: str | None
    path: Path
    seconds: float | None


@step
def engines(run: Run, variants: Mapping[str, Path]) -> tuple[Engine, ...]:
    """An engine for every target that this machine can build one for; the others say why not."""
    made = []
    for name, devices in run.families.items():
        for device in devices:
            if device.runtime != "onnxruntime":
                reason = (
                    f"a {device.title} engine is built by TensorRT on that GPU; "
                    f"variants/{name}/model.onnx is ready for it"
                )
                made.append(
                    Engine(
                        target=device,
                        family=name,
                        status="skipped",
                        reason=reason,
                        path=variants[name],
                        seconds=None,
                    )
                )
                continue
            out = f"engines/{device.name}/model.onnx"

            def produce(work: Path, name: str = name, out: str = out) -> None:
                for file in models.files(variants[name]):
                    shutil.copyfile(file, (work / out).parent / file.name)

            result = run.stage(f"engines/{device.name}", {"variant": variants[name]}, [out], produce)
            made.append(
                Engine(
                    target=device, family=name, status="built", reason=None,
                    path=result.paths[out], seconds=result.seconds,
                )
            )  # fmt: skip
    return tuple(made)
