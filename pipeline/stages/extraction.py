"""One layer of a finished build alone, to reproduce what it loses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline import model as models
from pipeline.errors import RecipeError
from pipeline.quantize.emulate import emulate
from pipeline.stages.run import Run
from pipeline.stages.variants import Variants
from pipeline.validation.extract import Extracted, extract


def extract_nodes(run: Run, made: Variants, nodes: Sequence[str], out: Path, variant: str | None) -> Extracted:
    """Write ``nodes`` with the first held-out (else calibration) batch as input.

    Raises:
        RecipeError: The build has no such variant, or the recipe no data.
    """
    name = variant or next(iter(made.variants))
    if name not in made.variants:
        raise RecipeError(
            f"The build has no variant {name!r}.", where="--variant", fix=f"It has {', '.join(made.variants)}."
        )
    inputs = models.inputs(models.load(made.canonical.path))
    recipe = run.recipe
    data = run.open(recipe.validate_, made.exported, inputs) or run.open(recipe.calibration, made.exported, inputs)
    if data is None:
        raise RecipeError("The build has no data to run the layer on.", where="validate.data, calibration.data")
    feeds = next(iter(data))
    # The graph that the variant was made from: where smoothing is on, tensors are not what they were.
    own, quantized = made.floats[name].path, made.variants[name]
    with tempfile.TemporaryDirectory() as folder:
        if made.plans[name].emulated:
            quantized = emulate(quantized, Path(folder) / "model.onnx", like=own)
        return extract(own, quantized, nodes, feeds, out, threads=recipe.threads)
