"""From engines to a Triton repository."""

from __future__ import annotations

from pathlib import Path

from pipeline import model as models
from pipeline.notices import notice
from pipeline.sources.export import Exported
from pipeline.stages.engines import Engine
from pipeline.stages.run import Run
from pipeline.triton.checker import check_repository
from pipeline.triton.repository import write_repository
from pipeline.triton.served import onnx_model
from pipeline.validation.thresholds import Verdict


def publish(run: Run, exported: Exported, engines: tuple[Engine, ...], verdicts: dict[str, Verdict]) -> Path | None:
    """A Triton repository with every built engine; ``None`` where a verdict forbids it or nothing was built."""
    if run.options.until == "validate":
        return None
    statuses = {
        e.target.name: str(verdicts[e.target.name].status) if e.target.name in verdicts else "not_measured"
        for e in engines
    }
    refused = [n for n, s in statuses.items() if s == "failed" or (run.options.require_verdict and s != "passed")]
    if refused:
        notice(
            "not-published",
            f"Nothing was published: the verdict on {', '.join(refused)} is {statuses[refused[0]]}.",
        )
        return None
    built = [e for e in engines if e.status == "built"]
    if not built:
        notice("not-published", "Nothing was published: no engine was built on this machine.")
        return None
    engine = built[0]
    name = run.recipe.triton.name or run.recipe.name
    out = f"triton/{name}"

    def produce(work: Path) -> None:
        inputs = models.inputs(models.load(engine.path))
        data = run.open(run.recipe.calibration, exported, inputs) or run.open(run.recipe.validate_, exported, inputs)
        sample = {k: tuple(v.shape) for k, v in next(iter(data)).items()} if data is not None else None
        served = onnx_model(engine.path, name=name, threads=run.recipe.threads, sample=sample)
        write_repository(work / "triton", model=served, config=run.recipe.triton)
        for problem in check_repository(work / "triton"):
            notice(problem.rule, problem.message, where=problem.where)

    key = {"engine": engine.path, "triton": run.recipe.triton.model_dump(mode="json"), "name": name}
    return run.stage("publish", key, [out], produce).paths[out]
