"""From statistics to the precision plan, and from it to the variants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibrators.collector import Statistics
from pipeline import model as models
from pipeline.errors import RecipeError
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
    # A dry run leaves a finished build as it is.
    dry = run.options.dry_run
    for name in run.families:
        out = f"{DRY_RUN}/{name}/precision_plan.json" if dry else f"{run.folder(name)}/precision_plan.json"
        overrides = {**high.get(name, {}), **{n: f"override: {why}" for n, why in refused.get(name, {}).items()}}
        _unchecked(run, name, statistics)

        def produce(
            work: Path, name: str = name, out: str = out, overrides: Mapping[str, str] = overrides
        ) -> dict[str, Any]:
            model = models.load(canonical.path)
            roles, policy, seen = find_roles(model), run.policies[name], _evidence(run, name, statistics, overrides)
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
            "costs": _costs(run, name),
            "overrides": overrides,
            "smoothable": may_smooth(run.recipe),
            "data": run.recipe.calibration.data is not None,
            "statistics": run.directory / STATISTICS if _reads(run, name) and statistics is not None else None,
        }
        result = run.stage(f"dry-run/{name}" if dry else run.part("plan", name), inputs, [out], produce)
        plans[name] = PrecisionPlan.from_json(result.paths[out].read_text(encoding="utf-8"))
        _refuse_without_data(run, plans[name])
    return plans


def _costs(run: Run, family: str) -> Path | None:
    return run.recipe.costs if family == "cpu" else None


def _reads(run: Run, family: str) -> bool:
    """Whether a family's plan depends on what calibration saw: FP16's range, and outliers where the policy asks for them."""
    return family.startswith("gpu") or run.recipe.policy.outlier_threshold is not None


def _unchecked(run: Run, family: str, statistics: Statistics | None) -> None:
    if statistics is not None:
        return
    if family.startswith("gpu") and not run.options.dry_run:
        notice("fp16-unchecked", "Without calibration data nothing says which tensors FP16 cannot hold.")
    if run.recipe.policy.outlier_threshold is not None:
        notice("outliers-unchecked", "Without calibration statistics nothing says which tensors have outliers.")


def _evidence(run: Run, family: str, statistics: Statistics | None, overrides: Mapping[str, str]) -> Evidence:
    judged = run.recipe.policy.outlier_threshold is not None
    return Evidence(
        costs=read_costs(_costs(run, family)),
        extents=extents(statistics) if family.startswith("gpu") and statistics is not None else {},
        outliers=outlier_ratios(statistics) if judged and statistics is not None else {},
        overrides=overrides,
        smoothable=may_smooth(run.recipe),
        data=run.recipe.calibration.data is not None,
    )


def _refuse_without_data(run: Run, made: PrecisionPlan) -> None:
    """Refuse GPTQ and AWQ without samples to look at, before any work, and in a dry run too."""
    methods = {str(n.rounding) for n in made.quantized()} & {"gptq", "awq"}
    if methods and run.recipe.calibration.data is None:
        raise RecipeError(
            f"{' and '.join(m.upper() for m in sorted(methods))} need{'s' if len(methods) == 1 else ''} calibration data, and the recipe names none.",
            where="policy.rounding",
            fix="Give --calibration DATA, or set rounding to rtn, in the policy and its rules.",
        )


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
