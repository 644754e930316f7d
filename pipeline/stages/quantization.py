"""From statistics to the precision plan, and from it to the variants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibrators.collector import Statistics
from pipeline import model as models
from pipeline.graph.prepare import Prepared
from pipeline.graph.roles import find_roles
from pipeline.notices import notice
from pipeline.policy.extents import extents
from pipeline.policy.overrides import read_overrides
from pipeline.policy.plan import PrecisionPlan
from pipeline.policy.planning import Evidence
from pipeline.policy.planning import plan as make_plan
from pipeline.policy.remarks import remark
from pipeline.policy.rules import candidates
from pipeline.policy.sizes import expected_bytes
from pipeline.policy.skip import outlier_ratios
from pipeline.quantize.costs import read_costs
from pipeline.quantize.quantize import quantize as write_variant
from pipeline.quantize.ranges.choose import SiteRange
from pipeline.stages.run import DRY_RUN, OVERRIDES, STATISTICS, Run, step
from pipeline.stages.smoothing import FloatGraph, may_smooth


@step
def plan(
    run: Run, canonical: Prepared, statistics: Statistics | None, high: Mapping[str, Mapping[str, str]]
) -> dict[str, PrecisionPlan]:
    """The precision of every node, for every family of targets.

    Args:
        run: This run.
        canonical: The FP32 graph.
        statistics: Of its tensors, ``None`` if nothing was calibrated.
        high: For each family the nodes that were measured to cost too much accuracy, and what they cost.
    """
    plans = {}
    refused = read_overrides(run.directory / OVERRIDES)
    judged = run.recipe.policy.outlier_threshold is not None
    # A dry run leaves a finished build as it is.
    dry = run.options.dry_run
    for name in run.families:
        out = f"{DRY_RUN}/{name}/precision_plan.json" if dry else f"{run.folder(name)}/precision_plan.json"
        overrides = {**high.get(name, {}), **{n: f"override: {why}" for n, why in refused.get(name, {}).items()}}
        half = name.startswith("gpu")
        costs_file = run.recipe.costs if name == "cpu" else None
        if half and statistics is None and not dry:
            notice("fp16-unchecked", "Without calibration data nothing says which tensors FP16 cannot hold.")
        if judged and statistics is None:
            notice("outliers-unchecked", "Without calibration statistics nothing says which tensors have outliers.")

        def produce(
            work: Path,
            name: str = name,
            out: str = out,
            half: bool = half,
            costs_file: Path | None = costs_file,
            overrides: Mapping[str, str] = overrides,
        ) -> dict[str, Any]:
            model = models.load(canonical.path)
            roles, policy, costs = find_roles(model), run.policies[name], read_costs(costs_file)
            largest = extents(statistics) if half and statistics is not None else {}
            spread = outlier_ratios(statistics) if judged and statistics is not None else {}
            seen = Evidence(
                costs=costs,
                extents=largest,
                outliers=spread,
                overrides=overrides,
                smoothable=may_smooth(run.recipe),
                data=run.recipe.calibration.data is not None,
            )
            made = make_plan(model, roles, policy, name, seen)
            if not run.drafts:
                remark(made, candidates(model, roles), policy, seen)
            (work / out).write_text(made.to_json(), encoding="utf-8")
            return {
                "counts": made.counts(),
                "expected_bytes": expected_bytes(model, made),
                "fp32_bytes": models.size_bytes(canonical.path),
            }

        inputs = {
            "model": canonical.path,
            "policy": run.policies[name].model_dump(mode="json"),
            "family": name,
            "costs": costs_file,
            "overrides": overrides,
            "smoothable": may_smooth(run.recipe),
            "data": run.recipe.calibration.data is not None,
            "statistics": run.directory / STATISTICS if (half or judged) and statistics is not None else None,
        }
        result = run.stage(f"dry-run/{name}" if dry else run.part("plan", name), inputs, [out], produce)
        plans[name] = PrecisionPlan.from_json(result.paths[out].read_text(encoding="utf-8"))
    return plans


@step
def quantize(
    run: Run,
    floats: dict[str, FloatGraph],
    plans: dict[str, PrecisionPlan],
    ranges: dict[str, tuple[SiteRange, ...]],
    weights: dict[str, Path],
) -> dict[str, Path]:
    """The Q/DQ ONNX of every family of targets."""
    variants = {}
    for name, made in plans.items():
        out = f"{run.folder(name)}/model.onnx"

        def produce(work: Path, name: str = name, made: PrecisionPlan = made, out: str = out) -> dict[str, Any]:
            variant = write_variant(
                floats[name].path, made, ranges[name], work / out, rounding=weights.get(name), progress=run.progress
            )
            fused = variant.fusion
            return {
                "bytes": variant.bytes,
                "integer_kernels": fused.integer_kernels if fused else None,
                "unfused": list(fused.unfused) if fused else None,
            }

        inputs = {
            "model": floats[name].path,
            "plan": run.directory / run.folder(name) / "precision_plan.json",
            "ranges": run.directory / run.folder(name) / "ranges.json" if ranges[name] else None,
            "weights": weights.get(name),
        }
        variants[name] = run.stage(run.part("quantize", name), inputs, [out], produce).paths[out]
    return variants
