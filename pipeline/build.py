"""The story: a recipe goes in, an engine per target, a verdict and a Triton repository come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibrators.collector import Statistics
from pipeline.errors import RecipeError
from pipeline.graph.prepare import Prepared
from pipeline.notices import notice
from pipeline.policy.overrides import read_overrides
from pipeline.quantize.schemes import schemes_named
from pipeline.recipe import Recipe
from pipeline.report.contract import Report
from pipeline.report.measured import VerdictStatus
from pipeline.report.summary import summary_lines
from pipeline.sources.export import Exported
from pipeline.stages.calibration import calibrate, ranges
from pipeline.stages.engines import engines
from pipeline.stages.extraction import extract_nodes
from pipeline.stages.mixed import mixed, wants_mixed
from pipeline.stages.profiling import profile_nodes
from pipeline.stages.publishing import publish
from pipeline.stages.quantization import plan, quantize
from pipeline.stages.reporting import Outcome, write_reports
from pipeline.stages.rounding import rounding
from pipeline.stages.run import OVERRIDES, RECIPE, BuildOptions, Run, stored_recipe
from pipeline.stages.simulation import Simulated, calibrated, check_ranges, simulate_schemes, simulated_recipe
from pipeline.stages.smoothing import smooth
from pipeline.stages.source import export, prepare
from pipeline.stages.validation import judge, validate
from pipeline.stages.variants import Variants
from pipeline.types import Progress, silent
from pipeline.validation.extract import Extracted

__all__ = ["BuildOptions", "BuildResult", "build", "extract", "profile", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build came to.

    Attributes:
        directory: The build directory.
        report: The content of ``report.json``; ``None`` if the build stopped before validation.
        exit_code: 0; 3 if a verdict failed or a variant does not compile for a target; 4 if a target that was required is not built.
        summary: What happened, for people.
    """

    directory: Path
    report: dict[str, Any] | None
    exit_code: int
    summary: str


def build(
    recipe: Recipe, directory: Path, *, options: BuildOptions | None = None, progress: Progress = silent
) -> BuildResult:
    """Build what ``recipe`` asks for in ``directory``, going on where an earlier run stopped.

    Every line of the story is a stage: it takes what the lines above returned, and is skipped if that did not change.

    Args:
        recipe: What is asked for.
        directory: The build directory.
        options: How far to go, what to run again, which outcomes are errors.
        progress: Told how far each long stage is.

    Raises:
        PipelineError: Something the user can act on; what was finished before stays.
    """
    options = options or BuildOptions()
    before = read_overrides(directory / OVERRIDES)
    result = _once(recipe, directory, options, progress)
    while options.retry and (known := read_overrides(directory / OVERRIDES)) != before:
        before = known
        notice("retry", f"Planning again with {sum(map(len, known.values()))} refused nodes in high precision.")
        # What is done stays done: only a first run is forced.
        result = _once(recipe, directory, replace(options, force=False, from_stage=None), progress)
    return result


def _once(recipe: Recipe, directory: Path, options: BuildOptions, progress: Progress) -> BuildResult:
    run = Run(recipe, directory, options, progress)
    report = None
    with run.running():
        made = to_variants(run)
        built = engines(run, made)
        measured = validate(run, made, built)
        verdicts = judge(run, measured)
        repository = publish(run, made, built, verdicts)
        report = write_reports(run, made, Outcome(built, measured, verdicts, repository))
    return _result(run, report)


def to_variants(run: Run) -> Variants:
    """Return the first half of the story: from the trained model to the Q/DQ ONNX of every family of targets."""
    exported = export(run)
    canonical = prepare(run, exported)
    statistics = calibrate(run, exported, canonical)
    draft = None
    if wants_mixed(run):
        with run.drafting():
            draft = _variants(run, exported, canonical, statistics, {})
    return _variants(run, exported, canonical, statistics, mixed(run, draft))


def _variants(
    run: Run,
    exported: Exported,
    canonical: Prepared,
    statistics: Statistics | None,
    high: Mapping[str, Mapping[str, str]],
) -> Variants:
    plans = plan(run, canonical, statistics, high)
    floats = smooth(run, exported, canonical, plans, statistics)
    weights = rounding(run, exported, plans, floats)
    chosen = ranges(run, exported, plans, floats)
    variants = quantize(run, floats, plans, chosen, weights)
    return Variants(
        exported=exported, canonical=canonical, plans=plans, floats=floats, ranges=chosen, variants=variants
    )


def profile(recipe: Recipe, directory: Path, *, progress: Progress = silent) -> Path:
    """Time every quantized node in FP32 and INT8 on this machine; return the ``costs.json`` that planning reads."""
    run = Run(recipe, directory, BuildOptions(), progress)
    with run.running():
        return profile_nodes(run, to_variants(run))


def simulate(
    recipe: Recipe,
    directory: Path,
    *,
    schemes: Sequence[str] = (),
    options: BuildOptions | None = None,
    progress: Progress = silent,
) -> tuple[Simulated, ...]:
    """Measure what quantization schemes cost the model, those that no target executes too; deploys nothing.

    Args:
        recipe: The model, its data, and which nodes to quantize; precisions and targets are the schemes' own.
        directory: Where measurements are kept; no build's.
        schemes: Names from :data:`pipeline.quantize.schemes.SCHEMES`; all if none are given.
        options: What to run again.
        progress: Told how far each long stage is.

    Raises:
        RecipeError: There is no such scheme, the directory holds a build, or there is no data.
        PipelineError: As for :func:`build`.
    """
    wanted = schemes_named(tuple(schemes))
    if (directory / RECIPE).exists():
        raise RecipeError(
            "The folder holds a build, whose files a simulation would replace.",
            where=str(directory),
            fix="Give simulate a folder of its own (-o).",
        )
    check_ranges(recipe, wanted)
    run = Run(simulated_recipe(recipe), directory, options or BuildOptions(), progress)
    with run.running(record=False):
        exported = export(run)
        canonical = prepare(run, exported)
        needed = any(map(calibrated, wanted)) or recipe.policy.outlier_threshold is not None
        given = recipe.calibration.data is not None
        statistics = calibrate(run, exported, canonical) if needed and given else None
        return simulate_schemes(run, exported, canonical, statistics, wanted)


def extract(directory: Path, nodes: Sequence[str], out: Path, *, variant: str | None = None) -> Extracted:
    """Write some nodes of a finished build alone, float and quantized, with their inputs and outputs.

    Args:
        directory: A build directory.
        nodes: Node names.
        out: Folder to write to.
        variant: Which variant; the first of the build if not given.
    """
    run = Run(stored_recipe(directory), directory, BuildOptions(), silent)
    with run.running():
        return extract_nodes(run, to_variants(run), nodes, out, variant)


def _result(run: Run, report: Report | None) -> BuildResult:
    if report is None:
        lines = (
            _sizes(run)
            if run.options.dry_run
            else [
                f"{r.name}: {'done' if r.fresh else 'was done already'}"
                + (f" -> {', '.join(str(p) for p in r.paths.values())}" if r.paths else "")
                for r in run.results
            ]
        )
        return BuildResult(directory=run.directory, report=None, exit_code=0, summary="\n".join(lines))
    passed = report.verdict is VerdictStatus.PASSED
    failed = report.verdict is VerdictStatus.FAILED or (run.options.require_verdict and not passed)
    failed = failed or any(t.status == "failed" for t in report.targets.values())
    missing = run.options.require_built and any(t.status != "built" for t in report.targets.values())
    return BuildResult(
        directory=run.directory,
        report=report.model_dump(mode="json"),
        exit_code=3 if failed else 4 if missing else 0,
        summary="\n".join(summary_lines(report, run.directory)),
    )


def _sizes(run: Run) -> list[str]:
    """Return what every planned variant is expected to weigh."""
    lines = []
    for result in run.results:
        if result.name.startswith("dry-run/"):
            counts = ", ".join(f"{n} nodes {p}" for p, n in result.facts["counts"].items())
            expected, fp32 = result.facts["expected_bytes"], result.facts["fp32_bytes"]
            lines.append(
                f"{result.name.removeprefix('dry-run/')}: {counts}; expected size {expected / 1e6:.1f} MB "
                f"({expected / fp32:.0%} of FP32's {fp32 / 1e6:.1f} MB)"
            )
    return lines
