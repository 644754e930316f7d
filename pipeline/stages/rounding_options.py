"""What GPTQ and AWQ are told, by both stages in which they work."""

from __future__ import annotations

from pipeline.errors import RecipeError
from pipeline.quantize.weights.rounding import RoundingOptions
from pipeline.stages.run import Run


def rounding_options(run: Run, mask: str | None) -> RoundingOptions:
    """Return what GPTQ and AWQ work with."""
    return RoundingOptions(
        mask=mask,
        threads=run.recipe.threads,
        memory_bytes=run.recipe.calibration.memory_mb << 20,
    )


def no_data(method: str) -> RecipeError:
    """Return the error of a method that has no samples to look at."""
    return RecipeError(
        f"{method} needs calibration data, and the recipe names none.",
        where="policy.rounding",
        fix="Give --calibration DATA, or set rounding to rtn, in the policy and its rules.",
    )
