"""What each node costs on this machine: a side line of the build, whose result is an input of the next one."""

from __future__ import annotations

import platform
from pathlib import Path

from engines.node_times import node_times
from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.quantize.costs import node_costs, write_costs
from pipeline.stages.run import Run
from pipeline.stages.variants import Variants


def profile_nodes(run: Run, made: Variants) -> Path:
    """Write ``costs.json`` into the build directory and return its path.

    Raises:
        RecipeError: The recipe has no ``cpu`` target in INT8, or no data to run.
    """
    canonical, plans, variants = made.canonical, made.plans, made.variants
    data = run.open(run.recipe.calibration, made.exported, models.inputs(models.load(canonical.path)))
    if "cpu" not in variants or data is None:
        raise RecipeError(
            "Profiling runs the cpu variant on calibration data, and the recipe has not both.",
            where="targets, calibration.data",
            fix="Add --target cpu and --calibration DATA.",
        )
    feeds = [next(iter(data))]
    threads = run.recipe.threads or 1
    times = []
    for index, path in enumerate((canonical.path, variants["cpu"])):
        run.progress("profile", index, 2)
        times.append(node_times(path, feeds, threads=threads))
    run.progress("profile", 2, 2)
    costs = node_costs(variants["cpu"], plans["cpu"], times[0], times[1])
    out = run.directory / "costs.json"
    write_costs(
        out,
        costs,
        machine=platform.processor() or platform.machine(),
        batch=len(next(iter(feeds[0].values()))),
        threads=threads,
    )
    return out
