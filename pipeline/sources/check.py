"""The exported graph in ONNX Runtime against what torch computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import EngineError, SourceError
from pipeline.running import memory, session
from pipeline.types import Array, Feeds

TOLERANCE = 1e-4
"""Largest ``max|d| / max|reference|`` that counts as the same; FP32 reassociation stays near 1e-6."""


def compare(onnx: Path, cases: Sequence[tuple[Feeds, dict[str, Array]]], *, where: str) -> float:
    """Return the largest relative difference over all cases and outputs.

    Args:
        onnx: The exported graph; it runs as it stands, without ONNX Runtime's optimizations.
        cases: Inputs, and torch's outputs for them in the graph's order.
        where: The source, for the error.

    Raises:
        SourceError: An output is missing, has another shape, or differs by more than :data:`TOLERANCE`, or ONNX
            Runtime cannot run the graph.
    """
    worst = 0.0
    try:
        live = memory.open_session(onnx, optimize=False)
        taken = {value.name for value in live.get_inputs()}
        results = [
            session.run(live, list(reference), {k: v for k, v in feeds.items() if k in taken})
            for feeds, reference in cases
        ]
    except EngineError as error:
        raise SourceError(
            f"The exported graph does not run. {error.what}",
            where=where,
            fix="Use `source.opset: 21`, or export it to .onnx yourself and give that file.",
        ) from error
    for (feeds, reference), got in zip(cases, results, strict=True):
        sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
        for (name, wanted), value in zip(reference.items(), got, strict=True):
            difference = relative_difference(value, wanted)
            if not difference <= TOLERANCE:
                raise SourceError(
                    f"The exported graph does not compute what torch computes: output {name!r} "
                    f"{_how(value, wanted, difference)}, with inputs {sizes}.",
                    where=where,
                    fix="Look for Python code that depends on the input's values or sizes (if, for, int()); torch.cond "
                    "keeps a choice in the graph.",
                )
            worst = max(worst, difference)
    return worst


def _how(value: Array, wanted: Array, difference: float) -> str:
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        return f"is {value.dtype} {list(value.shape)} and not {wanted.dtype} {list(wanted.shape)}"
    if not np.isfinite(difference):
        return "has NaN or infinity in other places"
    return f"differs by {difference:.3g} of its largest value (at most {TOLERANCE:g})"


def relative_difference(value: Array, wanted: Array) -> float:
    """Return ``max|value - wanted| / max|wanted|``; infinite where shapes, types or non-finite values disagree."""
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        return float("inf")
    if not np.issubdtype(wanted.dtype, np.floating):
        value, wanted = value.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(value), finite) or not np.array_equal(
        value[~finite], wanted[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float(np.max(np.abs(value[finite].astype(np.float64) - wanted[finite].astype(np.float64))))
    largest = float(np.max(np.abs(wanted[finite])))
    return difference / largest if largest > 0 else difference
