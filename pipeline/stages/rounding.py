"""Weights that are rounded with the calibration data at hand, before they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import model as models
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.weights.rounding import round_weights
from pipeline.sources.export import Exported
from pipeline.stages.rounding_options import no_data, rounding_options
from pipeline.stages.run import Run, step
from pipeline.stages.smoothing import FloatGraph
from pipeline.types import CalibrationData


@step
def rounding(
    run: Run, exported: Exported, plans: dict[str, PrecisionPlan], floats: dict[str, FloatGraph]
) -> dict[str, Path]:
    """Folder of rounded weights of each family; families that round to nearest have none."""
    methods = {name: {str(n.rounding) for n in made.quantized()} & {"gptq", "awq"} for name, made in plans.items()}
    wanted = [name for name, found in methods.items() if found]
    if not wanted:
        return {}
    inputs = models.inputs(models.load(next(iter(floats.values())).path))
    data, mask = run.open(run.recipe.calibration, exported, inputs), run.mask(inputs)
    options = rounding_options(run, mask)
    found = {}
    for name in wanted:
        made = plans[name]
        if data is None:
            raise no_data(" and ".join(sorted(methods[name])).upper())
        out = f"{run.folder(name)}/rounding"

        def produce(
            work: Path,
            made: PrecisionPlan = made,
            graph: Path = floats[name].path,
            out: str = out,
            data: CalibrationData = data,
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
