"""Weights that are rounded with the calibration data at hand, before they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.weights.rounding import RoundingOptions, round_weights
from pipeline.sources.export import Exported
from pipeline.stages.rounding_options import rounding_options
from pipeline.stages.run import Run, step
from pipeline.stages.smoothing import FloatGraph
from pipeline.types import CalibrationData


@step
def rounding(
    run: Run, exported: Exported, plans: dict[str, PrecisionPlan], floats: dict[str, FloatGraph]
) -> dict[str, Path]:
    """Folder of rounded weights of each family; families that round to nearest have none."""
    found: dict[str, Path] = {}
    for name, made in plans.items():
        if not {"gptq", "awq"} & {n.rounding for n in made.quantized()}:
            run.forget("rounding", name)
            continue
        inputs = models.inputs(models.load(floats[name].path))
        data, mask = run.open(run.recipe.calibration, exported, inputs), run.mask(inputs)
        assert data is not None  # planning has seen to it
        options = rounding_options(run, mask)
        out = f"{run.folder(name)}/rounding"

        def produce(
            work: Path,
            made: PrecisionPlan = made,
            graph: Path = floats[name].path,
            out: str = out,
            data: CalibrationData = data,
            options: RoundingOptions = options,
        ) -> dict[str, Any]:
            return {"weights": round_weights(graph, made, data, work / out, options, run.progress)}

        key = {
            "model": floats[name].path,
            "plan": made.reading("rounding", "block_size"),
            "data": data.digest(),
            "mask": mask,
        }
        found[name] = run.stage(run.part("rounding", name), key, [out], produce, resumes=True).paths[out]
    return found
