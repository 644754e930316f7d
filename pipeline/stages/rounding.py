"""Weights that are rounded with the calibration data at hand, before they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import model as models
from pipeline.notices import notice
from pipeline.policy.plan import PrecisionPlan
from pipeline.quantize.weights.rounding import round_weights
from pipeline.sources.export import Exported
from pipeline.stages.rounding_options import no_data, rounding_options
from pipeline.stages.run import Run, step
from pipeline.stages.smoothing import FloatGraph
from pipeline.types import WEIGHT_ONLY, CalibrationData, Precision, Role


@step
def rounding(
    run: Run, exported: Exported, plans: dict[str, PrecisionPlan], floats: dict[str, FloatGraph]
) -> dict[str, Path]:
    """Folder of rounded weights of each family; families that round to nearest have none."""
    asked = run.recipe.policy.rounding
    wanted = {name for name, made in plans.items() if asked in ("gptq", "awq") or (asked is None and _gains(made))}
    if not wanted:
        return {}
    inputs = models.inputs(models.load(next(iter(floats.values())).path))
    data, mask = run.open(run.recipe.calibration, exported, inputs), run.mask(inputs)
    options = rounding_options(run, mask)
    method = options.method.upper()
    found = {}
    for name, made in plans.items():
        if not made.formats or name not in wanted:
            continue
        if made.dynamic:
            notice(
                f"not-{options.method}",
                "Weights are rounded to nearest where activations are dynamic.",
                where="policy.rounding",
            )
            continue
        if asked in ("gptq", "awq"):
            _remark(name, made, options.method)
        if asked is None and data is None:
            notice(
                "rounded-to-nearest",
                f"{_gains(made)} are rounded to nearest; with --calibration DATA, GPTQ would round them for these inputs",
                where=name,
            )
            continue
        if data is None:
            raise no_data(method)
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
            "plan": run.directory / run.folder(name) / "precision_plan.json",
            "data": data.digest(),
            "mask": mask,
            "method": options.method,
        }
        found[name] = run.stage(run.part("rounding", name), key, [out], produce, resumes=True).paths[out]
    return found


def _remark(name: str, made: PrecisionPlan, method: str) -> None:
    """Say which quantized weights the method that was asked for does not round."""
    left = {p for p in made.formats if p is Precision.NF4 or (method == "awq" and p not in WEIGHT_ONLY)}
    if left:
        which = " and ".join(sorted(p.upper() for p in left))
        notice(
            f"not-{method}", f"{method.upper()} does not round {which} weights; they are rounded to nearest", where=name
        )


def _gains(made: PrecisionPlan) -> str:
    """Return which weights GPTQ rounds unasked, because rounding to nearest costs much; ``""`` where it does not."""
    if Precision.INT4 in made.formats or Precision.FP4 in made.formats:
        return "Four-bit weights"
    depthwise = any(n.role is Role.DEPTHWISE_CONV for n in made)
    quantized = any(n.op_type == "Conv" for n in made.quantized())
    return "Weights of a network with depthwise convolutions" if depthwise and quantized else ""
