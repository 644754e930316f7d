"""A built engine on this machine's GPU, with the FP16 engine of the same model beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from engines.target import Target
from engines.tensorrt.build import build_engine
from engines.tensorrt.flavour import Flavour, installed
from engines.tensorrt.gpus import Gpu, gpus
from engines.tensorrt.options import BuilderOptions
from pipeline.errors import EngineError
from pipeline.notices import notice
from pipeline.quantize.quantize import quantize
from pipeline.stages.checks import builder_inputs, in_fp16
from pipeline.stages.engine import Engine
from pipeline.stages.run import Run
from pipeline.stages.variants import Variants
from pipeline.validation.engine_on_gpu import GpuEngine


def gpu_of(target: Target) -> Gpu | None:
    """Return a GPU of this machine that runs the target's engine; ``None`` without one."""
    return next((gpu for gpu in gpus() if gpu.capability == target.compute_capability), None)


def engine_on_gpu(run: Run, made: Variants, engine: Engine) -> GpuEngine | None:
    """Return what runs a built engine here; ``None`` where there is no engine, no such GPU or no TensorRT."""
    gpu = gpu_of(engine.target) if engine.file is not None and engine.target.compute_capability else None
    if gpu is None or engine.file is None:
        return None
    flavour = Flavour(engine.target.runtime)
    version = installed(flavour)
    if version is None:
        return None
    # Engines of this process run on the GPU that they are for, unless the user chose one.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", gpu.uuid)
    return GpuEngine(
        plan=engine.file,
        fp16=_fp16(run, made, engine) if run.recipe.validate_.latency else None,
        flavour=flavour,
        device=f"{gpu.name}, driver {gpu.driver}, {flavour.label} {version}",
    )


def _fp16(run: Run, made: Variants, engine: Engine) -> Path | None:
    """Return the FP16 engine of the same model; ``None`` where nothing is quantized, or (said aloud) it does not build."""
    plan, canonical, name = made.plans[engine.family], made.canonical.path, engine.target.name
    if not plan.quantized():
        return None
    out = f"engines/{name}/fp16/model.plan"
    key = builder_inputs(run, made, canonical, engine.target, installed(Flavour(engine.target.runtime)))

    def produce(work: Path) -> None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            fp16 = quantize(canonical, in_fp16(plan), (), Path(folder) / "model.onnx").path
            options = BuilderOptions.from_dict(key["options"])
            built = build_engine(fp16, engine.target, options, key["shapes"], progress=run.progress)
        built.write((work / out).parent)

    try:
        return run.stage(f"engines/{name}-fp16", {**key, "plan": in_fp16(plan).to_json()}, [out], produce).paths[out]
    except EngineError as error:
        notice("no-fp16-engine", f"There is no FP16 engine to compare with: {error.what}", where=f"target {name}")
        return None
