"""The story: a recipe goes in, an engine per target, a verdict and a Triton repository come out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import Recipe
from pipeline.report.contract import Report
from pipeline.report.measured import VerdictStatus
from pipeline.report.summary import summary_lines
from pipeline.stages.calibration import calibrate, ranges
from pipeline.stages.engines import engines
from pipeline.stages.publishing import publish
from pipeline.stages.quantization import plan, quantize
from pipeline.stages.reporting import Outcome, write_reports
from pipeline.stages.run import BuildOptions, Run
from pipeline.stages.source import export, prepare
from pipeline.stages.validation import judge, validate
from pipeline.types import Progress, silent

__all__ = ["BuildOptions", "BuildResult", "build"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build came to.

    Attributes:
        directory: The build directory.
        report: The content of ``report.json``; ``None`` if the build stopped before validation.
        exit_code: 0; 3 if a verdict failed; 4 if a target that was required is not built.
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
    run = Run(recipe, directory, options or BuildOptions(), progress)
    report = None
    with run.running():
        exported = export(run)
        canonical = prepare(run, exported)
        statistics = calibrate(run, exported, canonical)
        plans = plan(run, canonical, statistics)
        chosen = ranges(run, exported, canonical, plans, statistics)
        variants = quantize(run, canonical, plans, chosen)
        made = engines(run, variants)
        measured = validate(run, exported, canonical, plans, chosen, made)
        verdicts = judge(run, measured)
        repository = publish(run, exported, made, verdicts)
        report = write_reports(
            run,
            Outcome(
                exported=exported,
                canonical=canonical,
                plans=plans,
                ranges=chosen,
                engines=made,
                measured=measured,
                verdicts=verdicts,
                repository=repository,
            ),
        )
    return _result(run, report)


def _result(run: Run, report: Report | None) -> BuildResult:
    if report is None:
        lines = [
            f"{r.name}: {'done' if r.fresh else 'was done already'}"
            + (f" -> {', '.join(str(p) for p in r.paths.values())}" if r.paths else "")
            for r in run.results
        ]
        return BuildResult(directory=run.directory, report=None, exit_code=0, summary="\n".join(lines))
    passed = report.verdict is VerdictStatus.PASSED
    failed = report.verdict is VerdictStatus.FAILED or (run.options.require_verdict and not passed)
    missing = run.options.require_built and any(t.status != "built" for t in report.targets.values())
    return BuildResult(
        directory=run.directory,
        report=report.model_dump(mode="json"),
        exit_code=3 if failed else 4 if missing else 0,
        summary="\n".join(summary_lines(report, run.directory)),
    )
