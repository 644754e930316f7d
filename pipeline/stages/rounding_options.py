"""What GPTQ and AWQ are told, by both stages in which they work."""

from __future__ import annotations

from pipeline.quantize.weights.rounding import RoundingOptions
from pipeline.stages.run import Run


def rounding_options(run: Run, mask: str | None) -> RoundingOptions:
    """Return what GPTQ and AWQ work with."""
    return RoundingOptions(
        mask=mask,
        threads=run.recipe.threads,
        memory_bytes=run.recipe.calibration.memory_mb << 20,
    )
